"""One harness for every transform of ``cases.CASES``, with and without context."""

import copy
import io
import math
import pickle

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as stock
import pytest
import torch
from cases import CASES, build, contexts, disturb, noise
from pyro.distributions.conditional import ConditionalTransform, ConditionalTransformModule
from pyro.distributions.torch_transform import TransformModule
from pyro.infer import SVI, Trace_ELBO

from pyroflows.bijection import Bijection
from pyroflows.compose import Compose, as_bijection
from pyroflows.conditioners import Columns, ColumnsPass, Conv, Dense, Masked, SequentialPass

BATCHES = [(), (3,), (2, 3), (0,)]
KINDS = [(n, c) for n, case in CASES.items() for c in ((0, 2) if case.takes_context else (0,))]
each_kind = pytest.mark.parametrize("name, context_dim", KINDS)


def view(name, context_dim, batch=(), dtype=torch.float64):
    """The transform with its context fixed, one context for each member of the batch."""
    transform = build(name, context_dim, dtype)
    return transform.condition(contexts(context_dim, *batch, dtype=dtype))


def standard_normal(shape, dtype=torch.float64):
    return dist.Normal(torch.zeros(shape, dtype=dtype), 1.0).to_event(len(shape))


def distribution(name, context_dim, batch=()):
    transform = view(name, context_dim, batch)
    shape = transform.inverse_shape(transform.forward_shape(CASES[name].event_shape))
    shape = shape[len(shape) - len(CASES[name].event_shape) :]
    return dist.TransformedDistribution(standard_normal(tuple(shape)), [transform])


def jacobian_log_det(function, x, event_dim):
    """log|det| of each batch member's Jacobian, one backward pass an output."""
    x = x.clone().requires_grad_()
    y = function(x)
    batch = x.shape[: x.dim() - event_dim]
    rows = [
        torch.autograd.grad(out.sum(), x, retain_graph=True)[0].flatten(len(batch))
        for out in y.flatten(len(batch)).unbind(-1)
    ]
    return torch.linalg.slogdet(torch.stack(rows, -2))[1]


@each_kind
@pytest.mark.parametrize("batch", BATCHES)
def test_log_det_is_that_of_the_jacobian(name, context_dim, batch):
    t, x = view(name, context_dim, batch), noise(name, *batch)
    y = t(x)
    log_det = t.log_abs_det_jacobian(x, y)
    assert log_det.shape == batch
    expected = jacobian_log_det(t._call, x, len(CASES[name].event_shape))
    torch.testing.assert_close(log_det, expected, rtol=1e-8, atol=1e-8)
    backward = jacobian_log_det(t._inverse, y.detach(), len(CASES[name].event_shape))
    torch.testing.assert_close(-log_det, backward, rtol=1e-6, atol=1e-6)


@each_kind
@pytest.mark.parametrize("batch", BATCHES)
def test_round_trip(name, context_dim, batch, dtype):
    t, x = view(name, context_dim, batch, dtype), noise(name, *batch, dtype=dtype)
    tolerance = CASES[name].tolerance * (1e-8 if dtype == torch.float64 else 2e-3)
    for forward in (t, t.inv):
        value = x if forward is t else t._call(x)
        out, log_det = forward.forward_and_log_det(value)
        back, log_det_back = forward.inverse_and_log_det(out)
        assert out.dtype == log_det.dtype == back.dtype == dtype
        assert log_det.shape == log_det_back.shape == batch
        torch.testing.assert_close(back, value, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(log_det_back, -log_det, rtol=tolerance, atol=tolerance)


@each_kind
def test_inverse_is_a_module_with_the_same_parameters(name, context_dim):
    t = build(name, context_dim)
    assert isinstance(t, TransformModule) and isinstance(t.inv, Bijection)
    assert t.inv.inv is t and t.inv is t.inv
    assert {id(p) for p in t.inv.parameters()} == {id(p) for p in t.parameters()}
    assert isinstance(t, ConditionalTransform) and isinstance(t, ConditionalTransformModule)
    conditioned = t.condition(contexts(context_dim, 3))
    assert conditioned.inv.inv is conditioned
    assert {id(p) for p in conditioned.parameters()} == {id(p) for p in t.parameters()}


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.identity])
@pytest.mark.parametrize("context_dim", [0, 2])
def test_starts_as_the_identity(name, context_dim):
    case = CASES[name]
    t = case.make(context_dim if case.takes_context else 0).double().eval()
    x = noise(name, 4)
    y, log_det = t.condition(contexts(context_dim, 4)).forward_and_log_det(x)
    torch.testing.assert_close(y, x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(log_det, torch.zeros_like(log_det), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [n for n, c in KINDS if c])
def test_context_batch_broadcasts(name):
    """A batch of contexts is a batch of distributions, and each equals the distribution alone."""
    event = tuple(noise(name).shape)
    d = distribution(name, 2, (7,))
    assert d.batch_shape == (7,) and d.event_shape == event
    assert d.sample((3,)).shape == (3, 7, *event)
    assert d.expand((5, 7)).sample().shape == (5, 7, *event)
    y = d.sample((3,))
    log_prob = d.log_prob(y)
    assert log_prob.shape == (3, 7)
    alone = build(name, 2).condition(contexts(2, 7)[4])
    one = dist.TransformedDistribution(standard_normal(event), [alone])
    torch.testing.assert_close(one.log_prob(y[:, 4]), log_prob[:, 4])


@each_kind
def test_every_parameter_gets_a_gradient(name, context_dim):
    for of in ("log_prob", "rsample"):
        t = build(name, context_dim)
        if not list(t.parameters()):
            pytest.skip("no parameters")
        fixed = t.condition(contexts(context_dim, 16))
        x = noise(name, 16)
        if of == "log_prob":
            x, log_det = fixed.inverse_and_log_det(fixed._call(x).detach())
            loss = (log_det + x.square().flatten(1).sum(-1)).sum()
        else:
            y, log_det = fixed.forward_and_log_det(x)
            weight = torch.linspace(0.5, 1.5, y[0].numel(), dtype=y.dtype).view(y.shape[1:])
            loss = (y * weight + (y * weight).square()).sum() + log_det.sum()
        loss.backward()
        for key, parameter in t.named_parameters():
            assert parameter.grad is not None, f"{of}: no gradient for {key}"
            assert parameter.grad.isfinite().all(), f"{of}: gradient of {key} not finite"
            assert parameter.grad.abs().max() > 0, f"{of}: zero gradient for {key}"


@each_kind
def test_gradients_agree_in_both_directions(name, context_dim):
    """The inverse's Jacobian is the inverse of the Jacobian."""
    t = build(name, context_dim)
    c = contexts(context_dim, 4)
    x = noise(name, 4).requires_grad_()
    y = t.condition(c)._call(x)
    expected = torch.linalg.inv(_jacobian(t.condition(c)._call, x.detach()))
    got = _jacobian(t.condition(c)._inverse, y.detach())
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def _jacobian(function, x):
    x = x.clone().requires_grad_()
    outs = function(x).flatten(1).unbind(-1)
    rows = [torch.autograd.grad(o.sum(), x, retain_graph=True)[0].flatten(1) for o in outs]
    return torch.stack(rows, -2)


@each_kind
def test_copies_are_whole(name, context_dim):
    t, x, c = build(name, context_dim), noise(name, 4), contexts(context_dim, 4)
    y = t.condition(c)(x)
    t.condition(c).log_abs_det_jacobian(x, y)
    copies = [copy.deepcopy(t), pickle.loads(pickle.dumps(t)), copy.deepcopy(t.inv).inv]
    fresh = CASES[name].make(context_dim).double()
    buffer = io.BytesIO()
    torch.save(t.state_dict(), buffer)
    buffer.seek(0)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    for other in [*copies, fresh.eval()]:
        torch.testing.assert_close(other.condition(c)(x), y)
        assert not {id(p) for p in other.parameters()} & {id(p) for p in t.parameters()}
        assert other.inv.inv is other


def count_calls(t, monkeypatch):
    """A list that grows with every call of a network, and every step of a sequential one."""
    calls = []
    for module in t.modules():
        if isinstance(module, (Dense, Masked, Columns, Conv)):
            module.register_forward_hook(lambda *_: calls.append(1))
    for kind in (SequentialPass, ColumnsPass):
        count = lambda self, step=kind.params: calls.append(1) or step(self)  # noqa: E731
        monkeypatch.setattr(kind, "params", count)
    return calls


@each_kind
def test_calls_are_those_counted(name, context_dim, monkeypatch):
    t = build(name, context_dim)
    fixed, calls = t.condition(contexts(context_dim, 3)), count_calls(t, monkeypatch)
    y = fixed._call(noise(name, 3))
    forward = len(calls)
    fixed._inverse(y)
    inverse = len(calls) - forward
    roots = 8 * {"planar": 1, "planar_one_feature": 1, "sylvester": 3}.get(name, 0)
    assert t.calls == (forward, inverse + roots)
    assert t.inv.calls == (inverse + roots, forward)
    assert Compose([t, t.inv]).calls == (forward + inverse + roots,) * 2


def test_calls_that_a_class_says_nothing_about():
    class Own(Bijection):
        pass

    class Slow(Bijection):
        calls = (1, 20)

    assert Own().calls == (1, 1) and not Own().cheaper_inverse
    assert Slow().inv.calls == (20, 1) and Slow().inv.cheaper_inverse
    foreign = as_bijection(stock.affine_autoregressive(3, [4]))
    assert foreign.calls == (1, math.inf) and foreign.inv.cheaper_inverse


@each_kind
def test_network_calls(name, context_dim):
    """Value and log-determinant come from one evaluation through Pyro's own distribution."""
    t, calls = build(name, context_dim), []
    networks = [m for m in t.modules() if isinstance(m, (Dense, Masked, Columns))]
    for network in networks:
        network.register_forward_hook(lambda *_, n=network: calls.append(n))
    d = dist.TransformedDistribution(
        standard_normal(tuple(noise(name).shape)), [t.condition(contexts(context_dim, 6))]
    )
    y = d.rsample()
    assert len(calls) <= len(networks)
    calls.clear()
    d.log_prob(y)
    assert not calls
    d.log_prob(y.detach())
    assert len(calls) <= len(networks)
    calls.clear()
    conditional = dist.ConditionalTransformedDistribution(
        standard_normal(tuple(noise(name).shape)), [t]
    )
    conditional.condition(contexts(context_dim, 6)).log_prob(y.detach())
    assert len(calls) <= len(networks)


@each_kind
def test_memory_never_lies(name, context_dim):
    t, x = build(name, context_dim), noise(name, 4)
    c = contexts(context_dim, 4)
    fixed = t.condition(c)
    with torch.no_grad():
        y = fixed(x)
    parameters = list(t.parameters())
    back = fixed.inv(y)
    if parameters:  # gradients wanted that the first call lacked
        assert back.requires_grad
    for _ in range(2):  # the same tensors again, with their graphs freed
        for p in parameters:
            p.grad = None
        z = fixed(x)
        loss = z.sum() + fixed.log_abs_det_jacobian(x, z).sum()
        if loss.requires_grad:
            loss.backward()
    z = fixed(x)
    with torch.no_grad():
        for p in parameters:
            p.add_(0.05)
    truth = copy.deepcopy(t).condition(c).inverse_and_log_det(z)
    torch.testing.assert_close(fixed.inv(z), truth[0])
    torch.testing.assert_close(fixed.inv.log_abs_det_jacobian(z, fixed.inv(z)), truth[1])
    y = fixed(x).detach()
    x2 = fixed.inv(y)
    y2 = fixed(x2.detach())
    y2.detach().mul_(1.01)  # changed in place after it was returned
    torch.testing.assert_close(fixed.inv(y2), fixed.inverse_and_log_det(y2)[0])


@each_kind
def test_nan_stays_in_its_row_and_shows(name, context_dim):
    x = noise(name, 5)
    x[2].view(-1)[-1] = math.nan
    t = view(name, context_dim, (5,))
    for move in (t.forward_and_log_det, t.inverse_and_log_det):
        value = (
            x
            if move == t.forward_and_log_det
            else torch.where(x.isnan(), x, t._call(noise(name, 5)))
        )
        out, log_det = move(value)
        bad = torch.arange(5) == 2
        assert torch.equal(out.flatten(1).isnan().any(-1), bad)
        assert torch.equal(log_det.isnan(), bad)


@each_kind
def test_bad_input_is_named(name, context_dim):
    t = build(name, context_dim)
    event = CASES[name].event_shape
    c = contexts(context_dim, 3)
    fixed = t.condition(c)
    with pytest.raises(ValueError, match="expects"):
        fixed(torch.randn(3, *event[:-1], event[-1] + 1, dtype=torch.float64))
    with pytest.raises((TypeError, ValueError), match="floating|int"):
        fixed(torch.zeros(3, *event, dtype=torch.long))
    if list(t.parameters()):
        with pytest.raises(ValueError, match="float32"):
            fixed(noise(name, 3, dtype=torch.float32))
    if context_dim:
        with pytest.raises(ValueError, match=r"\(\.\.\., 2\).*got \(3, 3\)"):
            t.condition(contexts(3, 3))
        with pytest.raises(RuntimeError, match="condition"):
            t(noise(name, 3))
        with pytest.raises(ValueError, match="broadcast"):
            fixed(noise(name, 4))


@each_kind
def test_svi_lowers_the_loss(name, context_dim):
    t = build(name, context_dim)
    if not list(t.parameters()):
        pytest.skip("nothing to learn")
    target, c = build(name, context_dim), contexts(context_dim, 64)
    disturb(target, torch.Generator().manual_seed(9), 0.5)
    base = standard_normal(tuple(noise(name).shape))
    data = dist.TransformedDistribution(base, [target.condition(c)]).sample(
        () if context_dim else (64,)
    )

    def model():
        pyro.module("t", t)
        with pyro.plate("rows", 64):
            pyro.sample("y", dist.TransformedDistribution(base, [t.condition(c)]), obs=data)

    svi = SVI(model, lambda: None, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    losses = [svi.step() for _ in range(25)]
    assert math.isfinite(losses[-1]) and losses[-1] < losses[0]
