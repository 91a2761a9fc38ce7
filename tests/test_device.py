"""Everything public, audited on a GPU that is none: see device.py for what each audit finds."""

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import CASES, build, contexts, disturb, noise
from device import FakeGPU, audit_process, check_factories, on_fake_gpu, stray_tensors

import pyroflows
from pyroflows import bases

KINDS = [(n, c) for n, case in CASES.items() for c in ((0, 2) if case.takes_context else (0,))]
each_kind = pytest.mark.parametrize("name, context_dim", KINDS)


def gradients(module, loss):
    """Gradients of every learnable parameter, zeros where the loss does not depend on it."""
    learnable = [p for p in module.parameters() if p.requires_grad]
    return torch.autograd.grad(loss, learnable, materialize_grads=True) if learnable else ()


def both_directions(transform, x, context):
    """Value, log-determinant, inverse and gradients: what a transform computes."""
    view = transform.condition(context)
    y = view(x)
    log_det = view.log_abs_det_jacobian(x, y)
    loss = log_det.sum() + y.square().sum()
    return y, log_det, view.inv(y.detach()), gradients(transform, loss)


def case(name, context_dim):
    arguments = noise(name, 3, dtype=torch.float32), contexts(context_dim, 3, dtype=torch.float32)
    return build(name, context_dim, torch.float32), *arguments


@each_kind
def test_transform_makes_tensors_on_its_device(name, context_dim):
    check_factories(both_directions, *case(name, context_dim))


@each_kind
def test_transform_leaves_no_tensor_behind(name, context_dim):
    transform, *arguments = case(name, context_dim)
    both_directions(transform, *arguments)
    assert stray_tensors(transform) == []


@each_kind
@audit_process
def test_transform_on_the_fake_gpu(name, context_dim):
    arguments = case(name, context_dim)
    torch.testing.assert_close(
        on_fake_gpu(both_directions, *arguments), both_directions(*arguments)
    )


SMALL = {"num_transforms": 2, "hidden_dims": [8]}
FLOWS = {
    "nice": lambda c: pyroflows.nice(3, c, **SMALL),
    "realnvp": lambda c: pyroflows.realnvp(3, c, **SMALL),
    "glow": lambda c: pyroflows.glow(3, c, **SMALL),
    "maf": lambda c: pyroflows.maf(3, c, **SMALL),
    "iaf": lambda c: pyroflows.iaf(3, c, **SMALL),
    "neural_spline": lambda c: pyroflows.neural_spline(3, c, **SMALL),
    "neural_spline_autoregressive": lambda c: pyroflows.neural_spline(
        3, c, autoregressive=True, **SMALL
    ),
    "diagonal_normal": lambda c: pyroflows.realnvp(3, c, base=bases.DiagonalNormal(3)),
    "student_t": lambda c: pyroflows.realnvp(3, c, base=bases.StudentT(3)),
    "gaussian_mixture": lambda c: pyroflows.realnvp(3, c, base=bases.GaussianMixture(3, 2)),
    "pyro_base": lambda c: pyroflows.realnvp(
        3, c, base=dist.Laplace(torch.zeros(3), torch.ones(3)).to_event(1)
    ),
    "conditional_normal": lambda c: pyroflows.realnvp(
        3, c, base=bases.ConditionalNormal(3, c) if c else None
    ),
}
each_flow = pytest.mark.parametrize(
    "name, context_dim", [(name, c) for name in FLOWS for c in (0, 2)]
)


def density_and_draws(flow, x, context):
    context = context if flow.context_dim else None
    log_prob = flow.log_prob(x, context)
    draws = flow.rsample((2,), context)
    return log_prob, flow.sample((2,), context), gradients(flow, log_prob.sum() + draws.sum())


def flow_case(name, context_dim):
    flow, generator = FLOWS[name](context_dim), torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, generator=generator)
    context = torch.randn(4, context_dim, generator=generator)
    flow.log_prob(x, context if context_dim else None)  # what data initializes sees some here
    disturb(flow, generator, scale=0.1)
    return flow, x, context


@each_flow
def test_flow_leaves_no_tensor_behind(name, context_dim):
    flow, *arguments = flow_case(name, context_dim)
    density_and_draws(flow, *arguments)
    assert stray_tensors(flow) == []


@each_flow
def test_flow_makes_tensors_on_its_device(name, context_dim):
    flow, *arguments = flow_case(name, context_dim)
    check_factories(density_and_draws, flow, *arguments)


@each_flow
@audit_process
def test_flow_on_the_fake_gpu(name, context_dim):
    flow, *arguments = flow_case(name, context_dim)
    torch.manual_seed(1)
    on_gpu = on_fake_gpu(density_and_draws, flow, *arguments)
    torch.manual_seed(1)
    torch.testing.assert_close(on_gpu, density_and_draws(flow, *arguments), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("data_on", ["cpu", "fakegpu"])
@audit_process
def test_fit_on_the_fake_gpu(data_on):
    x, context = torch.randn(64, 2), torch.randn(64, 1)
    with FakeGPU():
        flow = pyroflows.neural_spline(2, 1, num_transforms=2, hidden_dims=[8])
        pyroflows.fit(
            flow,
            x.to(data_on),
            context.to(data_on),
            num_epochs=2,
            batch_size=16,
            device="fakegpu",
            progress=False,
        )
        assert {p.device.type for p in flow.parameters()} == {"fakegpu"}
        assert flow.sample((3,), context[:1].to("fakegpu")).device.type == "fakegpu"


def schools(y, sigma):
    zero, one = y.new_zeros(()), y.new_ones(())
    mu = pyro.sample("mu", dist.Normal(zero, 5 * one))
    tau = pyro.sample("tau", dist.HalfNormal(5 * one))
    with pyro.plate("schools", len(y)):
        z = pyro.sample("z", dist.Normal(zero, one))
        pyro.sample("y", dist.Normal(mu + tau * z, sigma), obs=y)


@audit_process
def test_guide_on_the_fake_gpu():
    y, sigma = torch.tensor([28.0, 8.0, -3.0, 7.0]), torch.tensor([15.0, 10.0, 16.0, 11.0])
    with FakeGPU():
        y, sigma = y.to("fakegpu"), sigma.to("fakegpu")
        guide = pyroflows.AutoFlow(schools)
        pyroflows.fit_guide(schools, guide, y, sigma, num_steps=5, num_particles=8, progress=False)
        assert {p.device.type for p in guide.parameters()} == {"fakegpu"}
        assert {v.device.type for v in guide(y, sigma).values()} == {"fakegpu"}
        assert {v.device.type for v in guide.median(y, sigma).values()} == {"fakegpu"}


@audit_process
def test_density_estimator_on_the_fake_gpu():
    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        {
            "a": rng.normal(size=200),
            "b": rng.integers(0, 9, 200),
            "c": rng.choice(["x", "y"], 200),
        }
    )
    table.loc[::7, "a"] = np.nan
    with FakeGPU():
        density = pyroflows.DensityEstimator(random_state=0, max_steps=4, device="fakegpu")
        density.fit(table)
        scores = density.score_samples(table)
        draws = density.sample(5)
    assert np.isfinite(scores).all() and scores.shape == (200,)
    assert list(draws.columns) == list(table.columns)
