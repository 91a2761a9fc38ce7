"""The code in the README and in the pages of the site runs as it stands."""

import importlib
import re
from pathlib import Path

import pytest

import pyroflows

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


def test_what_users_import_is_on_an_api_page():
    pages = "".join(page.read_text() for page in (ROOT / "docs").glob("*.md"))
    lines = re.findall(r"^\.\. auto\w+:: (\S+)\n(   :imported-members:)?", pages, re.M)
    shown = {name for name, _ in lines}
    for name, inner in lines:
        if inner:
            module = importlib.import_module(name)
            shown |= {getattr(module, n).__module__ for n in module.__all__}
    code = pages + (ROOT / "README.md").read_text()
    for name in set(re.findall(r"from (pyroflows\.[\w.]+) import", code)) - shown:
        module = importlib.import_module(name)
        assert {getattr(module, n).__module__ for n in module.__all__} <= shown, name
    for name in set(pyroflows.__all__) - {"__version__", "bases", "families", "transforms"}:
        home = getattr(pyroflows, name).__module__
        assert {home, home.rpartition(".")[0], f"pyroflows.{name}"} & shown, name
