"""Parameters as parts of one vector: the same map, with one tensor for the optimizer."""

import copy

import pyro
import pytest
import torch
from cases import CASES, build, contexts, noise

from pyroflows import Flow
from pyroflows import transforms as T
from pyroflows.compose import Compose
from pyroflows.guides.transport import Whitening
from pyroflows.packed import Packed


@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize("name", [n for n in CASES if n != "packed"])
def test_the_map_is_that_of_any_bijection(name, context_dim):
    plain, c, x = build(name, context_dim), contexts(context_dim, 4), noise(name, 4)
    count = sum(p.numel() for p in plain.parameters())
    packed = Packed(copy.deepcopy(plain)).eval()
    sizes = {n: p.numel() for n, p in packed.named_parameters()}
    assert sizes == ({"vector": count} if count else {})
    for ours, own in ((packed, plain), (packed.inv, plain.inv)):
        for found, expected in zip(
            ours.condition(c).forward_and_log_det(x),
            own.condition(c).forward_and_log_det(x),
            strict=True,
        ):
            assert torch.equal(found, expected)
    assert packed.calls == plain.calls and packed.context_dim == plain.context_dim


def test_units_scale_steps_and_not_the_map():
    first, second = T.affine_coupling(3, [4]), T.lower_cholesky_affine(3)
    chain = Compose([first, second])
    for p in chain.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x, sizes = torch.randn(5, 3), [sum(p.numel() for p in t.parameters()) for t in (first, second)]
    gradients = torch.autograd.grad(chain(x).square().sum(), list(chain.parameters()))
    expected = torch.cat([g.flatten() for g in gradients])
    y = chain(x).detach()
    packed = Packed(chain, units={first: 0.5})
    torch.testing.assert_close(packed(x), y)
    packed(x).square().sum().backward()
    torch.testing.assert_close(packed.vector.grad[: sizes[0]], 0.5 * expected[: sizes[0]])
    torch.testing.assert_close(packed.vector.grad[sizes[0] :], expected[sizes[0] :])
    leaves = packed.leaves(packed.vector)
    assert [(len(leaf), unit) for leaf, unit in leaves] == [(sizes[0], 0.5), (sizes[1], 1.0)]
    view = packed.at([leaf for leaf, _ in leaves])
    view(x).square().sum().backward()
    torch.testing.assert_close(torch.cat([leaf.grad for leaf, _ in leaves]), packed.vector.grad)
    with torch.no_grad():
        leaves[1][0].zero_()  # the leaf's memory is the vector's
    torch.testing.assert_close(packed(x), view(x))
    assert not torch.equal(packed(x), y)
    assert [p.numel() for p in packed.parts_of(second, packed.vector)] == [sizes[1]]


def test_a_vector_given_away_and_one_lent():
    packed = Packed(T.affine_coupling(2, [4]))
    x, vector = torch.randn(3, 2), packed.release()
    assert not list(packed.parameters())
    with pytest.raises(RuntimeError, match=r"call \.at\(vector\)"):
        packed(x)
    other = torch.randn_like(vector).requires_grad_()
    y = packed.at(other)(x)
    y.sum().backward()
    assert other.grad.abs().max() > 0
    assert torch.equal(packed.at(vector)(x), x) and not torch.equal(y, x)


def test_tied_frozen_and_buffered_stay_what_they_are():
    tied = T.affine_coupling(2, [4])
    chain = Compose([tied, T.reverse(2), tied, T.actnorm(2)])
    chain.parts[3].requires_grad_(False)
    count = sum(p.numel() for p in tied.parameters())
    packed = Packed(chain)
    assert len(packed.vector) == count
    assert {n for n, _ in packed.named_buffers()} >= {"bijection.parts.3.initialized"}
    frozen = [n for n, p in packed.named_parameters() if not p.requires_grad]
    assert frozen == ["bijection.parts.3.affine.theta"]
    mixed = Compose([T.affine_coupling(2, [4]), T.affine_coupling(2, [4]).double()])
    with pytest.raises(ValueError, match="one dtype on one device"):
        Packed(mixed)


def test_one_message_and_one_name_in_pyro():
    flow = Flow(2, [Packed(Compose([T.affine_coupling(2, [4]) for _ in range(3)]))], name="q")
    trace = pyro.poutine.trace(lambda: pyro.sample("x", flow())).get_trace()
    assert trace.param_nodes == ["q$$$transform.parts.0.vector"]


@pytest.mark.parametrize("full_rank", [True, False])
def test_whitening_is_its_formula(full_rank):
    loc = torch.randn(3).double()
    scale = torch.randn(3, 3).double().tril(-1) + torch.tensor([0.5, 2.0, 3.0]).double().diag()
    matrix = scale if full_rank else scale.diagonal().diag()
    t = Whitening(loc, scale if full_rank else scale.diagonal())
    v = torch.randn(4, 3).double()
    u = v @ matrix.T + loc
    for found, expected in zip(
        (*t.forward_and_log_det(v), *t.inverse_and_log_det(u)),
        (u, matrix.logdet().expand(4), v, -matrix.logdet().expand(4)),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)
    assert not list(t.parameters()) and set(t.state_dict()) == {"loc", "scale"}
    other = Whitening(torch.zeros(3).double(), torch.ones_like(t.scale))
    other.fill(loc, scale)
    sds = (scale @ scale.T).diagonal().sqrt()
    torch.testing.assert_close(other.scale, scale if full_rank else sds)
