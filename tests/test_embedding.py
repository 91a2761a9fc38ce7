"""A network that makes the context of images, sets or words is a part of the flow."""

import copy
import io

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn

import pyroflows as pf
from pyroflows import bases
from pyroflows import transforms as T
from pyroflows.flow import Flow


class SetMean(nn.Module):
    """Sets ``(*batch, n, 2)`` to contexts ``(*batch, 3)``, whatever the order."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(2, 8), nn.Linear(8, 3)

    def forward(self, rows):
        return self.outer(torch.relu(self.inner(rows)).mean(-2))


def convolution():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3))


def images(n):
    """Images whose brightness is the mean of x."""
    level = torch.randn(n, 1)
    x = torch.cat([level + 0.1 * torch.randn(n, 1), torch.randn(n, 1)], 1)
    return 40 * x + 100, level[:, :, None, None] + 0.1 * torch.randn(n, 1, 4, 4)


def small(embedding, **kwargs):
    return pf.realnvp(2, 3, num_transforms=2, hidden_dims=[16], embedding=embedding, **kwargs)


def test_images_are_learned_saved_and_moved_with_the_flow():
    x, image = images(500)
    flow = small(convolution())
    first = flow.embedding[0].weight.detach().clone()
    pf.fit(flow, x, image, num_epochs=25, lr=1e-2, progress=False)
    assert not torch.equal(flow.embedding[0].weight, first)
    bright, dark = torch.full((1, 1, 4, 4), 1.0), torch.full((1, 1, 4, 4), -1.0)
    means = flow.sample(500, torch.cat([bright, dark])).mean(0)[:, 0]
    assert (means - torch.tensor([140.0, 60.0])).abs().max() < 12
    assert flow(image[:7]).batch_shape == (7,) and flow.log_prob(x, image).shape == (500,)
    file = io.BytesIO()
    torch.save(flow.state_dict(), file)
    file.seek(0)
    other = small(convolution())
    other.load_state_dict(torch.load(file))
    for again in (other.eval(), copy.deepcopy(flow)):
        torch.testing.assert_close(again.log_prob(x, image), flow.log_prob(x, image))
    assert flow.double().log_prob(x.double(), image.double()).dtype == torch.float64


def test_batches_are_what_the_embedding_leaves():
    flow = small(SetMean())
    rows = torch.randn(4, 5, 6, 2)
    assert flow(rows).batch_shape == (4, 5) and flow(rows[0, 0]).batch_shape == ()
    y, log_prob = flow.rsample_and_log_prob(3, rows)
    assert y.shape == (3, 4, 5, 2)
    shuffled = rows[:, :, torch.randperm(6)]
    torch.testing.assert_close(flow.log_prob(y.detach(), shuffled), log_prob)
    log_prob.sum().backward()
    assert all(p.grad is not None for p in flow.parameters() if p.requires_grad)


def test_the_base_and_bounded_flows_get_it_too():
    flow = Flow(bases.ConditionalNormal(2, 3), T.spline(2), embedding=SetMean())
    assert flow(torch.randn(4, 6, 2)).batch_shape == (4,)
    last = torch.distributions.ExpTransform()
    layers = [
        T.affine_coupling(2, [8], context_dim=3),
        last,
        T.elementwise_scale(2, context_dim=3),
    ]
    bounded = Flow(2, layers, embedding=SetMean())
    pf.fit(bounded, torch.rand(60, 2) + 1e-3, torch.randn(60, 6, 2), num_epochs=1, progress=False)
    bounded.standardize(torch.rand(60, 2) + 1e-3, torch.randn(60, 6, 2))


def test_words_stay_integers():
    words = torch.randint(0, 9, (200, 1))
    flow = small(nn.Sequential(nn.Embedding(9, 3), nn.Flatten(-2)))
    x = words + 0.1 * torch.randn(200, 2)
    pf.fit(flow, x, words, num_epochs=2, progress=False)
    assert flow(words).batch_shape == (200,)


def test_pyro_learns_and_keeps_the_embedding():
    x, image = images(64)
    flow = small(convolution(), name="picture")

    def model():
        with pyro.plate("rows", 64):
            pyro.sample("x", flow(image), obs=(x - 100) / 40)

    svi = SVI(model, lambda: None, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    losses = [svi.step() for _ in range(30)]
    assert losses[-1] < losses[0]
    assert any("embedding" in key for key in pyro.get_param_store())


def test_errors_say_what_is_wrong():
    with pytest.raises(ValueError, match="context_dim="):
        pf.realnvp(2, embedding=SetMean())
    with pytest.raises(ValueError, match="what its embedding takes"):
        small(SetMean()).sample(3)
    with pytest.raises(ValueError, match=r"of its embedding.* \(\.\.\., 3\); got \(4, 7\)"):
        small(nn.Linear(2, 7))(torch.randn(4, 2))
    with pytest.raises(ValueError, match=r"\(\*batch, \*anything\) to \(\*batch, 3\)"):
        small(nn.Sequential(nn.Flatten(0), nn.Linear(8, 3), nn.Unflatten(0, (1, 3))))(
            torch.randn(4, 2)
        )
    with pytest.raises(TypeError, match="context tensor"):
        small(nn.Identity())("words")
