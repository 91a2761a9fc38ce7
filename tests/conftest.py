"""Options, seeds and a clean parameter store for every test."""

import os

import numpy as np
import pyro
import pytest
import torch

DTYPES = {"float32": torch.float32, "float64": torch.float64}


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="where tests that take `device` run")
    parser.addoption(
        "--dtype", choices=sorted(DTYPES), help="only this dtype for tests with `dtype`"
    )
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_configure(config):
    if os.environ.get("PYTEST_XDIST_WORKER"):
        torch.set_num_threads(1)


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: pass --slow"))


def pytest_generate_tests(metafunc):
    """A test that takes ``dtype`` runs in both, unless it parametrizes ``dtype`` itself."""
    taken = {
        name.strip()
        for mark in metafunc.definition.iter_markers("parametrize")
        for name in (mark.args[0].split(",") if isinstance(mark.args[0], str) else mark.args[0])
    }
    if "dtype" in metafunc.fixturenames and "dtype" not in taken:
        only = metafunc.config.getoption("--dtype")
        names = [only] if only else sorted(DTYPES)
        metafunc.parametrize("dtype", [DTYPES[name] for name in names], ids=names)


@pytest.fixture
def device(request):
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def clean_slate():
    """The same seeds, an empty parameter store and Pyro's default settings for every test."""
    pyro.set_rng_seed(0)
    np.random.seed(0)
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()
