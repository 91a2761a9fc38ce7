"""The code in the README and in the pages of the site runs as it stands."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "docs/getting-started.md", "docs/choosing.md", "docs/training.md"]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_code_blocks_run_in_order(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)
    assert blocks
    namespace = {}
    for block in blocks:
        exec(compile(block, page, "exec"), namespace)
