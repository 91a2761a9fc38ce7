"""Transforms where a graph is recorded: compiled, exported, traced, or stacked under vmap."""

import copy
import io

import pytest
import torch
from cases import CASES, build, contexts, noise

import pyroflows.transforms as T
from pyroflows import glow, iaf, maf, neural_spline, nice, realnvp

KINDS = [(n, c) for n, case in CASES.items() for c in ((0, 2) if case.takes_context else (0,))]
each_kind = pytest.mark.parametrize("name, context_dim", KINDS)
both_ways = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
# what once broke a graph: the order, networks, halves
SOME = ["affine_autoregressive_permuted", "spline_coupling"]
# their inverses unroll a search, which makes large graphs: with --slow
SEARCHES = ["planar", "planar_one_feature", "sylvester"]
quiet = pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
)


class Both(torch.nn.Module):
    """Value and log-determinant, as a module that is called."""

    def __init__(self, transform, inverse):
        super().__init__()
        self.transform, self.inverse = transform, inverse

    def forward(self, x, context=None):
        t = self.transform if context is None else self.transform.condition(context)
        return t.inverse_and_log_det(x) if self.inverse else t.forward_and_log_det(x)


class LogProb(torch.nn.Module):
    def __init__(self, flow):
        super().__init__()
        self.flow = flow

    def forward(self, x, context=None):
        return self.flow.log_prob(x, context)


class Draw(LogProb):
    def forward(self, noise, context=None):
        return self.flow(context).transforms[0](noise)


def module(name, context_dim, inverse):
    """The module, and inputs of two sizes of batch."""
    t = build(name, context_dim)
    inputs = []
    for n in (4, 7):
        x, context = noise(name, n), contexts(context_dim, n)
        with torch.no_grad():
            x = t.condition(context)._call(x) if inverse else x
        inputs.append((x, context) if context_dim else (x,))
    return Both(t, inverse), *inputs


@pytest.mark.parametrize("name", [name for name in CASES if name not in SEARCHES])
@both_ways
@quiet
def test_traced_and_saved(name, inverse):
    call, first, second = module(name, 2 if CASES[name].takes_context else 0, inverse)
    traced, file = torch.jit.trace(call, first, check_trace=False), io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(*second), call(*second))


@each_kind
@both_ways
def test_many_modules_at_once(name, context_dim, inverse):
    one, x, _ = module(name, context_dim, inverse)
    other = copy.deepcopy(one)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))

    def call(parameters, buffers):
        return torch.func.functional_call(one, (parameters, buffers), x)

    state = torch.func.stack_module_state([one, other])
    out, log_det = torch.func.vmap(call, randomness="error")(*state)
    for i, single in enumerate((one, other)):
        torch.testing.assert_close((out[i], log_det[i]), single(*x))


def export(call, inputs):
    batch = torch.export.Dim("batch", min=2, max=1000)
    shapes = tuple({0: batch} for _ in inputs)
    return torch.export.export(call, inputs, dynamic_shapes=shapes).module()


@pytest.mark.parametrize("name", SOME)
@both_ways
@quiet
def test_exported_for_batches_of_any_size(name, inverse):
    call, first, second = module(name, 2, inverse)
    torch.testing.assert_close(export(call, first)(*second), call(*second))


@pytest.mark.parametrize("name", SOME)
@both_ways
@quiet
def test_compiled_in_one_graph(name, inverse):
    torch._dynamo.reset()
    call, first, second = module(name, 2, inverse)
    compiled = torch.compile(call, backend="eager", fullgraph=True, dynamic=True)
    for inputs in (first, second):
        torch.testing.assert_close(compiled(*inputs), call(*inputs))
    loss, expected = (sum(t.square().sum() for t in c(*second)) for c in (compiled, call))
    found = torch.autograd.grad(loss, list(call.parameters()))
    torch.testing.assert_close(found, torch.autograd.grad(expected, list(call.parameters())))


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES))
@both_ways
@quiet
def test_compiled_and_exported_in_every_kind(name, inverse):
    torch._dynamo.reset()
    call, first, second = module(name, 2 if CASES[name].takes_context else 0, inverse)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True)
    compiled(*first)
    torch.testing.assert_close(compiled(*second), call(*second))
    torch.testing.assert_close(export(call, first)(*second), call(*second))


@pytest.mark.parametrize("recipe", [maf])
@quiet
def test_a_flow_is_exported_in_both_directions(recipe):
    flow = recipe(3, context_dim=2, num_transforms=2, hidden_dims=[8])
    x, context = torch.randn(6, 3), torch.randn(6, 2)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    for call in (LogProb(flow), Draw(flow)):
        exported = export(call, (x[:4], context[:4]))
        torch.testing.assert_close(exported(x, context), call(x, context))


@pytest.mark.parametrize("recipe", [iaf])
@quiet
def test_a_flow_is_compiled_in_one_graph(recipe):
    torch._dynamo.reset()
    flow = recipe(3, context_dim=2, num_transforms=1, hidden_dims=[8])
    compiled = torch.compile(flow.log_prob, backend="eager", fullgraph=True, dynamic=True)
    for n in (4, 6):
        x, context = torch.randn(n, 3), torch.randn(n, 2)
        torch.testing.assert_close(compiled(x, context), flow.log_prob(x, context))
    draw = torch.compile(lambda c: flow.rsample((5,), c), backend="eager", fullgraph=True)
    assert draw(context).shape == (5, 6, 3)


@pytest.mark.parametrize("recipe", [iaf, maf, realnvp, neural_spline])
def test_derivatives_of_the_density_of_one_point(recipe):
    flow = recipe(3).double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(3, dtype=torch.float64)
    hessian = torch.func.hessian(flow.log_prob)(x)
    rows = torch.autograd.functional.hessian(flow.log_prob, x)
    torch.testing.assert_close(hessian, rows, rtol=1e-9, atol=1e-9)
    many = torch.func.vmap(torch.func.hessian(flow.log_prob))(x.expand(2, 3))
    torch.testing.assert_close(many, hessian.expand(2, 3, 3), rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------ without memory, or with less


@pytest.mark.parametrize("assign", [False, True])
def test_built_on_the_meta_device_and_filled_later(assign):
    """Also what is no state: constants, and what Python knows of the buffers."""
    for name, case in CASES.items():
        context_dim = 2 if case.takes_context else 0
        true = build(name, context_dim, torch.float32)
        with torch.device("meta"):
            empty = case.make(context_dim).eval()
        if not assign:
            empty = empty.to_empty(device="cpu")
            for tensor in empty.state_dict().values():
                tensor.zero_()  # to_empty leaves what it finds in memory
        empty.load_state_dict(true.state_dict(), assign=assign)
        context, x = contexts(context_dim, 4, dtype=torch.float32), noise(name, 4).float()
        y, log_det = true.condition(context).forward_and_log_det(x)
        for found, expected in (
            (empty.condition(context).forward_and_log_det(x), (y, log_det)),
            (
                empty.condition(context).inverse_and_log_det(y),
                true.condition(context).inverse_and_log_det(y.clone()),
            ),
        ):
            torch.testing.assert_close(found, expected, msg=lambda m, n=name: f"{n}: {m}")


def test_an_empty_order_is_named():
    with torch.device("meta"):
        t = T.affine_autoregressive(3, [8])
    with pytest.raises(RuntimeError, match="meta device.*load its state"):
        t.inv(torch.zeros(2, 3, device="meta"))
    with pytest.raises(RuntimeError, match="load the module's state"):
        empty = t.to_empty(device="cpu")
        empty.conditioner.order.zero_()
        empty.inv(torch.zeros(2, 3))


@pytest.mark.parametrize("recipe", [nice, realnvp, glow, iaf, maf, neural_spline])
def test_a_flow_built_on_the_meta_device(recipe):
    flow = recipe(3)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    flow.eval()
    with torch.device("meta"):
        empty = recipe(3).eval()
    empty.to_empty(device="cpu").load_state_dict(flow.state_dict())
    x = torch.randn(5, 3)
    torch.testing.assert_close(empty.log_prob(x), flow.log_prob(x))


@pytest.mark.parametrize("name", ["affine_autoregressive", "spline_coupling", "linear"])
@both_ways
def test_autocast_leaves_doubles_alone_and_refuses_a_mixture(name, inverse):
    call, x, _ = module(name, 2, inverse)
    expected = call(*x)
    with torch.autocast("cpu"):
        torch.testing.assert_close(call(*x), expected, rtol=0, atol=0)
        with pytest.raises(ValueError, match="torch.float32.*torch.float64"):
            call.float()(*x)
        assert all(t.isfinite().all() for t in call(*(t.float() for t in x)))
