"""What a hostile reader tried: each property that was broken once, with its test."""

import copy

import pyro
import pyro.distributions.transforms as stock
import pytest
import torch
from cases import build, contexts, noise
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch.distributions import AffineTransform, ComposeTransform, IndependentTransform

import pyroflows as pf
import pyroflows.transforms as T
from pyroflows.compose import Compose, as_bijection
from pyroflows.flow import Flow
from pyroflows.training import fit

same = torch.testing.assert_close


# ------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize(
    "make",
    [
        lambda: ComposeTransform([T.affine_coupling(3, [8]), T.permute(3)]),
        lambda: stock.affine_autoregressive(3).inv,
        lambda: IndependentTransform(T.affine_coupling(3, [8]), 0),
    ],
)
def test_modules_inside_plain_transforms_keep_their_parameters(make):
    flow = copy.deepcopy(Flow(3, [make()])).double()
    assert list(flow.parameters()) and len(flow.state_dict()) > 2
    x = torch.randn(4, 3, dtype=torch.float64)
    flow.log_prob(x).sum().backward()
    assert all(p.grad is not None for p in flow.parameters())


@pytest.mark.parametrize("name", ["affine_coupling", "compose", "inverse"])
def test_a_view_is_a_part_whose_context_stays_fixed(name):
    t, c, x = build(name, 2), contexts(2, 4), noise(name, 4)
    (d,) = x.shape[1:]
    view, conditional = t.condition(c), Flow(d, [t]).double()
    same(Compose([view, T.permute(d, range(d)), view.inv])(x), x)
    for flow in (Flow(d, view), Flow(d, [T.permute(d, range(d)), view])):
        flow = copy.deepcopy(flow.double())
        assert flow().batch_shape == (4,) and flow.event_shape == (d,)
        assert flow.sample(2).shape == (2, 4, d)
        same(flow.log_prob(x[0]), conditional.log_prob(x[0], c))
        assert flow.float().sample(2).dtype == torch.float32
    other = build(name, 2)
    mixed, c2 = Flow(d, [view, other]).double(), 2 * c
    expected = Flow(d, [view, other.condition(c2)]).double()
    same(mixed.log_prob(x, c2), expected.log_prob(x))


def test_a_transform_with_a_batch_gives_a_batch():
    flow = Flow(3, [as_bijection(AffineTransform(torch.randn(4, 3), 2.0, event_dim=1))])
    assert flow().batch_shape == (4,) and flow.event_shape == (3,)
    assert flow.log_prob(torch.zeros(3)).shape == (4,)


# ---------------------------------------------------------------------------------------- contexts


def test_contexts_of_the_wrong_kind_are_named():
    flow, x = pf.realnvp(3, 2, num_transforms=1), torch.zeros(4, 3)
    for context in (torch.zeros(4, 2, dtype=torch.float64), torch.zeros(4, 2, dtype=torch.long)):
        with pytest.raises(ValueError, match="context of torch"):
            flow.log_prob(x, context)
        with pytest.raises(ValueError, match="context of torch"):
            flow.sample(3, context)
    with pytest.raises(TypeError, match="context tensor.*list"):
        flow.log_prob(x, [0.0, 0.0])
    with pytest.raises(TypeError, match="context tensor.*NoneType"):
        flow.transform.condition(None)
    with pytest.raises(TypeError, match="expects a tensor; got ndarray"):
        flow.log_prob(x.numpy(), torch.zeros(2))


# ------------------------------------------------------------------------------------------ memory


def test_a_context_changed_in_place_is_seen():
    t, c, x = build("affine_coupling", 2), contexts(2, 4), noise("affine_coupling", 4)
    view = t.condition(c)
    y = view(x)
    c.add_(1)
    same(view.inv(y), view._inverse(y))
    y = view(x)
    c.requires_grad_()
    (gradient,) = torch.autograd.grad(view.inverse_and_log_det(y)[1].sum(), c)
    assert gradient.abs().sum() > 0


def test_the_mode_changed_between_two_calls_is_seen():
    t, y = build("batchnorm").train(), noise("batchnorm", 6)
    x = t.inv(y)
    t.eval()
    same(t.inv.log_abs_det_jacobian(y, x), t.inverse_and_log_det(y.clone())[1])


# ------------------------------------------------------------------------------------ derivatives


@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize("name", ["planar", "sylvester", "affine_autoregressive"])
def test_second_derivatives_of_an_inverse(name, context_dim):
    t, y = build(name, context_dim), noise(name, 2).requires_grad_()
    view = t.condition(contexts(context_dim, 2))

    def inverse(y, *parameters):
        return view._evaluate(y, inverse=True)

    assert torch.autograd.gradgradcheck(inverse, (y, *t.parameters()), fast_mode=True)


def test_vmap_over_an_inverse_without_gradients():
    t, y = build("affine_autoregressive"), noise("affine_autoregressive", 4)
    with torch.no_grad():
        same(torch.func.vmap(t.inv)(y), t.inv(y))


# ---------------------------------------------------------------------------------- states, stores


def test_a_loaded_mask_is_used():
    source = T.affine_coupling(4, [8], mask=T.alternating_mask(4))
    with torch.no_grad():
        source.conditioner.weights.normal_()
    target, x = T.affine_coupling(4, [8]), torch.randn(3, 4)
    target.load_state_dict(source.state_dict())
    same(target(x), source(x))


def model_of(flow, data):
    def model():
        with pyro.plate("rows", len(data)):
            pyro.sample("y", flow(), obs=data)

    return SVI(model, lambda: None, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())


def test_svi_learns_parameters_that_were_replaced():
    flow, data = pf.realnvp(2, num_transforms=2, hidden_dims=[8]), 2 + torch.randn(32, 2)
    svi = model_of(flow, data)
    svi.step()
    flow.load_state_dict({k: v.clone() for k, v in flow.state_dict().items()}, assign=True)
    losses = [svi.step() for _ in range(20)]
    assert losses[-1] < losses[0]


def test_a_store_loaded_under_a_living_flow_is_used():
    flow, data = pf.realnvp(2, num_transforms=2, hidden_dims=[8]), 2 + torch.randn(32, 2)
    svi = model_of(flow, data)
    for _ in range(3):
        svi.step()
    state = copy.deepcopy(pyro.get_param_store().get_state())
    expected = flow.log_prob(data).detach().clone()
    for _ in range(3):
        svi.step()
    pyro.clear_param_store()
    pyro.get_param_store().set_state(state)
    svi.evaluate_loss()
    same(flow.log_prob(data).detach(), expected)


def test_a_stored_flow_of_another_shape_says_what_to_do():
    poutine.trace(lambda: pyro.sample("x", pf.realnvp(2, hidden_dims=[8])())).get_trace()
    with pytest.raises(RuntimeError, match="clear_param_store"):
        poutine.trace(lambda: pyro.sample("x", pf.realnvp(2, hidden_dims=[9])())).get_trace()


# ------------------------------------------------------------------------------------ bad numbers


@pytest.mark.parametrize(
    "recipe", [pf.nice, pf.realnvp, pf.glow, pf.maf, pf.iaf, pf.neural_spline]
)
def test_recipes_name_bad_sizes(recipe):
    for bad in (0, -1):
        with pytest.raises(ValueError, match="input_dim must be positive"):
            recipe(bad)
    with pytest.raises(ValueError, match="context_dim must be 0 or more"):
        recipe(2, -1)


def small():
    return pf.realnvp(2, num_transforms=1, hidden_dims=[4])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sample_weight": torch.ones(40, 1)}, r"shape \(n,\)"),
        ({"sample_weight": torch.zeros(40)}, "positive weight"),
        ({"sample_weight": torch.tensor(1.0)}, "sample_weight has 0"),
        ({"validation": (torch.zeros(0, 2),)}, "positive weight"),
        ({"validation": torch.zeros(5, 2)}, "number in .*a tuple"),
        ({"num_epochs": 0}, "positive num_epochs"),
        ({"batch_size": -5}, "positive num_epochs"),
    ],
)
def test_fit_names_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        fit(small(), torch.randn(40, 2), progress=False, **options)


def test_fit_says_that_all_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        fit(small().requires_grad_(False), torch.randn(40, 2), progress=False)


def test_fit_takes_data_with_a_graph_and_works_without_gradients():
    x = 2 * torch.randn(40, 2, requires_grad=True)
    with torch.no_grad():
        assert len(fit(small(), x, num_epochs=2, progress=False).train_loss) == 2
        assert not torch.is_grad_enabled()


def test_an_interrupt_before_the_first_score_is_no_error(monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("pyroflows.training.run.score", interrupt)
    assert fit(small(), torch.randn(40, 2), progress=False).interrupted
