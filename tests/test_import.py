"""Importing pyroflows is cheap and changes nothing in the packages around it."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = {"pandas", "arviz", "matplotlib", "sklearn", "scipy", "safetensors", "pyarrow"}

# Runs in a fresh interpreter; `state` is what imports of other packages have been seen to change.
PROBE = """
import json, logging, os, random, sys, warnings
import numpy as np, torch, pyro, tqdm

def state():
    return {
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "torch random state": hash(torch.get_rng_state().numpy().tobytes()),
        "numpy random state": hash(str(np.random.get_state())),
        "python random state": hash(random.getstate()),
        "pyro settings": str(pyro.settings.get()),
        "parameter store": list(pyro.get_param_store()),
        "numpy print options": str(np.get_printoptions()),
        "numpy errors": str(np.geterr()),
        "torch print options": str(vars(torch._tensor_str.PRINT_OPTS)),
        "warnings filters": str(warnings.filters),
        "gradients": torch.is_grad_enabled(),
        "anomaly detection": torch.is_anomaly_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matrix product precision": torch.get_float32_matmul_precision(),
        "swap on conversion": str(torch.__future__.get_swap_module_params_on_conversion()),
        "threads": torch.get_num_threads(),
        "log handlers": str(logging.getLogger().handlers),
        "environment": dict(os.environ),
        "path": list(sys.path),
        "constraints": len(torch.distributions.biject_to._registry),
        "kl": len(torch.distributions.kl._KL_REGISTRY),
    }

before, loaded = state(), set(sys.modules)
MODULES
after = state()
changed = [name for name in before if before[name] != after[name]]
new = {name.split(".")[0] for name in set(sys.modules) - loaded}
print(json.dumps({"changed": changed, "loaded": sorted(new)}))
"""


def probe(*modules):
    code = PROBE.replace("MODULES", "\n".join(f"import {name}" for name in modules))
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert out.returncode == 0, out.stderr
    return json.loads(out.stdout.splitlines()[-1])


def every_module():
    for path in sorted((ROOT / "pyroflows").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[-1] != "__main__":
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("modules", [["pyroflows"], list(every_module())], ids=["top", "every"])
def test_import_loads_nothing_heavy_and_changes_nothing(modules):
    seen = probe(*modules)
    assert seen["changed"] == []
    assert HEAVY.isdisjoint(seen["loaded"])


OLD_PLACES = {
    "pyroflows.bijection": {"Compose", "as_bijection", "check_context"},
    "pyroflows.guides.transport": {"Chain"},
    "pyroflows.transforms.linear": {"Householder", "MatrixExponential", "Permute", "iterated"},
}


@pytest.mark.parametrize("module", OLD_PLACES)
def test_old_places_still_serve(module):
    old = importlib.import_module(module)
    for name in OLD_PLACES[module]:
        found = getattr(old, name)
        assert found is getattr(sys.modules[found.__module__], name)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = old.nothing
