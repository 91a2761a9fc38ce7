"""A file imports only from its own floor and those below: the plan, read off the imports."""

import ast
import re
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "pyroflows"
FILES = sorted(PACKAGE.rglob("*.py"))

# The first word of a file's name, up to "_", decides: density_schema.py lives with density.py.
FLOORS = {
    "scalar": 0, "families": 0, "splines": 0, "numerics": 0, "perceptron": 0, "memory": 0,
    "weights": 0,
    "bijection": 1, "compose": 1, "checks": 1, "conditioners": 1, "store": 1, "constants": 1,
    "supports": 1, "substitution": 1,
    "transforms": 2, "bases": 2,
    "flow": 3, "packed": 3, "dequantization": 3, "divergence": 3, "univariate": 3,
    "recipes": 4, "training": 4,
    "guides": 5, "tables": 5, "density": 5,
    "arviz": 6, "diagnostics": 6, "plots": 6, "cli": 6,
}  # fmt: skip

# Third-party packages by floor; what a floor may use, those above may use too.
NEW_PACKAGES = {
    0: {"torch"},
    1: {"pyro"},
    4: {"numpy", "tqdm", "pandas"},
    5: {"arviz", "sklearn", "safetensors", "pyarrow", "polars"},
    6: {"matplotlib"},
}
ONLY_WHERE_USED = {"pandas", *NEW_PACKAGES[5], *NEW_PACKAGES[6]}
TORCH_ONLY = {"conditioners"}


def first_word(dotted):
    return dotted.removeprefix("pyroflows.").split(".")[0].split("_")[0]


def module_name(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def imports(path):
    """``(dotted name, line, runs at import)`` of every import, relative ones resolved."""
    package = path.relative_to(PACKAGE.parent).parent.parts

    def visit(node, runs):
        match node:
            case ast.Import(names=names):
                yield from ((alias.name, node.lineno, runs) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                base = (
                    ".".join([*package[: len(package) - level + 1], *filter(None, [module])])
                    if level
                    else module
                )
                for alias in names:
                    inner = f"{base}.{alias.name}"
                    yield (inner if inner in MODULES else base), node.lineno, runs
            case _:
                lazy = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or (
                    isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
                )
                for child in ast.iter_child_nodes(node):
                    yield from visit(child, runs and not lazy)

    yield from visit(ast.parse(path.read_text()), True)


def inside(path):
    return ((n, line, runs) for n, line, runs in imports(path) if n.split(".")[0] == "pyroflows")


def outside(path):
    known = sys.stdlib_module_names | {"pyroflows"}
    return (
        (name.split(".")[0], line, runs)
        for name, line, runs in imports(path)
        if name.split(".")[0] not in known
    )


with_a_floor = pytest.mark.parametrize(
    "module", [name for name in MODULES if name != "pyroflows"], ids=lambda name: name
)


@with_a_floor
def test_imports_only_from_lower_floors(module):
    word = first_word(module)
    assert word in FLOORS, f"{module} has no floor: add it to FLOORS, where design puts it"
    wrong = [
        f"line {line}: {name} (floor {FLOORS[first_word(name)]})"
        for name, line, _ in inside(MODULES[module])
        if name == "pyroflows" or FLOORS[first_word(name)] > FLOORS[word]
    ]
    assert not wrong, f"{module} is on floor {FLOORS[word]} and imports {wrong}"


@with_a_floor
def test_third_party_imports(module):
    floor = 0 if first_word(module) in TORCH_ONLY else FLOORS[first_word(module)]
    allowed = set().union(*(names for new, names in NEW_PACKAGES.items() if new <= floor))
    wrong = [f"line {line}: {n}" for n, line, _ in outside(MODULES[module]) if n not in allowed]
    assert not wrong, f"floor {floor} may import {sorted(allowed)}; {module} imports {wrong}"


@pytest.mark.parametrize("module", MODULES)
def test_heavy_packages_are_imported_where_used(module):
    wrong = [
        f"line {line}: {name}"
        for name, line, runs in outside(MODULES[module])
        if runs and name in ONLY_WHERE_USED
    ]
    assert not wrong, f"{module} imports {wrong} when it is imported itself"


def test_no_import_cycles():
    below = {
        name: {target for target, _, runs in inside(path) if runs and target in MODULES} - {name}
        for name, path in MODULES.items()
        if name != "pyroflows"
    }
    done, path = set(), []

    def visit(module):
        assert module not in path, f"import cycle: {' -> '.join([*path, module])}"
        if module not in done:
            path.append(module)
            for target in sorted(below.get(module, ())):
                visit(target)
            done.add(path.pop())

    for module in below:
        visit(module)


def calls(path):
    """Names of what is called, dotted as written."""
    return [
        ast.unparse(node.func)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
    ]


def test_one_loop_calls_an_optimizers_step_and_one_module_clips():
    stepping = {m for m, p in MODULES.items() if any("optimizer.step" in c for c in calls(p))}
    assert stepping == {"pyroflows.training.steps", "pyroflows.guides.climbing"}  # L-BFGS there
    norms = ("clip_grad", "_foreach_norm", "get_total_norm")
    clipping = {m for m, p in MODULES.items() if any(n in c for c in calls(p) for n in norms)}
    assert clipping == {"pyroflows.training.clipping"}


def test_every_file_says_what_it_exports():
    missing = [
        name
        for name, path in MODULES.items()
        if not any(
            isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__all__"
            for node in ast.parse(path.read_text()).body
        )
    ]
    assert not missing, f"no __all__ in {missing}"


@pytest.mark.parametrize(
    ("application", "needs"),
    [
        ("density", {"families", "conditioners", "flow", "training", "weights"}),
        ("guides", {"bijection", "packed", "recipes", "store", "training", "weights"}),
    ],
)
def test_applications_stand_on_the_house(application, needs):
    used = {
        first_word(name)
        for module, path in MODULES.items()
        if first_word(module) == application
        for name, _, _ in inside(path)
    }
    assert needs <= used, f"{application} does without {sorted(needs - used)}"


# Names with an underscore that are not ours: Python's, torch's and Pyro's own.
FOREIGN = {
    "_C", "_base", "_buffers", "_constraints", "_current_level", "_foreach_lerp_",
    "_foreach_norm", "_functorch", "_are_functorch_transforms_active", "_get_tracing_state",
    "_linear_pointwise", "_mask",
    "_modules", "_non_persistent_buffers_set", "_param_to_name", "_parameters", "_params",
    "_pyro_dims", "_setup_prototype", "_stack", "_validate_args", "_version",
}  # fmt: skip
# What anyone may ask of a bijection: the maps that a subclass writes, without memory and checks.
PROTOCOL = {"_forward_and_log_det", "_inverse_and_log_det", "_map_shape", "_move", "_step"}
# What bijections ask of each other, in the files that make them.
AMONG_BIJECTIONS = {"_context", "_evaluate", "_event_dim", "_image", "_inverse_ref", "_once"}
BIJECTIONS = {"bijection", "compose", "flow", "memory", "packed", "transforms"}
# Everything else: at most 15 places, each with its reason.
MADE = "a constructor fills the object that it has just made"
FILE = "a file of an estimator holds what its parameters do not show"
REACHES = {
    ("memory", "_entry"): "the memory is a part of a bijection that has a file of its own",
    ("density.files", "_column_nats"): FILE,
    ("density.files", "_names"): FILE,
    ("density.files", "_score_quantiles"): FILE,
    ("density.files", "_settings"): FILE,
    ("tables.columns", "_change"): MADE,
    ("tables.columns", "_read_labels"): MADE,
    ("tables.columns", "_read_numbers"): MADE,
    ("tables.schema", "_relate"): MADE,
}


def reaches(path):
    """Every ``thing._name`` of a file in which the thing is not the object or class itself."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not (isinstance(node, ast.Attribute) and re.fullmatch("_[^_].*", node.attr)):
            continue
        match node.value:
            case ast.Name(id="self" | "cls") | ast.Call(func=ast.Name(id="super")):
                continue
        yield node.attr, node.lineno


def test_no_file_reaches_into_another_object():
    wrong, permitted = [], []
    for module, path in MODULES.items():
        known = FOREIGN | PROTOCOL
        known |= AMONG_BIJECTIONS if first_word(module) in BIJECTIONS else set()
        for attribute, line in reaches(path):
            if (module.removeprefix("pyroflows."), attribute) in REACHES:
                permitted.append(f"{module}:{line}: {attribute}")
            elif attribute not in known:
                wrong.append(f"{module}:{line}: {attribute}")
    assert not wrong, f"private attributes of other objects: {wrong}; give them public names"
    assert len(permitted) <= 15, f"too many private attributes of other objects: {permitted}"
