"""Pyro finds what a flow's draws depend on, through every scheme, with every ELBO."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import CASES, build, contexts, noise
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO
from pyro.infer.inspect import get_dependencies, get_model_relations
from pyro.ops.provenance import extract_provenance, get_provenance, track_provenance

import pyroflows as pf
from pyroflows import bases
from pyroflows import transforms as T
from pyroflows.flow import Flow

FROM_CONTEXT, FROM_VALUE = frozenset({"context"}), frozenset({"value"})


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize("name", CASES)
def test_tracked_values_pass_through(name, context_dim, grad):
    if context_dim and not CASES[name].takes_context:
        pytest.skip("no context")
    t, y, context = build(name, context_dim), noise(name, 3), contexts(context_dim, 3)
    y = y.abs() + 0.1 if name == "wrapped" else y
    tracked = {
        "value": (context, track_provenance(y, FROM_VALUE), FROM_VALUE),
        "context": (track_provenance(context, FROM_CONTEXT), y, FROM_CONTEXT),
    }
    if not context_dim:
        del tracked["context"]
    with torch.set_grad_enabled(grad):
        for inverse in (False, True):
            plain = t.condition(context).inv if inverse else t.condition(context)
            expected = plain.forward_and_log_det(y)
            for c, v, origin in tracked.values():
                view = t.condition(c).inv if inverse else t.condition(c)
                for got, want in zip(view.forward_and_log_det(v), expected, strict=True):
                    torch.testing.assert_close(extract_provenance(got)[0], want)
                assert get_provenance(view.forward_and_log_det(v)[0]) == origin


def mixture(flow, data):
    """Rows of one of two kinds, which the flow's context names."""

    def model():
        weights = torch.tensor([0.3, 0.7])
        with pyro.plate("rows", len(data)):
            kind = pyro.sample("kind", dist.Categorical(weights), infer={"enumerate": "parallel"})
            context = torch.nn.functional.one_hot(kind, 2).to(data.dtype)
            pyro.sample("y", flow(context), obs=data)

    return model


RECIPES = {
    "realnvp": lambda: pf.realnvp(2, 2, num_transforms=2, hidden_dims=[8]),
    "maf": lambda: pf.maf(2, 2, num_transforms=2, hidden_dims=[8]),
    "iaf": lambda: pf.iaf(2, 2, num_transforms=2, hidden_dims=[8]),
    "glow": lambda: pf.glow(2, 2, num_transforms=2, hidden_dims=[8]),
    "spline": lambda: pf.neural_spline(2, 2, num_transforms=1, hidden_dims=[8]),
    "base": lambda: Flow(bases.ConditionalNormal(2, 2, [8]), T.permute(2)),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_enumerated_and_sampled_contexts(recipe):
    torch.manual_seed(0)
    flow, data = RECIPES[recipe](), torch.randn(3, 2)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.3 * torch.randn_like(p))
    flow.eval()
    model = mixture(flow, data)
    by_kind = torch.stack([flow.log_prob(data, torch.eye(2)[k].expand(3, 2)) for k in (0, 1)])
    exact = (by_kind.detach() + torch.tensor([0.3, 0.7]).log()[:, None]).logsumexp(0).sum()
    for particles in (1, 2):
        elbo = TraceEnum_ELBO(particles, vectorize_particles=True, max_plate_nesting=1)
        assert elbo.loss(model, lambda: None) == pytest.approx(-float(exact), rel=1e-5)

    def guide():
        with pyro.plate("rows", 3):
            pyro.sample("kind", dist.Categorical(by_kind.detach().T.exp()))

    for elbo in (
        TraceGraph_ELBO(),
        TraceGraph_ELBO(2, vectorize_particles=True, max_plate_nesting=1),
        Trace_ELBO(2, vectorize_particles=True, max_plate_nesting=1),
    ):
        assert torch.isfinite(torch.tensor(SVI(model, guide, pyro.optim.Adam({"lr": 0.0}),
                                               elbo).step()))  # fmt: skip

    def prior():
        kind = pyro.sample("kind", dist.Categorical(torch.ones(2)))
        z = pyro.sample("z", flow(torch.nn.functional.one_hot(kind, 2).float()))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=torch.tensor(0.0))

    found = get_dependencies(prior)["prior_dependencies"]
    assert set(found["z"]) == {"z", "kind"} and "z" in found["x"]
    relations = get_model_relations(prior)  # what pyro.render_model draws
    assert relations["sample_sample"]["z"] == ["kind"]
    assert relations["sample_param"]["z"] == [
        key for key in pyro.get_param_store() if key.startswith("flow$$$")
    ]
