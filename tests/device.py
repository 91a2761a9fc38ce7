"""Find device bugs on a machine without a GPU: three audits, cheapest first.

- :func:`check_factories` runs code while torch's default device is ``meta``: a tensor made without
  ``device=`` has no values there, so it raises or shows in the output.
- :func:`stray_tensors` names the tensors that ``module.to(device)`` leaves behind.
- :class:`FakeGPU` is a device called ``fakegpu``: real values computed on the CPU, behind CUDA's
  rules on mixing devices. It stands on PyTorch's private support for backends written in Python;
  where that is absent, tests marked ``audit_process`` are skipped.
"""

import concurrent.futures
import copy
import functools
import importlib
import multiprocessing
import types
import warnings

import pytest
import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

__all__ = [
    "FakeGPU",
    "MixedDevices",
    "audit_process",
    "check_factories",
    "on_fake_gpu",
    "stray_tensors",
]


class MixedDevices(RuntimeError):
    """An operation that CUDA would refuse because its arguments lie on different devices."""


def _tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


# ---------------------------------------------------------------- tensors made without device=
def check_factories(function, *args):
    """Run ``function(*args)`` on CPU tensors where a factory call without ``device=`` fails.

    Does not see ``torch.from_numpy`` and the legacy constructors; :class:`FakeGPU` does.

    Raises:
        MixedDevices: If an output came out without values.
    """
    with torch.device("meta"):
        out = function(*args)
    stray = [tuple(t.shape) for t in _tensors(out) if t.device.type == "meta"]
    if stray:
        raise MixedDevices(f"outputs of shape {stray} come from a tensor made without device=")
    return out


# ---------------------------------------------------------------- tensors that .to() leaves behind
def _parts(thing, path):
    """What ``thing`` refers to, as ``(path, part)``: items, attributes, closures, arguments."""
    if isinstance(thing, dict):
        yield from ((f"{path}[{key!r}]", part) for key, part in thing.items())
    elif isinstance(thing, (list, tuple, set, frozenset)):
        yield from ((f"{path}[{i}]", part) for i, part in enumerate(thing))
    elif isinstance(thing, functools.partial):
        yield from _parts((thing.func, thing.args, thing.keywords), path)
    elif isinstance(thing, types.MethodType):
        yield f"{path}.__self__", thing.__self__
        yield f"{path}.__func__", thing.__func__
    elif isinstance(thing, types.FunctionType):
        names = thing.__code__.co_freevars
        for name, cell in zip(names, thing.__closure__ or (), strict=True):
            try:
                yield f"{path}<{name}>", cell.cell_contents
            except ValueError:  # a name that is not bound yet
                continue
        yield f"{path}<defaults>", (thing.__defaults__, thing.__kwdefaults__)
    else:
        for kind in type(thing).__mro__:
            for name in getattr(kind, "__slots__", ()):
                if isinstance(name, str) and hasattr(thing, name):
                    yield f"{path}.{name}", getattr(thing, name)
            for name, part in vars(kind).items():
                if isinstance(part, torch.Tensor):
                    yield f"{path}.{name}", part
        yield from (
            (f"{path}.{name}", part) for name, part in getattr(thing, "__dict__", {}).items()
        )


def _walk(root):
    """Every tensor reachable from ``root``, as ``(path, tensor)``, each once."""
    leaves = (str, bytes, int, float, complex, type, types.ModuleType, torch.device, torch.dtype)
    seen, todo = {}, [("", root)]
    while todo:
        path, thing = todo.pop()
        if id(thing) in seen or isinstance(thing, leaves) or thing is None:
            continue
        seen[id(thing)] = thing  # held, so that no id is used twice
        if isinstance(thing, torch.Tensor):
            yield path, thing
        else:
            todo.extend(_parts(thing, path))


def stray_tensors(module):
    """Paths of the tensors that a copy of ``module`` still has on the CPU after ``.to("meta")``.

    Call the module first, so that what it caches is there to be found.
    """
    moved = copy.deepcopy(module).to("meta")
    return sorted({path for path, tensor in _walk(moved) if tensor.device.type != "meta"})


# ---------------------------------------------------------------- a GPU that is none
_NAME = "fakegpu"
_aten = torch.ops.aten
_BETWEEN_DEVICES = {_aten._to_copy.default, _aten.copy_.default, _aten.copy.default}
_INDEX_MAY_BE_ON_CPU = {
    _aten.index.Tensor: lambda a: a[:1],
    _aten.index_put.default: lambda a: (a[0], *a[2:3]),
    _aten.index_put_.default: lambda a: (a[0], *a[2:3]),
}
# Elementwise CUDA kernels take a CPU scalar beside CUDA tensors; these do not.
_NO_CPU_SCALAR = (
    "addmm", "addmv", "bmm", "cat", "dot", "gather", "index_select", "linalg", "mm", "mv",
    "scatter", "searchsorted", "stack",
)  # fmt: skip


class _FakeTensor(torch.Tensor):
    """A tensor that says it lies on ``fakegpu:0``; its values are in ``raw``, on the CPU."""

    @staticmethod
    def __new__(cls, raw):
        self = torch.Tensor._make_wrapper_subclass(
            cls, raw.size(), strides=raw.stride(), storage_offset=raw.storage_offset(),
            dtype=raw.dtype, layout=raw.layout, device=torch.device(_NAME, 0), requires_grad=False,
        )  # fmt: skip
        self.raw = raw
        return self

    def __repr__(self, **kwargs):
        return f"FakeGPU({self.raw!r})"

    def tolist(self):
        return self.raw.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _dispatch(func, args, kwargs or {})


def _raw(thing):
    return thing.raw if isinstance(thing, _FakeTensor) else thing


def _fake(thing):
    return _FakeTensor(thing) if isinstance(thing, torch.Tensor) else thing


def _refuse_mixing(func, args, kwargs):
    """CUDA's rule: CPU tensors beside CUDA tensors only as scalars, and only elementwise."""
    checked = _INDEX_MAY_BE_ON_CPU[func](args) if func in _INDEX_MAY_BE_ON_CPU else (args, kwargs)
    cpu = [t for t in _tensors(checked) if not isinstance(t, _FakeTensor)]
    strict = func.__name__.startswith(_NO_CPU_SCALAR)
    if any(t.dim() or strict for t in cpu):
        shapes = [tuple(t.shape) for t in cpu]
        raise MixedDevices(f"{func}: expected every tensor on {_NAME}:0; on the CPU are {shapes}")


def _dispatch(func, args, kwargs):
    given = kwargs.get("device")
    fake_input = any(isinstance(t, _FakeTensor) for t in _tensors((args, kwargs)))
    if fake_input and func not in _BETWEEN_DEVICES:
        _refuse_mixing(func, args, kwargs)
    if given is None:
        fake_output = (
            isinstance(args[0], _FakeTensor) if func is _aten.copy_.default else fake_input
        )
    else:
        fake_output = torch.device(given).type == _NAME
    generator = kwargs.get("generator")
    if fake_output and generator is not None:
        raise MixedDevices(f"{func}: a generator on {generator.device} draws no tensor on {_NAME}")
    raw_args, raw_kwargs = tree_map(_raw, (args, kwargs))
    if given is not None and fake_output:
        raw_kwargs["device"] = "cpu"
    out = func(*raw_args, **raw_kwargs)
    if not fake_output:
        return out
    out = tree_map(_fake, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if fake_input else out


_library = []  # PyTorch drops the kernels when the object that registered them goes


def _register():
    """Make ``fakegpu`` known to PyTorch; once per process, and it stays."""
    if torch._C._get_privateuse1_backend_name() == _NAME:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        backend_registration._setup_privateuseone_for_python_backend(_NAME)
    # torch.tensor(..., device=...) and its like allocate below the level where Python is asked.
    library = torch.library.Library("aten", "IMPL")
    _library.append(library)

    def empty(size, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
        return _FakeTensor(torch.empty(size, dtype=dtype, device="cpu"))

    def empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
        return _FakeTensor(torch.empty_strided(size, stride, dtype=dtype, device="cpu"))

    def copy_from(source, target, non_blocking=False):
        _raw(target).copy_(_raw(source))
        return target

    library.impl("empty.memory_format", empty, "PrivateUse1")
    library.impl("empty_strided", empty_strided, "PrivateUse1")
    library.impl("_copy_from", copy_from, "PrivateUse1")


def _available():
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        return False
    return torch._C._get_privateuse1_backend_name() in ("privateuseone", _NAME)


class FakeGPU(TorchDispatchMode):
    """``with FakeGPU():`` the device ``fakegpu`` exists, for factories, ``.to()``, operations."""

    def __enter__(self):
        _register()
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _dispatch(func, args, kwargs or {})


def on_fake_gpu(function, *args):
    """Run ``function(*args)`` with modules and tensors on the fake GPU; bring the output back.

    Modules, ``function`` among them, are copied, so the caller's stay where they are.

    Raises:
        MixedDevices: If an operation mixes devices or an output came out on the CPU.
    """

    def move(thing):
        if isinstance(thing, torch.nn.Module):
            return copy.deepcopy(thing).to(_NAME)
        return thing.to(_NAME) if isinstance(thing, torch.Tensor) else thing

    with FakeGPU():
        out = move(function)(*tree_map(move, args))
        left = [tuple(t.shape) for t in _tensors(out) if t.device.type != _NAME]
        if left:
            raise MixedDevices(f"outputs of shape {left} are on the CPU")
        return tree_map(lambda t: t.cpu() if isinstance(t, torch.Tensor) else t, out)


# ---------------------------------------------------------------- a process that has the fake GPU
def _start():
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    _register()


def _run(module, name, kwargs):
    torch.manual_seed(0)
    getattr(importlib.import_module(module), name).__wrapped__(**kwargs)


@functools.cache
def _process():
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(1, mp_context=context, initializer=_start)


def audit_process(test):
    """Run a test function in a process of its own, where the fake GPU is known from the start.

    PyTorch's autograd counts the devices at the first backward pass and never again, and a device
    once registered stays: neither goes together with the other tests. Arguments are pickled.
    """

    @functools.wraps(test)
    def run(**kwargs):
        if not _available():
            pytest.skip("this PyTorch has no backends written in Python (private API)")
        try:
            _process().submit(_run, test.__module__, test.__name__, kwargs).result()
        except concurrent.futures.process.BrokenProcessPool:
            _process.cache_clear()
            raise

    return run
