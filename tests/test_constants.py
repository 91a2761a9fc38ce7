"""Every number that shapes the density is a parameter or a buffer: it is saved, moved, trained."""

import copy
import io
import math
import pickle

import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import biject_to, constraints, transform_to
from torch.distributions import transforms as stock

import pyroflows as pf
from pyroflows import transforms as T
from pyroflows.flow import Flow


def numbers(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator) + 0.5


def cholesky(seed):
    return transform_to(constraints.lower_cholesky)(numbers(seed, 3, 3))


def conditioned(seed):
    t = T.affine_coupling(3, [4], context_dim=2)
    with torch.no_grad():
        t.conditioner.weights.copy_(numbers(seed, t.conditioner.weights.numel()) / 4)
    return t.condition(numbers(seed + 1, 2))


BASES = {
    "normal": lambda s: dist.Normal(numbers(s, 3), numbers(s + 1, 3)),
    "expanded": lambda s: dist.Normal(numbers(s, 1), 2.0).expand([3]).to_event(1),
    "twice": lambda s: dist.Normal(numbers(s, 3), numbers(s, 1)).to_event(1),
    "student": lambda s: dist.StudentT(3.0 + numbers(s, 3), numbers(s, 3), 1.0).to_event(1),
    "multivariate": lambda s: dist.MultivariateNormal(numbers(s, 3), scale_tril=cholesky(s)),
    "covariance": lambda s: dist.MultivariateNormal(
        numbers(s, 3), covariance_matrix=cholesky(s) @ cholesky(s).T
    ),
    "precision": lambda s: dist.MultivariateNormal(
        numbers(s, 3), precision_matrix=cholesky(s) @ cholesky(s).T
    ),
    "low rank": lambda s: dist.LowRankMultivariateNormal(
        numbers(s, 3), numbers(s, 3, 1), numbers(s + 1, 3)
    ),
    "masked": lambda s: dist.Normal(numbers(s, 3), 1.0).to_event(1).mask(torch.tensor(True)),
    "mixture": lambda s: dist.MixtureSameFamily(
        dist.Categorical(probs=numbers(s, 2)),
        dist.Normal(numbers(s, 2, 3), numbers(s + 1, 2, 3)).to_event(1),
    ),
    "mixture by logits": lambda s: dist.MixtureSameFamily(
        dist.Categorical(logits=numbers(s, 2)),
        dist.Normal(numbers(s, 2, 3), numbers(s + 1, 2, 3)).to_event(1),
    ),
    "transformed": lambda s: dist.TransformedDistribution(
        dist.Normal(numbers(s, 3), 1.0).to_event(1),
        [stock.AffineTransform(numbers(s, 3), numbers(s + 1, 3)), stock.ExpTransform().inv.inv],
    ),
    "a flow's": lambda s: Flow(dist.Normal(numbers(s, 3), 1.0), T.permute(3))(),
}
TRANSFORMS = {
    "affine": lambda s: stock.AffineTransform(numbers(s, 3), numbers(s + 1, 3)),
    "affine by floats": lambda s: stock.AffineTransform(1.0 + s, 2 + s),
    "inverse": lambda s: stock.AffineTransform(numbers(s, 3), numbers(s + 1, 3), event_dim=1).inv,
    "independent": lambda s: stock.IndependentTransform(
        stock.ComposeTransform([stock.AffineTransform(numbers(s, 3), 1.0), stock.TanhTransform()]),
        1,
    ),
    "power": lambda s: stock.ComposeTransform(
        [stock.ExpTransform(), stock.PowerTransform(numbers(s, 3))]
    ),
    "stack": lambda s: stock.StackTransform(
        [stock.AffineTransform(*numbers(s + i, 2)) for i in range(3)], -1
    ),
    "interval": lambda s: biject_to(constraints.interval(-numbers(s, 3), numbers(s + 1, 3))),
    "pyro's": lambda s: dist.transforms.LowerCholeskyAffine(numbers(s, 3), cholesky(s)),
    "conditioned": conditioned,
}
CASES = {f"base {k}": lambda s, f=f: Flow(f(s), T.affine_coupling(3, [4]))
         for k, f in BASES.items()}  # fmt: skip
CASES |= {f"transform {k}": lambda s, f=f: Flow(3, [f(s)]) for k, f in TRANSFORMS.items()}


@pytest.mark.parametrize("name", CASES)
def test_constants_travel_in_state_dict(name):
    source, target = CASES[name](0), CASES[name](7)
    y = source.sample((4,))
    expected = source.log_prob(y)
    target.sample((2,))  # what the target computed before must not survive
    own = target.state_dict()
    assert any(not torch.equal(value, own[key]) for key, value in source.state_dict().items())
    stream = io.BytesIO()
    torch.save(source.state_dict(), stream)
    stream.seek(0)
    result = target.load_state_dict(torch.load(stream))
    assert not result.missing_keys and not result.unexpected_keys
    torch.testing.assert_close(target.log_prob(y), expected)
    for twin in (copy.deepcopy(source), pickle.loads(pickle.dumps(source))):
        torch.testing.assert_close(twin.log_prob(y), expected)
        assert set(twin.state_dict()) == set(source.state_dict())
    moved = copy.deepcopy(source).double()
    assert all(not b.is_floating_point() or b.dtype == torch.float64 for b in moved.buffers())
    found = moved.log_prob(y.double())
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), expected, atol=1e-3, rtol=1e-4)
    assert moved.sample((2,)).dtype == torch.float64


def test_constants_are_the_flows_own():
    mean = torch.zeros(2)
    normal, affine = dist.Normal(mean, 1.0), stock.AffineTransform(mean, 2.0)
    flow = Flow(normal, affine)
    flow.load_state_dict({k: v + 1.0 for k, v in flow.state_dict().items()})
    flow.double()
    assert torch.equal(normal.loc, mean) and normal.loc.dtype == affine.loc.dtype == torch.float32
    assert not mean.any()
    assert constraints.positive.lower_bound == 0.0


def test_parameters_of_a_base_are_trained_saved_and_moved():
    loc, log_scale = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    free = torch.zeros(2, requires_grad=True)
    flow = Flow(dist.Normal(loc, 1.0), stock.AffineTransform(free, 1.0))
    assert {id(p) for p in flow.parameters()} == {id(loc), id(free)}
    data, optimizer = torch.tensor([[3.0, -1.0]]), torch.optim.SGD(flow.parameters(), 0.25)
    for _ in range(40):
        optimizer.zero_grad()
        (-flow.log_prob(data).sum()).backward()
        optimizer.step()
        flow.log_prob(data)  # the memory of a distribution is no memory of old values
    torch.testing.assert_close(loc + free, data[0], atol=1e-3, rtol=0)
    torch.testing.assert_close(flow.log_prob(data), torch.tensor([-math.log(2 * math.pi)]))
    copy.deepcopy(flow)
    assert flow.double().log_prob(data.double()).dtype == torch.float64
    with pytest.raises(ValueError, match="scale was computed from parameters.*Pass the module"):
        Flow(dist.Normal(torch.zeros(2), log_scale.exp()), T.permute(2))


def test_another_flow_as_base():
    inner = pf.realnvp(2, num_transforms=2, hidden_dims=[4])
    for base in (inner(), inner):
        outer = Flow(base, [T.elementwise_affine(2)])
        assert {id(p) for p in inner.parameters()} < {id(p) for p in outer.parameters()}
        y = torch.randn(5, 2)
        torch.testing.assert_close(outer.log_prob(y), inner.log_prob(y))
        outer.log_prob(y).sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in inner.parameters())
    learnable = Flow(pf.bases.DiagonalNormal(2), T.elementwise_affine(2))
    with pytest.raises(ValueError, match="a flow itself"):
        Flow(learnable(), T.permute(2))
    assert len(list(Flow(learnable, T.permute(2)).parameters())) == 3


def test_constants_and_bounds_compile_to_one_graph():
    flow = Flow(
        dist.Normal(numbers(0, 2), numbers(1, 2)),
        [stock.AffineTransform(numbers(2, 2), 2.0), biject_to(constraints.interval(-5.0, 5.0))],
    )
    y = flow.sample((4,))
    compiled = torch.compile(flow.log_prob, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(y), flow.log_prob(y))
    torch._dynamo.reset()
