"""Pyro's parameter store: what is saved is the whole flow, and a name has one owner."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule
from torch import nn

import pyroflows as pf
from pyroflows import store
from pyroflows import transforms as T
from pyroflows.flow import Flow
from pyroflows.guides import AmortizedFlow, AutoFlow
from pyroflows.guides.prefit import Gaussian

DATA = torch.tensor([[1.0, 2.0, -1.0], [0.5, 3.0, -2.0], [2.0, 2.5, -0.5], [1.5, 3.5, -3.0]])
COUNTS = torch.tensor([11.0, 12.0, 10.0])


class Frozen(nn.Module):
    """A flow among others in a module of the user's, with a part that is not trained."""

    def __init__(self):
        super().__init__()
        self.flow = Flow(3, [T.elementwise_affine(3), T.affine_coupling(3, [4])], name="frozen")
        with torch.no_grad():
            self.flow.transform.parts[0].conditioner.theta.normal_()
        self.flow.transform.parts[0].requires_grad_(False)


class Owner(PyroModule):
    """A flow as an attribute, another two levels down."""

    def __init__(self):
        super().__init__()
        self.flow = Flow(3, [T.permute(3), T.affine_coupling(3, [4])])
        self.inner = PyroModule()
        self.inner.flow = Flow(3, [T.permute(3), T.batchnorm(3)])

    def forward(self):
        with pyro.plate("rows", len(DATA)):
            pyro.sample("own", self.flow(), obs=DATA)
            pyro.sample("inner", self.inner.flow(), obs=DATA)


def beta_binomial(y):
    p = pyro.sample("p", dist.Beta(1.0, 1.0).expand([3]).to_event(1))
    pyro.sample("y", dist.Binomial(12, p).to_event(1), obs=y)


def local(x):
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, scale))
        pyro.sample("x", dist.Normal(z[:, None], 1.0).expand([len(x), 3]).to_event(1), obs=x)


class World:
    """Everything that a process may keep in the store; built anew in each process."""

    def __init__(self, seed):
        torch.manual_seed(seed)  # other permutations, other weights
        self.flows = {
            "permute": Flow(3, [T.permute(3), T.affine_coupling(3, [4])], name="permute"),
            "batchnorm": Flow(3, [T.batchnorm(3), T.affine_coupling(3, [4])], name="batchnorm"),
            "maf": Flow(
                3, T.affine_autoregressive(3, [6], permutation=torch.randperm(3)), name="maf"
            ),
            "glow": pf.glow(3, num_transforms=2, hidden_dims=[4], name="glow"),
            "mask": Flow(
                3, T.affine_coupling(3, [4], mask=[not seed, seed > 0, True]), name="mask"
            ),
        }
        self.frozen, self.owner = Frozen(), Owner()
        self.outside = Flow(3, [T.permute(3), T.affine_coupling(3, [4])], name="outside")
        self.bare = T.Compose([T.permute(3), T.batchnorm(3), T.affine_coupling(3, [4])])
        self.guide, self.amortized = AutoFlow(beta_binomial), None
        encoder = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.amortized = AmortizedFlow(local, encoder, 4)
        self.everything = [
            *self.flows.values(), self.frozen, self.owner, self.outside, self.bare, self.amortized
        ]  # fmt: skip

    def model(self):
        pyro.module("bare", self.bare, update_module_params=True)
        pyro.module("elsewhere", self.outside)
        unit = dist.Normal(torch.zeros(3), 1.0).to_event(1)
        with pyro.plate("rows", len(DATA)):
            for name, flow in {**self.flows, "frozen": self.frozen.flow}.items():
                pyro.sample(name, flow(), obs=DATA)
            pyro.sample("bare", dist.TransformedDistribution(unit, [self.bare]), obs=DATA)
            pyro.sample("outside", self.outside(), obs=DATA)

    def train(self):
        def step(model, guide, *args):
            svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
            for _ in range(4):
                svi.step(*args)

        step(self.model, lambda: None)
        step(self.owner, lambda: None)
        place = torch.full((3,), 1.5)
        self.guide.setup(COUNTS).place(Gaussian(place, 0.3 * torch.eye(3)))  # as a pre-fit would
        step(beta_binomial, self.guide, COUNTS)
        step(local, self.amortized, DATA)

    def values(self):
        """Densities of the flows and quantiles of the guides, in evaluation mode."""
        for module in self.everything:
            module.train(False)
        flows = {
            **self.flows,
            "frozen": self.frozen.flow,
            "own": self.owner.flow,
            "inner": self.owner.inner.flow,
            "outside": self.outside,
        }
        found = {name: flow.log_prob(DATA).detach() for name, flow in flows.items()}
        poutine.trace(self.model).get_trace().compute_log_prob()  # where the bare one has a name
        found["bare"] = self.bare.inv(DATA).detach()
        found["guide"] = self.guide.median(COUNTS)["p"]
        self.amortized.setup(DATA)
        pyro.set_rng_seed(5)
        found["amortized"] = self.amortized(DATA)["z"].detach()
        return found


def test_a_saved_store_brings_everything_back_in_a_new_process(tmp_path):
    world = World(0)
    world.train()
    assert all(isinstance(key, str) and p.requires_grad for key, p in
               pyro.get_param_store().named_parameters())  # fmt: skip
    pyro.get_param_store().save(tmp_path / "store.pt")
    expected = world.values()
    assert (expected["guide"] > 0.7).all()  # the pre-fit's place, far from 1/2
    environment = {**os.environ, "PYTHONPATH": f"{Path(pf.__file__).parents[1]}"}
    subprocess.run(
        [sys.executable, "-W", "error", __file__, tmp_path / "store.pt", tmp_path / "values.pt"],
        check=True,
        env=environment,
    )
    for found in torch.load(tmp_path / "values.pt"):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, msg=lambda m, n=name: f"{n}: {m}")


def in_a_new_process(stored, results):
    """Load in three ways and save what the new objects say."""
    found = []
    state = torch.load(stored, weights_only=False)
    for load in (
        lambda: pyro.get_param_store().load(stored),
        lambda: pyro.get_param_store().load(stored, map_location="cpu"),
        lambda: pyro.get_param_store().set_state(copy.deepcopy(state)),
    ):
        pyro.clear_param_store()
        load()
        world = World(3)
        found.append(world.values())
    world.train()  # what was taken over is trained
    assert all(not torch.equal(value, found[-1][name]) for name, value in world.values().items())
    torch.save(found, results)


def trained(name="flow"):
    flow = Flow(3, [T.permute(3), T.affine_coupling(3, [4])], name=name)
    with torch.no_grad():
        flow.transform.parts[1].conditioner.weights.normal_()
    poutine.trace(flow).get_trace()
    return flow


def test_two_living_owners_raise_and_a_dead_one_leaves_its_values():
    first = trained()
    with pytest.raises(RuntimeError, match="name=.*clear_param_store"):
        trained()
    expected = first.log_prob(DATA)
    del first
    second = Flow(3, [T.permute(3), T.affine_coupling(3, [4])])
    poutine.trace(second).get_trace()
    torch.testing.assert_close(second.log_prob(DATA), expected)
    pyro.clear_param_store()
    third = Flow(3, [T.permute(3), T.affine_coupling(3, [4])])
    before = third.log_prob(DATA)
    poutine.trace(third).get_trace()
    torch.testing.assert_close(third.log_prob(DATA), before)


def test_scopes_keep_their_own():
    params = pyro.get_param_store()
    with params.scope() as one:
        first = trained()
    with params.scope() as two:
        second = trained()
    a, b = first.log_prob(DATA), second.log_prob(DATA)
    assert not torch.allclose(a, b) and not list(params.keys())
    for scope, flow, expected in ((one, first, a), (two, second, b)):
        with params.scope(scope):
            poutine.trace(flow).get_trace()
            torch.testing.assert_close(flow.log_prob(DATA), expected)


def test_a_state_of_this_process_outlives_its_flow():
    flow = trained()
    expected, state = flow.log_prob(DATA).detach(), pyro.get_param_store().get_state()
    del flow
    pyro.clear_param_store()
    pyro.get_param_store().set_state(state)
    torch.testing.assert_close(
        Flow(3, [T.permute(3), T.affine_coupling(3, [4])]).log_prob(DATA), expected
    )


def test_running_statistics_are_saved_as_they_are_at_that_time(tmp_path):
    flow = Flow(3, T.batchnorm(3))
    with pyro.plate("rows", len(DATA)):
        for _ in range(3):
            with poutine.trace():
                pyro.sample("x", flow(), obs=DATA).sum()
                flow().log_prob(DATA)
    layer = flow.transform[0]
    layer.moving_mean += 1.0  # after the last claim, in place
    layer.moving_variance = 2 * layer.moving_variance  # and replaced
    pyro.get_param_store().save(tmp_path / "store.pt")
    held = torch.load(tmp_path / "store.pt", weights_only=False)["constraints"]["flow$$$"]
    assert type(held) is dict
    torch.testing.assert_close(held, dict(flow.named_buffers()))


def test_what_does_not_fit_is_named():
    trained()
    state = copy.deepcopy(pyro.get_param_store().get_state())
    pyro.clear_param_store()
    pyro.get_param_store().set_state(state)
    with pytest.raises(RuntimeError, match="'flow' does not fit this Flow.*clear_param_store"):
        Flow(3, T.affine_coupling(3, [4])).log_prob(DATA)


def test_guides_hand_a_name_on_but_do_not_share_it():
    first, second = AutoFlow(beta_binomial), AutoFlow(beta_binomial)
    for guide, place in ((first, -1.0), (second, 1.0)):
        guide.setup(COUNTS).place(Gaussian(torch.full((3,), place), 1e-3 * torch.eye(3)))
    medians = [guide.median(COUNTS)["p"] for guide in (first, second)]
    for guide, median in zip([first, second, first], [*medians, medians[0]], strict=True):
        drawn = poutine.trace(guide).get_trace(COUNTS).nodes["p"]["value"]
        torch.testing.assert_close(drawn, median, atol=2e-3, rtol=0)
    other = AutoFlow(lambda y: pyro.sample("q", dist.Normal(y, 1.0).to_event(1)))
    named = AutoFlow(lambda y: pyro.sample("r", dist.Normal(y, 1.0).to_event(1)), name="named")
    poutine.trace(lambda: (first(COUNTS), named(COUNTS))).get_trace()

    def both():
        first(COUNTS)
        other(COUNTS)

    with pytest.raises(RuntimeError, match="name="):
        poutine.trace(both).get_trace()
    pyro.clear_param_store()
    torch.testing.assert_close(
        AutoFlow(beta_binomial).median(COUNTS)["p"], torch.full((3,), 0.5), atol=0.2, rtol=0
    )  # a new guide starts anew


def test_bare_transforms_are_registered_whole():
    def build():
        return T.Compose([T.permute(3), T.batchnorm(3), T.affine_coupling(3, [4])])

    first = build()
    poutine.trace(lambda: (store.register("bare", first), first.inv(DATA))).get_trace()
    expected, state = first.eval().inv(DATA), copy.deepcopy(pyro.get_param_store().get_state())
    pyro.clear_param_store()
    pyro.get_param_store().set_state(state)
    second = build().eval()
    trace = poutine.trace(lambda: store.register("bare", second)).get_trace()
    torch.testing.assert_close(second.inv(DATA), expected)
    assert len(trace.nodes) == 2 + len(list(second.parameters()))


def test_frozen_encoders_do_not_warn():
    encoder = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).requires_grad_(False)
    guide = AmortizedFlow(local, encoder, 4)
    poutine.trace(guide).get_trace(DATA)
    assert not any("encoder" in key for key in pyro.get_param_store())


if __name__ == "__main__":
    in_a_new_process(*sys.argv[1:])
