"""Permutations, linear maps and transforms without parameters, against closed forms."""

import copy

import pyro.distributions as dist
import pyro.distributions.transforms as stock
import pytest
import torch
import torch.nn.functional as F
from cases import disturb

import pyroflows.transforms as T
from pyroflows.bijection import Bijection

D = 4


def away(transform, seed=0, scale=0.4):
    """In float64, with every parameter away from its start."""
    disturb(transform.double(), torch.Generator().manual_seed(seed), scale)
    return transform


def normal(shape):
    zeros = torch.zeros(shape, dtype=torch.float64)
    return dist.Normal(zeros, torch.ones_like(zeros)).to_event(len(zeros.shape))


def matrix(transform, size=D):
    """The transform's matrix, column by column."""
    with torch.no_grad():
        return (
            transform._call(torch.eye(size).double()) - transform._call(torch.zeros(size).double())
        ).mT


def test_permute_picks_entries():
    x = torch.randn(3, 5)
    order = torch.tensor([3, 1, 4, 0, 2])
    t = T.permute(5, order)
    assert torch.equal(t(x), x[:, order])
    assert torch.equal(t.inv(t._call(x)), x)
    assert torch.equal(t.log_abs_det_jacobian(x, t(x)), torch.zeros(3))
    assert torch.equal(T.reverse(5)(x), x.flip(-1))
    rows = torch.randn(2, 3, 4)
    assert torch.equal(T.permute((3, 4), [2, 0, 1], dim=-2)(rows), rows[:, [2, 0, 1]])
    assert torch.equal(T.reverse(3, dim=-2)(rows), rows.flip(-2))


def test_random_permutation_is_saved():
    torch.manual_seed(1)
    t, other = T.permute(50), T.permute(50)
    assert not torch.equal(t.permutation, other.permutation)
    other.load_state_dict(t.state_dict())
    x = torch.randn(2, 50)
    assert torch.equal(t(x), other(x)) and torch.equal(other.inv(t._call(x)), x)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: T.permute(3, [0, 0, 1]), "one of 0..2"),
        (lambda: T.permute(3, [0, 1]), "one of 0..2"),
        (lambda: T.permute(3, dim=0), "negative"),
        (lambda: T.permute((3, 4), dim=-3), "-dim axes|3 axes"),
        (lambda: T.linear(0), "positive"),
        (lambda: T.householder(3, 0), "positive"),
        (lambda: T.matrix_exponential(3, bound=-1.0), "positive"),
        (lambda: T.matrix_exponential(3, normalization="weight"), "'none'"),
        (lambda: T.iterated(0, T.planar, 2), "positive"),
        (lambda: T.lower_cholesky_affine(2, loc=torch.zeros(3)), "loc of shape"),
        (lambda: T.lower_cholesky_affine(2, scale_tril=-torch.eye(2)), "diag"),
        (lambda: T.conditional_linear(3, 0), "context_dim"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "name",
    ["linear", "actnorm", "batchnorm", "householder", "matrix_exponential", "planar", "sylvester"],
)
def test_unknown_keywords_are_refused(name):
    with pytest.raises(TypeError, match="unexpected"):
        getattr(T, name)(3, bogus=1)


def test_linear_is_the_product_of_its_factors():
    t = away(T.linear(D, permutation=[2, 0, 3, 1]))
    entries = t.entries.theta[0]
    lower = entries.tril(-1) + torch.eye(D)
    upper = entries.triu(1) + torch.diag(
        torch.exp(entries.diagonal() / (1 + (entries.diagonal() / 16) ** 2).sqrt())
    )
    expected = torch.eye(D).double()[[2, 0, 3, 1]] @ lower @ upper
    torch.testing.assert_close(matrix(t), expected)


@pytest.mark.parametrize("make", [T.linear, T.matrix_exponential, T.lower_cholesky_affine])
def test_density_is_that_of_the_normal(make):
    """A linear map of standard normal noise is N(loc, A Aᵀ), whose density is known."""
    t = away(make(D))
    a, loc = matrix(t), t._call(torch.zeros(D).double())
    y = torch.randn(7, D).double()
    got = dist.TransformedDistribution(normal(D), [t]).log_prob(y)
    expected = torch.distributions.MultivariateNormal(loc, a @ a.mT).log_prob(y)
    torch.testing.assert_close(got, expected)


def test_lower_cholesky_affine_starts_as_given():
    loc, a = torch.randn(3).double(), torch.randn(3, 3).double()
    scale_tril = torch.linalg.cholesky(a @ a.mT + 0.1 * torch.eye(3))
    t = T.lower_cholesky_affine(3, loc=loc, scale_tril=scale_tril)
    torch.testing.assert_close(t.loc, loc)
    torch.testing.assert_close(t.scale_tril, scale_tril)
    y, x = torch.randn(2, 5, 3).double()
    stock_transform = stock.LowerCholeskyAffine(loc, scale_tril)
    torch.testing.assert_close(t(x), stock_transform(x))
    torch.testing.assert_close(t.inv(y), stock_transform.inv(y))


def test_lower_cholesky_affine_with_context_has_a_matrix_for_each():
    t = away(T.conditional_lower_cholesky_affine(3, 2, [8]))
    c = torch.randn(5, 2).double()
    view = t.condition(c)
    assert view.loc.shape == (5, 3) and view.scale_tril.shape == (5, 3, 3)
    expected = torch.distributions.MultivariateNormal(view.loc, scale_tril=view.scale_tril)
    y = torch.randn(4, 5, 3).double()
    torch.testing.assert_close(
        dist.TransformedDistribution(normal(3), [view]).log_prob(y), expected.log_prob(y)
    )


@pytest.mark.parametrize("count, determinant", [(1, -1.0), (2, 1.0), (3, -1.0), (4, 1.0)])
def test_householder_is_orthogonal(count, determinant):
    t = away(T.householder(D, count), scale=1.0)
    q = matrix(t)
    torch.testing.assert_close(q @ q.mT, torch.eye(D).double())
    torch.testing.assert_close(torch.linalg.det(q).item(), determinant)
    start = matrix(T.householder(D, count).double())
    is_identity = torch.allclose(start, torch.eye(D).double())
    assert is_identity == (count % 2 == 0)


def test_householder_survives_a_zero_vector():
    t = T.householder(3, 1)
    with torch.no_grad():
        t.normals.theta.zero_()
    x = torch.randn(2, 3)
    loss = t(x).square().sum()
    loss.backward()
    assert torch.equal(t(x), x) and t.normals.theta.grad.isfinite().all()


def test_matrix_exponential_is_bounded():
    t = T.matrix_exponential(3, bound=2.0).double()
    with torch.no_grad():
        t.weights.theta.copy_(1e3 * torch.randn(1, 3, 3))
    assert torch.linalg.matrix_norm(matrix(t, 3), 2) < torch.tensor(2.0).exp()
    small = T.matrix_exponential(3).double()
    m = 0.1 * torch.randn(3, 3).double()
    with torch.no_grad():
        small.weights.theta.copy_(m)
    torch.testing.assert_close(matrix(small, 3), torch.matrix_exp(m), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("context_dim", [0, 2])
def test_channel_permute_is_a_convolution(context_dim):
    if context_dim:
        t = T.conditional_generalized_channel_permute(context_dim, 3, [8])
    else:
        t = T.generalized_channel_permute(channels=3)
    t = away(t).condition(torch.randn(context_dim).double())
    pixels = torch.eye(3).double().view(3, 3, 1, 1)
    filters = t._call(pixels).view(3, 3).mT
    x = torch.randn(2, 5, 3, 6, 4).double()
    y, log_det = t.forward_and_log_det(x)
    expected = F.conv2d(x.flatten(0, 1), filters.view(3, 3, 1, 1)).view_as(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(log_det, (24 * torch.linalg.slogdet(filters)[1]).expand(2, 5))
    with pytest.raises(ValueError, match="3 entries along dim -3"):
        t(torch.randn(4, 6, 4).double())


def test_channel_permute_starts_as_a_permutation():
    t = T.generalized_channel_permute(channels=5, permutation=[4, 2, 0, 1, 3])
    x = torch.randn(2, 5, 3, 3)
    assert torch.equal(t(x), x[:, [4, 2, 0, 1, 3]])


def test_iterated_makes_distinct_parts():
    t = T.iterated(3, T.planar, 2)
    assert len(t) == 3 and len({id(p) for p in t.parameters()}) == 3


CONDITIONAL = {
    "householder": ((3, 2, [8], 2), (3,)),
    "linear": ((3, 2, [8]), (3,)),
    "matrix_exponential": ((3, 2, [8], 8, "none", 4.0), (3,)),
    "generalized_channel_permute": ((2, 3, [8]), (3, 4, 4)),
    "planar": ((3, 2, [8]), (3,)),
    "radial": ((3, 2, [8]), (3,)),
    "sylvester": ((3, 2, [8], 2), (3,)),
    "actnorm": ((3, 2, [8]), (3,)),
    "conv_coupling": ((2, 2, [8]), (2, 4, 4)),
}


@pytest.mark.parametrize("name", CONDITIONAL)
def test_conditional_factories_take_pyros_positional_arguments(name):
    arguments, event = CONDITIONAL[name]
    t = getattr(T, f"conditional_{name}")(*arguments)
    assert isinstance(t, Bijection) and t.context_dim == 2
    wider = [[16] if a == [8] else a for a in arguments]
    sizes = [
        sum(p.numel() for p in f.parameters())
        for f in (t, getattr(T, f"conditional_{name}")(*wider))
    ]
    assert sizes[0] < sizes[1]
    x = torch.randn(5, *event)
    assert t.condition(torch.randn(5, 2))(x).shape == x.shape


FUNC = {
    "linear": lambda c: T.linear(3, [8], context_dim=c),
    "lower_cholesky_affine": lambda c: T.lower_cholesky_affine(3, [8], context_dim=c),
    "householder": lambda c: T.householder(3, 2, hidden_dims=[8], context_dim=c),
    "matrix_exponential": lambda c: T.matrix_exponential(3, hidden_dims=[8], context_dim=c),
    "actnorm": lambda c: T.actnorm(3, [8], context_dim=c),
    "batchnorm": lambda c: T.batchnorm(3, hidden_dims=[8], context_dim=c).eval(),
    "planar": lambda c: T.planar(3, [8], context_dim=c),
    "radial": lambda c: T.radial(3, [8], context_dim=c),
    "sylvester": lambda c: T.sylvester(3, hidden_dims=[8], context_dim=c),
}


@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize("name", FUNC)
def test_torch_func_gives_the_jacobian(name, context_dim):
    t = away(FUNC[name](context_dim)).condition(torch.randn(context_dim).double())
    x = torch.randn(4, 3).double()
    y, log_det = t.forward_and_log_det(x)
    forward = torch.func.vmap(torch.func.jacrev(t._call))(x)
    backward = torch.func.vmap(torch.func.jacrev(t._inverse))(y.detach())
    torch.testing.assert_close(torch.linalg.slogdet(forward)[1], log_det)
    torch.testing.assert_close(backward, torch.linalg.inv(forward), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", sorted(set(FUNC) - {"batchnorm", "actnorm"}))
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_finite_in_float32_for_large_parameters_and_values(name, scale):
    t = FUNC[name](0)
    with torch.no_grad():
        for p in t.parameters():
            p.copy_(scale * torch.randn_like(p))
    x = torch.logspace(-2, 6, 50)[:, None] * torch.randn(50, 3)
    for move in (t.forward_and_log_det, t.inverse_and_log_det):
        value, log_det = move(x)
        assert value.isfinite().all() and log_det.isfinite().all()
        (value / (1 + value.detach().abs())).sum().backward()
        assert all(p.grad.isfinite().all() for p in t.parameters())


@pytest.mark.parametrize(
    "name, stock_transform",
    [
        ("elu", stock.ELUTransform()),
        ("exp", stock.ExpTransform()),
        ("leaky_relu", stock.LeakyReLUTransform()),
        ("sigmoid", stock.SigmoidTransform()),
        ("softplus", stock.SoftplusTransform()),
        ("tanh", stock.TanhTransform()),
        ("ordered", stock.OrderedTransform()),
    ],
)
def test_transforms_without_parameters_are_the_stock_ones(name, stock_transform):
    t = getattr(T, name)()
    assert isinstance(t, Bijection) and not list(t.parameters())
    x = torch.randn(5, 3).double()
    y = t(x)
    torch.testing.assert_close(y, stock_transform(x))
    log_det = t.log_abs_det_jacobian(x, y)
    torch.testing.assert_close(log_det, stock_transform.log_abs_det_jacobian(x, y))
    torch.testing.assert_close(copy.deepcopy(t).inv(y), x)


def test_logit_undoes_sigmoid():
    x = torch.randn(5).double()
    torch.testing.assert_close(T.logit()(T.sigmoid()(x)), x)


def test_other_names_are_pyros():
    assert T.AffineTransform is stock.AffineTransform
    assert T.LowerCholeskyAffine is stock.LowerCholeskyAffine
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = T.nothing
