"""Data and contexts of any location and scale: standardization is a part of the density."""

import copy
import math
import pickle
import subprocess
import sys
import warnings

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from torch.distributions import ExpTransform, SigmoidTransform

import pyroflows as pf
from pyroflows import bases
from pyroflows import transforms as T
from pyroflows.flow import Flow


def fit(flow, *args, **kwargs):
    return pf.fit(flow, *args, progress=False, **kwargs)


def small(recipe="neural_spline", input_dim=2, context_dim=0):
    return getattr(pf, recipe)(input_dim, context_dim, num_transforms=2, hidden_dims=[16])


def mixture(n, seed=0):
    """Two correlated columns of unit scale with two modes."""
    generator = torch.Generator().manual_seed(seed)
    side = torch.where(torch.rand(n, 1, generator=generator) < 0.5, -1.0, 1.0)
    return (side + torch.randn(n, 2, generator=generator) * torch.tensor([0.3, 0.5])) / 1.08


@pytest.mark.parametrize("recipe", ["neural_spline", "realnvp", "maf"])
def test_fit_finds_a_normal_far_from_unit_scale(recipe):
    x = 40 * torch.randn(1000, 2) + 100
    flow = small(recipe)
    fit(flow, x, num_epochs=8)
    fresh = 40 * torch.randn(4000, 2) + 100
    gap = (dist.Normal(100.0, 40.0).log_prob(fresh).sum(-1) - flow.log_prob(fresh)).mean()
    assert abs(gap) < 0.03
    y = flow.sample(4000)
    assert (y.mean(0) - 100).abs().max() < 4 and (y.std(0) - 40).abs().max() < 3


def test_scales_of_data_and_context_do_not_matter():
    c = torch.randn(800, 1)
    x = mixture(800)
    x[:, :1] += c

    def loss(scale, shift, context_scale, context_shift):
        torch.manual_seed(0)
        flow = small("realnvp", context_dim=1)
        rows, contexts = scale * x + shift, context_scale * c + context_shift
        fit(flow, rows, contexts, num_epochs=6)
        log_prob = flow.log_prob(rows, contexts) + 2 * math.log(scale)
        assert torch.allclose(
            flow(contexts[5]).log_prob(rows[5]), flow.log_prob(rows, contexts)[5]
        )
        return -float(log_prob.detach().mean())

    expected = loss(1.0, 0.0, 1.0, 0.0)
    for scales in [(1e4, 1e5, 1e4, 0.0), (1e-3, 0.0, 1e-4, 0.0), (1.0, 0.0, 1e4, -1e6)]:
        assert loss(*scales) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("context_dim", [0, 1])
def test_density_with_units_integrates_to_one_and_scores_its_samples(context_dim):
    flow = small(context_dim=context_dim).double()
    c = 1e3 + 50 * torch.randn(200, context_dim).double() if context_dim else None
    x = torch.randn(200, 2).double() * torch.tensor([3.0, 0.2]) + torch.tensor([50.0, -7.0])
    fit(flow, x, c, num_epochs=3)
    edges = [
        torch.linspace(-8, 8, 241).double() * s + m
        for s, m in zip([3, 0.2], [50, -7], strict=True)
    ]
    middle = [(e[1:] + e[:-1]) / 2 for e in edges]
    one = c[:1] if context_dim else None
    density = flow(one).log_prob(torch.cartesian_prod(*middle)).exp()
    cell = float(torch.stack([e[1] - e[0] for e in edges]).prod())
    assert float(density.detach().sum()) * cell == pytest.approx(1, abs=1e-3)
    d = flow(c)
    y = d.rsample((3,))
    free = flow(c).log_prob(y.detach().clone())
    torch.testing.assert_close(d.log_prob(y), free)  # remembered or not
    torch.testing.assert_close(flow.log_prob(y.detach(), c), free)
    z, log_det = d.transforms[0].inverse_and_log_det(y.detach())
    torch.testing.assert_close(d.base_dist.log_prob(z) + log_det, free)
    torch.testing.assert_close(d.transforms[0](z), y.detach())


def test_unset_units_change_nothing():
    flow = small("maf", 3, 2).double()
    x, c = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    z, total = x, 0.0
    for part in reversed(flow.transform.parts):
        z, log_det = part.condition(c).inverse_and_log_det(z)
        total = total + log_det
    assert torch.equal(flow.log_prob(x, c), dist.Normal(0.0, 1.0).log_prob(z).sum(-1) + total)
    old = {k: v for k, v in flow.state_dict().items() if "units" not in k}
    other = small("maf", 3, 2).double()
    other.standardize(100 * x, c)
    other.load_state_dict(old)  # saved without units: the identity
    assert torch.equal(other.log_prob(x, c), flow.log_prob(x, c))


def test_weights_count_as_repetitions():
    x, c = torch.randn(50, 2) * 30, torch.randn(50, 3)
    weight = torch.arange(50) % 4
    plain, weighted = small(context_dim=3), small(context_dim=3)
    plain.standardize(x.repeat_interleave(weight, 0), c.repeat_interleave(weight, 0))
    weighted.standardize(x, c, sample_weight=weight)
    for name, value in plain.state_dict().items():
        if "units" in name:
            torch.testing.assert_close(weighted.state_dict()[name], value)
    assert not torch.equal(weighted.transform.units.loc, torch.zeros(2))


def test_copies_and_conversions_keep_the_units():
    x, c = 40 * torch.randn(100, 2) + 100, 1e4 * torch.randn(100, 1)
    flow = small("realnvp", context_dim=1)
    fit(flow, x, c, num_epochs=2)
    expected = flow.log_prob(x, c)
    loaded = small("realnvp", context_dim=1)
    loaded.load_state_dict(flow.state_dict())
    for other in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow)), loaded):
        assert torch.equal(other.log_prob(x, c), expected)
    double = copy.deepcopy(flow).double()
    assert double.transform.units.loc.dtype == torch.float64
    got = double.log_prob(x.double(), c.double())
    torch.testing.assert_close(got.float(), expected, rtol=1e-4, atol=1e-4)
    compiled = torch.compile(loaded.log_prob, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, c), expected)


def test_fresh_process_restores_the_units(tmp_path):
    x, c = 40 * torch.randn(100, 2) + 100, 1e4 * torch.randn(100, 1)
    flow = small(context_dim=1)
    fit(flow, x, c, num_epochs=2)
    with poutine.trace():
        flow(c)  # registers
    pyro.get_param_store().save(str(tmp_path / "store"))
    torch.save(
        {"state": flow.state_dict(), "rows": (x, c), "is": flow.log_prob(x, c)}, tmp_path / "f"
    )
    code = """
import sys, pyro, torch, pyroflows as pf
saved = torch.load(sys.argv[1] + "/f")
for way in ("state", "store"):
    flow = pf.neural_spline(2, 1, num_transforms=2, hidden_dims=[16])
    if way == "state":
        flow.load_state_dict(saved["state"])
    else:
        pyro.get_param_store().load(sys.argv[1] + "/store")
    torch.testing.assert_close(flow.log_prob(*saved["rows"]), saved["is"])
"""
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True)
    assert out.returncode == 0, out.stderr.decode()


def test_later_fits_keep_what_the_first_one_set():
    x = 40 * mixture(600) + 100
    flow = small("realnvp")
    fit(flow, x, num_epochs=4)
    loc, before = flow.transform.units.loc.clone(), flow.log_prob(x).mean()
    with pytest.warns(UserWarning, match="sets it anew"):
        fit(copy.deepcopy(flow), 100 * x, num_epochs=1)
    fit(flow, x[:300] + 5, num_epochs=1, lr=1e-5)
    assert torch.equal(flow.transform.units.loc, loc)
    assert flow.log_prob(x).mean() > before - 0.2


def test_layers_trained_in_the_units_of_the_data_keep_them():
    x = 3 * mixture(600) + 10
    flow = Flow(2, [T.affine_coupling(2, [16]), T.elementwise_affine(2)])
    fit(flow, x, num_epochs=30, lr=5e-2, standardize=False)
    before = flow.log_prob(x).mean()
    fit(flow, x, num_epochs=1, lr=1e-6)
    assert not flow.transform.units.active
    torch.testing.assert_close(flow.log_prob(x).mean(), before, rtol=0, atol=1e-2)


def test_bounds_stay_where_they_are():
    x = (12 + 2 * torch.randn(600, 2)).exp()
    flow = Flow(2, [T.affine_coupling(2, [8]), ExpTransform()])
    fit(flow, x, num_epochs=4)
    truth = dist.LogNormal(12.0, 2.0).log_prob(x).sum(-1).mean()
    assert (flow.sample(100) > 0).all() and flow.event_shape == (2,)
    assert abs(flow.log_prob(x).mean() - truth) < 0.1
    with pytest.raises(ValueError, match="1 rows of x lie outside the flow's support"):
        fit(flow, torch.cat([x, -x[:1]]))
    shares = Flow(1, [T.spline(1), SigmoidTransform()])
    fit(shares, torch.rand(300, 1) * 1e-3 + 1e-6, num_epochs=3)
    assert shares.sample(500).max() < 0.1
    # the base itself is bounded, or an angle: its units are the user's
    for base in (dist.Uniform(torch.zeros(2), 1.0), dist.VonMises(torch.zeros(2), 1.0)):
        flow = Flow(base, [T.elementwise_affine(2)])
        with pytest.raises(ValueError, match="bounded, or an angle"):
            flow.standardize(x)
        fit(flow, flow.sample(100), num_epochs=1)
        assert not [name for name, _ in flow.named_buffers() if "units" in name]


def test_constant_and_binary_features():
    x = torch.randn(300, 2) * 5 + 20
    one_hot = torch.nn.functional.one_hot(torch.arange(300) % 100 // 98, 3).float()
    context = torch.cat([one_hot, torch.full((300, 1), 7e5), torch.randn(300, 1) + 1e3], 1)
    flow = small(context_dim=5)
    fit(flow, x, context, num_epochs=2, validation=0)
    seen = flow.transform.context_units.standardize(context)
    assert torch.equal(seen[:, :2], one_hot[:, :2])  # rare labels do not become large
    assert torch.equal(seen[:, 2:4], torch.zeros(300, 2))
    assert float(seen[:, 4].std(correction=0)) == pytest.approx(1, abs=1e-3)
    with pytest.warns(UserWarning, match=r"features \[1\] of x are constant"):
        fit(small(), torch.cat([x[:, :1], torch.full((300, 1), 3.5)], 1), num_epochs=1)


def test_precision_is_kept_or_refused():
    x = 1.4e9 + torch.randn(500, 2).double()
    with pytest.raises(ValueError, match=r"feature 0 of x varies by .* holds steps of .*double"):
        fit(small(), x)
    with pytest.raises(ValueError, match="of context varies"):
        fit(small(context_dim=2), torch.randn(500, 2), x)
    with pytest.warns(UserWarning, match="holds steps"):
        fit(small(), 1e9 + 500 * (x - 1.4e9), num_epochs=1)
    flow = small().double()
    fit(flow, x, num_epochs=4)
    truth = dist.Normal(1.4e9, torch.ones((), dtype=torch.float64)).log_prob(x).sum(-1).mean()
    assert abs(flow.log_prob(x).mean() - truth) < 0.03
    with pytest.raises(ValueError, match="beyond torch.float32"):
        fit(small(), torch.randn(50, 2).double() * 1e45)
    with pytest.raises(ValueError, match=r"x of shape \(n, 2\); got \(50, 3\)"):
        flow.standardize(torch.randn(50, 3).double())
    huge = small().double()
    huge.standardize(torch.randn(50, 2).double() * 1e250)
    assert huge.log_prob(torch.zeros(2).double()).isfinite()


def test_images_have_one_scale_a_channel():
    image = torch.randn(40, 3, 4, 4) * torch.tensor([1.0, 50.0, 1e3])[:, None, None]
    flow = Flow(bases.StandardNormal((3, 4, 4)), [T.conv_coupling(3, [4, 4])])
    flow.standardize(image)
    scale = flow.transform.units.scale
    assert scale.shape == (3, 4, 4) and torch.equal(scale, scale[:, :1, :1].expand(3, 4, 4))
    torch.testing.assert_close(scale[:, 0, 0], image.transpose(0, 1).flatten(1).std(1, False))


class Fragile(torch.nn.Module):
    """A normal whose training loss is not finite in all but every ``good``-th step."""

    def __init__(self, good):
        super().__init__()
        self.loc, self.good, self.calls = torch.nn.Parameter(torch.zeros(1)), good, 0

    def log_prob(self, x, context=None):
        self.calls += self.training
        blown = math.inf if self.training and self.calls % self.good else 1.0
        return -(x - self.loc).square().sum(-1) * blown


def test_skipped_steps_are_said():
    x = torch.randn(200, 1) + 1
    with pytest.warns(UserWarning, match="in .* of .* steps loss or gradient was not finite"):
        history = fit(Fragile(3), x, num_epochs=10, lr=0.05)
    assert 0 < history.skipped_steps < history.num_steps
    flow = Fragile(10**9)
    with pytest.raises(RuntimeError, match="the flow is as it was"):
        fit(flow, x, num_epochs=2)
    assert flow.loc.item() == 0
    with pytest.raises(RuntimeError, match="the flow is as it was"):
        fit(flow, x, num_epochs=2, validation=0)


def test_fit_never_ends_worse_than_it_began():
    x = torch.randn(300, 2)
    for validation in (0.1, 0):
        flow = small("realnvp")
        before = flow.log_prob(x).mean()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit(flow, x, num_epochs=2, lr=3.0, validation=validation)
        assert flow.log_prob(x).mean() > before - 0.05


def test_calls_compiled_right_after_the_units_were_set_know_them():
    """A graph cannot look at buffers: whoever sets them has looked."""
    torch.manual_seed(0)
    flow = pf.maf(2, 1, num_transforms=1, hidden_dims=[8])
    x, c = 50 + 9 * torch.randn(64, 2), 1e3 * torch.randn(64, 1)
    flow.standardize(x, c)
    compiled = torch.compile(flow.log_prob, backend="eager", fullgraph=True)
    got = compiled(x, c)
    torch.testing.assert_close(got, flow.log_prob(x, c))
    gauss = dist.Normal(x.mean(0), x.std(0, unbiased=False)).log_prob(x).sum(-1)
    torch.testing.assert_close(got, gauss, rtol=1e-4, atol=1e-4)
