"""Guides after pickle, joblib, torch.save, state_dict, deepcopy: whole, or an error that says."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import guide_models
import joblib
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import init_to_value
from torch import nn

from pyroflows import AmortizedFlow, AutoFlow, PathGradientELBO, diagnose, fit_guide, flow_mcmc
from pyroflows import transforms as T
from pyroflows.guides.prefit import Gaussian

HERE = Path(__file__).parent
WAYS = ("pickle", "joblib", "torch", "state")


def answers(guide, values, data):
    """What a guide says with its parameters, and the same seed."""
    guide.setup(*data)
    pyro.set_rng_seed(0)
    found = {f"median {k}": v for k, v in guide.median(*data).items()}
    found |= {f"drawn {k}": v.detach() for k, v in guide(*data).items()}
    with poutine.block():
        trace = poutine.trace(poutine.condition(guide, data=values)).get_trace(*data)
    return {**found, "log q": trace.log_prob_sum().detach()}


def save(guide, folder, name):
    (folder / f"{name}.pickle").write_bytes(pickle.dumps(guide))
    joblib.dump(guide, folder / f"{name}.joblib")
    torch.save(guide, folder / f"{name}.torch")
    torch.save(guide.state_dict(), folder / f"{name}.state")


def load(folder, name, way, make):
    path = folder / f"{name}.{way}"
    if way == "pickle":
        return pickle.loads(path.read_bytes())
    if way == "joblib":
        return joblib.load(path)
    if way == "torch":
        return torch.load(path, weights_only=False)
    guide = make()
    guide.load_state_dict(torch.load(path))
    return guide


def test_saved_guides_are_whole_in_a_new_process(tmp_path):
    data = guide_models.regression_data()
    guide = guide_models.make_regression_guide()
    guide.setup(*data).place(Gaussian(torch.tensor([2.0, -1.0, 0.5]), 0.1 * torch.eye(3)))
    local, rows = guide_models.make_factor_guide(), (torch.randn(6, 2),)
    local.setup(*rows)
    with torch.no_grad():
        for parameter in (*guide.parameters(), *local.parameters()):
            parameter.add_(0.1 * torch.randn_like(parameter))
    expected = {}
    for name, g, d in (("shared", guide, data), ("local", local, rows)):
        save(g, tmp_path, name)
        values = {k: v.detach() for k, v in g(*d).items()}
        expected[name] = (d, values, answers(g, values, d))
    torch.save(expected, tmp_path / "expected.pt")
    paths = [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-W", "error", __file__, str(tmp_path)]
    subprocess.run(command, check=True, env=environment)


def in_a_new_process(folder):
    """Load in every way; compare, diagnose, sample, and go on fitting."""
    expected = torch.load(folder / "expected.pt")
    makers = {
        "shared": (guide_models.make_regression_guide, guide_models.regression),
        "local": (guide_models.make_factor_guide, guide_models.factor_model),
    }
    for name, (data, values, said) in expected.items():
        make, model = makers[name]
        for way in WAYS:
            pyro.clear_param_store()
            guide = load(folder, name, way, make)
            for key, value in answers(guide, values, data).items():
                torch.testing.assert_close(
                    value, said[key], msg=lambda m, at=(name, way, key): f"{at}: {m}"
                )
            diagnose(model, guide, *data, num_samples=50, search=False)
            if name == "shared":
                flow_mcmc(model, guide, *data, num_samples=6, num_chains=2, warmup_steps=1)
                guide.sample_posterior(3, *data)
            fit_guide(model, guide, *data, num_steps=2, num_particles=2)
            SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO()).step(*data)


@pytest.mark.parametrize("way", ["pickle", "state", "before setup", "store"])
def test_guides_of_the_first_layout_load(way):
    """Vector and fixed map had other places and another order; numbers are the same."""
    saved = torch.load(HERE / "data" / "guide-v1.pt", weights_only=False)
    data, guide = guide_models.regression_data(), guide_models.make_regression_guide()
    if way == "pickle":
        guide = pickle.loads(saved["pickle"])
    elif way == "state":
        guide.setup(*data).load_state_dict(saved["state"])
    elif way == "before setup":
        guide.load_state_dict(saved["state"])
    else:
        pyro.get_param_store().set_state(saved["store"])
    u, log_det = guide.setup(*data).get_transform().forward_and_log_det(saved["z"])
    torch.testing.assert_close(u, saved["u"])
    torch.testing.assert_close(log_det, saved["log_det"])
    assert [n for n, _ in guide.named_parameters()] == ["packed"]
    again = guide_models.make_regression_guide().setup(*data)
    again.load_state_dict(guide.state_dict())
    torch.testing.assert_close(again.transport(saved["z"]), u)


@pytest.mark.parametrize("full_rank", [True, False])
def test_the_first_layout_is_read_as_it_was_written(full_rank):
    """u = mu + W (b + A f(z)) with every number given, f the reversal of features."""

    def model():
        pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    b, log_diag, rest = torch.randn(3), torch.randn(3), torch.randn(3)
    loc, scale = torch.randn(3), torch.randn(3, 3).tril(-1) + torch.tensor([1.0, 2.0, 0.5]).diag()
    a = log_diag.exp().diag()
    if full_rank:
        a[[1, 2, 2], [0, 0, 1]] = rest
    else:
        scale = scale.diagonal()
    state = {
        "packed": torch.cat([b, log_diag, rest] if full_rank else [b, log_diag]),
        "transport.loc": loc,
        "transport.scale": scale,
        "transport.base_weights": torch.tensor([0.25, 0.75]).log(),
        "transport.base_locs": torch.randn(2, 3),
        "transport.base_scales": torch.eye(3).expand(2, 3, 3),
    }
    guide = AutoFlow(model, flow=lambda dim: T.reverse(dim), full_rank=full_rank).setup()
    fresh = guide.state_dict()
    inner = "parts.0.bijection.parts.0"
    state |= {k.replace(inner, "flow"): v for k, v in fresh.items() if f".{inner}." in k}
    state["site_names"] = fresh["site_names"]
    guide.load_state_dict(state)
    z = torch.randn(5, 3)
    v = z.flip(-1) @ a.T + b
    expected = loc + (v @ scale.T if full_rank else v * scale)
    torch.testing.assert_close(guide.transport(z), expected)
    assert torch.equal(guide.noise.mixture.locs, state["transport.base_locs"])
    assert guide.get_base_dist().sample((4,)).shape == (4, 3)


def test_a_guide_whose_model_cannot_be_saved_says_so_and_takes_it_back():
    def model(x):
        top = pyro.sample("top", dist.LogNormal(0.0, 1.0))
        pyro.sample("below", dist.Uniform(0.0, top))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(top, 1.0), obs=x)

    x = torch.randn(5)
    guide = AutoFlow(model, init_loc_fn=lambda site: torch.tensor(0.5)).setup(x)
    guide.place(Gaussian(torch.tensor([0.3, -0.4]), 0.1 * torch.eye(2)))
    restored = pickle.loads(pickle.dumps(guide))
    assert guide.attached and not restored.attached
    for use in (lambda: restored.model, lambda: restored(x), lambda: restored.density(x)):
        with pytest.raises(RuntimeError, match=r"guide\.attach\(model\)"):
            use()
    diagnose(model, restored, x, num_samples=50, search=False)  # takes both, and gives it back
    assert restored.attached
    restored = pickle.loads(pickle.dumps(guide)).attach(model)
    draws = guide.sample_posterior(5, x)
    torch.testing.assert_close(restored.log_prob(draws, x), guide.log_prob(draws, x))


def test_a_pickle_holds_no_data():
    def model(x):
        m = pyro.sample("m", dist.Normal(x.mean(), 1.0))
        pyro.sample("x", dist.Normal(m, 1.0).expand([len(x)]).to_event(1), obs=x)

    sizes = [len(pickle.dumps(AutoFlow(model).setup(torch.randn(n)))) for n in (10, 100_000)]
    assert sizes[1] < sizes[0] + 1000


def test_functions_that_a_pickle_cannot_name():
    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0).expand([3]).to_event(1))

    unseen = AutoFlow(model, flow=lambda dim: dist.transforms.iterated(1, _affine, dim))
    with pytest.raises(pickle.PicklingError, match=r"flow=.*guide.setup"):
        pickle.dumps(unseen)
    assert pickle.loads(pickle.dumps(unseen.setup())).median()["x"].shape == (3,)
    plates = AutoFlow(model, create_plates=lambda: []).setup()
    restored = pickle.loads(pickle.dumps(plates)).attach(model)
    with pytest.raises(RuntimeError, match="create_plates could not be saved"):
        restored()
    restored.create_plates = lambda: []
    assert restored()["x"].shape == (3,)


def _affine(dim):
    return dist.transforms.affine_autoregressive(dim)


def test_state_for_a_guide_that_has_not_seen_its_model():
    x, y = guide_models.regression_data()
    guide = guide_models.make_regression_guide().setup(x, y)
    guide.place(Gaussian(torch.tensor([2.0, -1.0, 0.5]), 0.1 * torch.eye(3)))
    fresh = guide_models.make_regression_guide()
    fresh.load_state_dict(guide.state_dict())
    for use in (fresh.median, fresh.setup, fresh, lambda: fresh.sample_posterior(3)):
        with pytest.raises(TypeError, match=r"not seen its model yet.*guide\.setup\(\*args\)"):
            use()
    assert fresh.state_dict().keys() == guide.state_dict().keys()  # saved once more, nothing lost
    twin = copy.deepcopy(fresh)
    expected = guide.median(x, y)
    for other in (fresh, twin):
        torch.testing.assert_close(other.median(x, y), expected)
    other = AutoFlow(lambda: pyro.sample("x", dist.Normal(0.0, 1.0)))
    other.load_state_dict(guide.state_dict())
    for _ in range(2):  # no second call takes the start for the state
        with pytest.raises(RuntimeError, match="a guide for the latents .*slope.* is for .*x"):
            other.setup()


def _two(first, second, batch=()):
    def model():
        pyro.sample(first, dist.Normal(0.0, 1.0).expand(batch).to_event(len(batch)))
        pyro.sample(second, dist.LogNormal(0.0, 1.0))

    return model


@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize(
    "model", [_two("a", "c"), _two("b", "a"), _two("a", "b", (1,))], ids=["name", "order", "shape"]
)
def test_a_state_of_another_model_is_refused(model, seen, tmp_path):
    guide = AutoFlow(_two("a", "b")).setup()
    guide.place(Gaussian(torch.tensor([2.0, -1.0]), 0.1 * torch.eye(2)))
    old = {k: v for k, v in guide.state_dict().items() if k != "site_names"}
    AutoFlow(_two("a", "b")).setup().load_state_dict(old)  # from before there were names
    other = AutoFlow(model)
    if seen:
        before = {k: v.clone() for k, v in other.setup().state_dict().items()}
    with pytest.raises(RuntimeError, match="load it into a guide of the model"):
        other.load_state_dict(guide.state_dict())
        other.setup()
    if seen:
        assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())
    SVI(_two("a", "b"), guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step()
    pyro.get_param_store().save(tmp_path / "store.pt")
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store.pt")
    with pytest.raises(RuntimeError, match="load it into a guide of the model"):
        AutoFlow(model).setup()
    AutoFlow(_two("a", "b")).setup()


def test_amortized_states_of_another_model_are_refused():
    def other(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("w", dist.Normal(0.0, pyro.sample("scale", dist.LogNormal(0.0, 0.5))))
            likelihood = dist.Normal(z.unsqueeze(-1), 0.5).expand([*z.shape, 2]).to_event(1)
            pyro.sample("x", likelihood, obs=x)

    guide = guide_models.make_factor_guide().setup(torch.randn(6, 2))
    same, strange = guide_models.make_factor_guide(), AmortizedFlow(other, nn.Linear(2, 4), 4)
    same.setup(torch.randn(4, 2)).load_state_dict(guide.state_dict())  # whatever the rows
    with pytest.raises(RuntimeError, match="load it into a guide of the model"):
        strange.setup(torch.randn(6, 2)).load_state_dict(guide.state_dict())


def test_amortized_state_before_the_model_was_seen_and_pickle():
    x = torch.randn(6, 2)
    guide = guide_models.make_factor_guide().setup(x)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    fresh = guide_models.make_factor_guide()
    fresh.load_state_dict(guide.state_dict())
    for other in (fresh, pickle.loads(pickle.dumps(guide)), copy.deepcopy(guide)):
        other.setup(x)
        pyro.set_rng_seed(0)
        expected = guide.median(x)
        pyro.set_rng_seed(0)
        torch.testing.assert_close(other.median(x), expected)


@pytest.mark.parametrize("elbo", [Trace_ELBO, PathGradientELBO])
@pytest.mark.parametrize("kind", ["shared", "local"])
def test_local_parameters(elbo, kind):
    if kind == "shared":
        model, make = guide_models.regression, guide_models.make_regression_guide
        data = guide_models.regression_data()
    else:
        model, make = guide_models.factor_model, guide_models.make_factor_guide
        data = (torch.randn(6, 2),)
    with pyro.settings.context(module_local_params=True):
        guide, other = make(), make()
        other.setup(*data)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo(max_plate_nesting=1))
        guide.setup(*data)
        before = {k: v.clone() for k, v in guide.state_dict().items()}
        svi.step(*data)
        after = guide.state_dict()
        assert any(not torch.equal(before[k], after[k]) for k in before)
        assert not pyro.get_param_store().keys()
        loss = Trace_ELBO(max_plate_nesting=1)(model, other)
        loss(*data).backward()
        assert all(p.grad is not None for p in other.parameters() if p.requires_grad)
        for new in (pickle.loads(pickle.dumps(guide)), make()):
            new.load_state_dict(guide.state_dict())
            new.setup(*data)
            pyro.set_rng_seed(0)
            expected = guide.median(*data)
            pyro.set_rng_seed(0)
            torch.testing.assert_close(new.median(*data), expected)
        Predictive(model, guide=guide, num_samples=3, parallel=True)(*data)


@pytest.mark.parametrize("local_params", [False, True])
def test_rows_of_a_subsampled_plate_are_saved(local_params, tmp_path):
    y = torch.randn(12)

    def model():
        mu = pyro.sample("net.mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 12, subsample_size=4) as rows:
            t = pyro.sample("net.t", dist.LogNormal(mu, 1.0))
            pyro.sample("y", dist.Normal(t, 0.5), obs=y[rows])

    with pyro.settings.context(module_local_params=local_params):
        guide, elbo = AutoFlow(model), Trace_ELBO(max_plate_nesting=1)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), elbo)
        for _ in range(3):
            svi.step()
        values = guide.sample_posterior(5)
        expected = guide.log_prob(values)
        fresh = AutoFlow(model)
        fresh.load_state_dict(guide.state_dict())
        copies = [fresh, pickle.loads(pickle.dumps(guide)), copy.deepcopy(guide)]
        if not local_params:
            pyro.get_param_store().save(tmp_path / "store.pt")
            pyro.clear_param_store()
            pyro.get_param_store().load(tmp_path / "store.pt")
            copies.append(AutoFlow(model).setup())
        for other in copies:
            torch.testing.assert_close(other.log_prob(values), expected)
            SVI(model, other, pyro.optim.Adam({"lr": 0.05}), elbo).step()


def test_copies_do_not_need_a_graph_free_model():
    net = nn.Linear(1, 1)

    def model(x):
        pyro.module("net", net)
        a = pyro.sample("a", dist.Normal(net(x).mean(), 1.0))
        pyro.sample("y", dist.Normal(a, 1.0), obs=torch.tensor(0.3))
        return a + net(x)

    x = torch.randn(4, 1)
    guide = AutoFlow(model, init_loc_fn=init_to_value(values={"a": torch.tensor(0.2)}))
    guide(x)
    for other in (copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))):
        torch.testing.assert_close(other.median(x), guide.median(x))


def test_a_guide_list_can_be_copied_with_its_parts():
    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 3):
            pyro.sample("y", dist.Normal(0.0, 1.0))

    guide = pyro.infer.autoguide.AutoGuideList(model)
    guide.append(AutoFlow(poutine.block(model, hide=["y"])))
    guide.append(AutoFlow(poutine.block(model, expose=["y"])))
    guide()
    twin = copy.deepcopy(guide)
    torch.testing.assert_close(twin.median(), guide.median())
    assert all(part.master() is twin for part in twin)


def test_encoder_inputs_that_a_pickle_cannot_name():
    data = torch.randn(6, 2)
    inputs = lambda x: x  # noqa: E731
    guide = AmortizedFlow(guide_models.factor_model, nn.Linear(2, 4), 4, inputs=inputs).setup(data)
    restored = pickle.loads(pickle.dumps(guide))
    with pytest.raises(RuntimeError, match="inputs could not be saved"):
        restored(data)


if __name__ == "__main__":
    in_a_new_process(Path(sys.argv[1]))
