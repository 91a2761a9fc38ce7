"""The one loop: rates, clipping, what is left out, states, seeds."""

import math
import random

import numpy as np
import pytest
import torch

from pyroflows.training import (
    Average,
    Best,
    Budget,
    History,
    MaxNorm,
    MedianNorm,
    Schedule,
    Steps,
    make_adam,
    seeded,
    warmup_cosine,
)


def parameter(*values):
    return torch.nn.Parameter(torch.tensor(values, dtype=torch.float64))


def test_schedule_warms_up_holds_and_falls_to_zero():
    schedule = Schedule(100, warmup=10, hold=40)
    factors = [schedule.factor(n) for n in range(101)]
    assert factors[:10] == [(n + 1) / 10 for n in range(10)]
    assert set(factors[10:41]) == {1.0}
    for n in range(40, 101):
        assert factors[n] == pytest.approx(math.cos(math.pi / 2 * (n - 40) / 60) ** 2, abs=1e-15)
    assert factors[100] == 0.0 and all(factors[:100])


def test_warmup_cosine_is_the_schedule_without_a_hold():
    assert warmup_cosine(0, 100) == 0.5 and warmup_cosine(1, 100) == 1.0
    assert warmup_cosine(51, 100) == pytest.approx(0.5)
    assert warmup_cosine(0, 1) == 1.0 and Schedule(1).factor(1) == 0.0


def test_schedule_levels_off_with_its_losses():
    steep, flat = Schedule(1000, window=20, hold=333), Schedule(1000, window=20, hold=333)
    falling = [-0.1 * n for n in range(300)]
    level = [math.nan if n % 7 == 0 else 1.0 for n in range(300)]
    for n in range(300):
        steep.observe(falling[:n])
        flat.observe(level[:n])
    assert not steep.converged and steep.decay_from == 333
    assert flat.converged and flat.decay_from == flat.warmup + 2 * 20 and flat.decay_steps == 60


def test_the_clock_rules_where_it_runs_ahead_of_the_steps():
    spent = [0.05]
    schedule = Schedule(100, warmup=1, hold=0, clock=lambda: spent[0])
    assert schedule.factor(20) == pytest.approx(math.cos(math.pi / 2 * 0.2) ** 2)
    assert not schedule.timed
    spent[0] = 0.55  # half of what is not free
    assert schedule.factor(20) == pytest.approx(0.5) and schedule.timed
    spent[0] = 1.0
    assert schedule.factor(20) == 0.0


def test_steps_end_with_the_clock_and_say_so(monkeypatch):
    budget = Budget(10.0)
    monkeypatch.setattr(budget, "seconds", lambda: 2.0 * len(steps.losses) if steps else 0.0)
    steps = None
    p = parameter(1.0)
    steps = Steps([p], 0.1, schedule=Schedule(1000, hold=0, clock=budget.window()))
    for _ in steps:
        steps.take((p**2).sum())
    assert len(steps.losses) == 5 and steps.history.stopped == "max_time"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_left_out(bad):
    p = parameter(1.0, 2.0)
    steps = Steps([p], 0.1)
    assert steps.take((p * bad).sum()) is None
    assert steps.take((p - p.detach()).abs().sqrt().sum()) is None  # loss 0, gradient infinite
    assert p.tolist() == [1.0, 2.0] and steps.skipped == 2 and len(steps.losses) == 2
    assert steps.take(p.sum()) == 3.0
    assert p.tolist() == pytest.approx([0.9, 1.9])  # Adam's first step is the rate


def test_groups_have_rates_of_their_own_and_the_schedule_moves_all():
    p, q = parameter(0.0), parameter(0.0)
    groups = [{"params": [p], "lr": 0.5}, {"params": q}]
    steps = Steps(groups, 0.1, schedule=Schedule(4, warmup=2))
    for step in steps:
        steps.take(p.sum() + q.sum())
        if step == 0:
            assert (p.item(), q.item()) == pytest.approx((-0.25, -0.05))
    assert steps.count == 4 and p.item() == pytest.approx(5 * q.item())


def test_an_objective_may_bring_its_gradients():
    p = parameter(3.0)
    steps = Steps([p], 1.0, optimizer=torch.optim.SGD, clip=MaxNorm(math.inf))

    def gradient():
        p.grad = torch.full_like(p, 0.5)
        return 7.0

    assert steps.take(gradient) == 7.0 and p.item() == 2.5
    assert steps.take(lambda: (p**2).sum()) == 6.25 and p.item() == -2.5


def test_iterations_go_on_where_the_last_ended():
    p = parameter(1.0)
    steps, seen = Steps([p], 0.1, schedule=Schedule(5)), []
    for _ in range(3):
        for step, _batch in zip(steps, "ab", strict=False):
            seen.append(step)
            steps.take(p.sum())
    assert seen == [0, 1, 2, 3, 4]


def test_stop_lets_no_step_follow():
    p, history = parameter(1.0), History()
    steps = Steps([p], 0.1, history=history)
    for step in steps:
        steps.take(p.sum())
        if step == 2:
            steps.stop("callback")
    assert history.num_steps == 3 and history.stopped == "callback"
    assert history.frame()["loss"].tolist() == history.losses


def test_max_norm_scales_to_the_norm():
    p, q = parameter(0.0), parameter(0.0)
    p.grad, q.grad = torch.full_like(p, 3.0), torch.full_like(q, 4.0)
    assert MaxNorm(1.0)([p, q])
    assert (p.grad.item(), q.grad.item()) == pytest.approx((0.6, 0.8), abs=1e-6)
    p.grad.fill_(math.nan)
    assert not MaxNorm(1.0)([p, q])


@pytest.mark.parametrize("limit", [0.5, 3.0, 100.0, math.inf])
def test_gradients_are_scaled_as_pytorch_scales_them(limit):
    torch.manual_seed(0)
    ours = [
        torch.randn(n, dtype=d, requires_grad=True)
        for n, d in [
            (12, torch.float32),
            (2, torch.float64),
            (0, torch.float32),
            (3, torch.float32),
        ]
    ]
    for t in ours[:3]:
        t.grad = torch.randn_like(t)
    theirs = [t.grad.clone() for t in ours[:3]]
    holders = [torch.nn.Parameter(g.clone()) for g in theirs]
    for holder, grad in zip(holders, theirs, strict=True):
        holder.grad = grad
    assert MaxNorm(limit)(ours)
    torch.nn.utils.clip_grad_norm_(holders, limit)
    for t, holder in zip(ours, holders, strict=False):
        assert torch.equal(t.grad, holder.grad)


def test_median_norm_follows_the_median():
    clip, p = MedianNorm(2.0, window=5, after=3), parameter(0.0)
    kept = []
    for norm in (1.0, 3.0, 2.0, 9.0, math.nan, 9.0, 9.0):
        p.grad = torch.full_like(p, norm)
        usable = clip([p])
        kept.append(p.grad.item() if usable else None)
    # medians of (1, 3, 2), then of (1, 3, 2, 9), the upper, then of (1, 3, 2, 9, 9)
    assert kept == pytest.approx([1, 3, 2, 4, None, 6, 6], abs=1e-5)


def test_best_keeps_modules_with_buffers_and_tensors():
    module = torch.nn.BatchNorm1d(2)
    best = Best(module)
    for mark, (loss, value) in enumerate([(3.0, 1.0), (math.nan, 2.0), (1.0, 3.0), (2.0, 4.0)]):
        module.running_mean.fill_(value)
        best.offer(loss, mark)
    best.restore()
    assert module.running_mean.tolist() == [3.0, 3.0] and (best.loss, best.mark) == (1.0, 2)
    best.restore(start=True)
    assert module.running_mean.tolist() == [0.0, 0.0]
    vector = parameter(1.0)
    kept = Best([vector])
    vector.data.fill_(5.0)
    kept.restore()
    assert vector.item() == 1.0 and vector.requires_grad


def test_average_is_the_weighted_mean_and_swaps_in():
    p = parameter(0.0)
    average, mean = Average([p], decay=0.2), 0.0
    for n in range(1, 6):
        p.data.fill_(float(n))
        average.update()
        decay = min(0.2, n / (n + 10))
        mean = decay * mean + (1 - decay) * n
    with pytest.raises(KeyError), average.swapped():
        assert p.item() == pytest.approx(mean)
        raise KeyError
    assert p.item() == 5.0
    with pytest.raises(ValueError, match="between 0 and 1; got 1"):
        Average([p], decay=1.0)


def test_seeded_gives_every_generator_back():
    def draw():
        return torch.rand(()).item(), float(np.random.rand()), random.random()

    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    expected = [draw(), draw()]
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    assert draw() == expected[0]
    with seeded(5):
        inside = draw()
    with seeded(5):
        assert draw() == inside
    assert draw() == expected[1]


@pytest.mark.parametrize("seed", [0, -1, 2**40])
def test_every_seed_that_torch_takes_will_do(seed):
    with seeded(seed):
        drawn = torch.rand(())
    torch.manual_seed(seed)
    assert torch.rand(()) == drawn


def test_adam_takes_groups_and_tensors():
    p, q = parameter(1.0), parameter(1.0)
    adam = make_adam([p, {"params": q, "weight_decay": 0.5}], 0.1, betas=(0.9, 0.99))
    assert [g["weight_decay"] for g in adam.param_groups] == [0.0, 0.5]
    assert adam.param_groups[0]["betas"] == (0.9, 0.99) and adam.param_groups[0]["fused"]
