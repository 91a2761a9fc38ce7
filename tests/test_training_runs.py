"""Fits on batches that others bring, that go on after an interruption, and that others steer."""

import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.optim.lr_scheduler import ExponentialLR, OneCycleLR, ReduceLROnPlateau
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    TensorDataset,
)

import pyroflows as pf
from pyroflows import transforms as T
from pyroflows.flow import Flow
from pyroflows.training import MedianNorm

fit = partial(pf.fit, progress=False)


def rows(n=240, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, generator=generator) * torch.tensor([3.0, 0.1]) + 5


def small(context_dim=0, seed=0):
    torch.manual_seed(seed)
    layers = [T.affine_coupling(2, [8], context_dim=context_dim), T.elementwise_affine(2)]
    return Flow(2, layers if not context_dim else layers[:1])


def state(flow):
    return torch.cat([v.detach().double().flatten() for v in flow.state_dict().values()])


class Again:
    """Batches that begin anew with every iteration, of a length nobody knows."""

    def __init__(self, *batches):
        self.batches, self.begun = batches, 0

    def __iter__(self):
        self.begun += 1
        yield from self.batches


class Numbered(Dataset):
    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"x": self.x[i], "context": self.x[i, :1] * 0 + i}


class Watched(Numbered):
    def __init__(self, x):
        super().__init__(x)
        self.seen = []

    def __getitem__(self, i):
        self.seen.append(int(i))
        return super().__getitem__(i)


class Streamed(IterableDataset):
    def __init__(self, x):
        self.x = x

    def __iter__(self):
        yield from self.x


# ------------------------------------------------------------------------------------------ data


def test_a_dataset_of_tensors_is_its_tensors():
    x = rows()
    first, second = small(), small()
    one = fit(first, x, num_epochs=3)
    two = fit(second, TensorDataset(x), num_epochs=3)
    assert one.losses == two.losses and torch.equal(state(first), state(second))


@pytest.mark.parametrize("kind", ["list", "loader", "unknown length", "generator"])
def test_batches_are_trained_on_in_their_order(kind):
    x = rows()
    batches = list(x.split(80))
    given = {
        "list": batches,
        "loader": DataLoader(TensorDataset(x), 80),
        "unknown length": Again(*batches),
        "generator": (b for b in batches),
    }[kind]
    flow, by_hand = small(), small()
    history = fit(flow, given, num_epochs=1, lr=0.01)
    by_hand.standardize(x)
    first = -by_hand.log_prob(x[:80]).mean().item()
    assert history.num_steps == 3 and history.losses[0] == pytest.approx(first, rel=1e-5)
    assert torch.allclose(flow.transform.units.loc, x.mean(0).to(flow.transform.units.loc))


def test_context_and_weights_come_with_the_batches():
    x, c = rows(), torch.linspace(-1, 1, 240)[:, None]
    weight = torch.zeros(240).index_fill(0, torch.arange(120), 1.0)
    by_name = [{"x": x[:120], "context": c[:120]}]
    by_place = [(x, c, weight)]
    losses = [fit(small(1), b, num_epochs=2).losses for b in (by_name, by_place)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_datasets_are_parted_shuffled_and_batched():
    watched = Watched(rows())
    history, seen = fit(small(1), watched, num_epochs=2, batch_size=50), watched.seen
    assert history.num_steps == 2 * (216 // 50) and len(history.valid_loss) == 2
    assert set(seen) == set(range(240))
    held = {i for i in seen if seen.count(i) == 4}  # scored before, between and after
    trained = set(seen) - held
    assert len(held) == 24 and len(trained) == 216
    streamed = fit(small(), Streamed(rows()), num_epochs=2, batch_size=60)
    assert streamed.num_steps == 8


def test_a_loader_of_its_own_validates():
    x, held = rows(), rows(seed=1)
    histories = [
        fit(small(), DataLoader(TensorDataset(x), 60), num_epochs=2, validation=validation)
        for validation in ((held,), DataLoader(TensorDataset(held), 70), [held[:99], held[99:]])
    ]
    for history in histories[1:]:
        assert history.valid_loss == pytest.approx(histories[0].valid_loss, rel=1e-6)
    table = fit(small(), x, num_epochs=2, validation=[held])
    assert len(table.valid_loss) == 2 and table.num_steps == 2 * (240 // 32)


def test_the_schedule_of_an_unknown_length_ends_at_zero():
    history = fit(small(), Again(*rows().split(20)), num_epochs=4, lr=0.01)
    rates = [r["lr"] for r in history.records]
    assert rates[1] == pytest.approx(0.01 * (12 / 100) * math.cos(math.pi / 2 * 11 / 36) ** 2 * 2)


@pytest.mark.parametrize(
    ("x", "options", "error", "match"),
    [
        (lambda: iter([rows()]), {}, ValueError, "read only once.*DataLoader.*num_epochs=1"),
        (lambda: Again(), {}, ValueError, "x gave no rows"),
        (lambda: [(rows(),) * 4], {}, ValueError, "batch 1 of x has 4 parts"),
        (lambda: [{"x": rows(), "y": rows()}], {}, ValueError, r"has \['x', 'y'\]; expected x"),
        (lambda: [rows(), rows() * math.nan], {}, ValueError, "240 rows of x.*in batch 2 of x"),
        (lambda: [rows(), rows()[:, :1]], {}, ValueError, "batches disagree on the shape of x"),
        (lambda: [rows()], {"context": rows()}, ValueError, "come with the batches"),
        (lambda: [rows()], {"batch_size": 3}, ValueError, "batch size of its own"),
        (lambda: [rows()], {"validation": 0.2}, ValueError, "a second loader, or rows"),
        (lambda: [rows()], {"validation": iter([rows()])}, ValueError, "validation is an iter"),
        (lambda: [rows()], {"validation": Again()}, ValueError, "validation gave no rows"),
        (lambda: (rows(), rows()), {}, TypeError, r"fit\(flow, x, context\).*got a tuple"),
        (lambda: {"x": rows()}, {}, TypeError, "got a dict of them"),
        (lambda: [["a", "b"]], {}, TypeError, "expects numbers; got list of <U1.*DensityEst"),
        (lambda: rows(), {"ema": 1.0}, ValueError, "ema between 0 and 1; got 1.0"),
        (lambda: rows(), {"callbacks": [3]}, TypeError, "callbacks to be functions"),
        (lambda: rows(), {"clip_norm": 0}, ValueError, "positive clip_norm; got 0"),
        (lambda: rows(), {"checkpoint": "/tmp"}, ValueError, "is a folder"),
    ],
)
def test_batches_that_cannot_be_used_are_refused(x, options, error, match):
    with pytest.raises(error, match=match):
        fit(small(), x(), num_epochs=2, **options)


# ------------------------------------------------------------------------------- what steers it


def test_callbacks_see_each_epoch_and_what_is_true_ends_the_fit():
    seen = []

    def callback(history):
        seen.append(dict(history.records[-1]))
        return history.records[-1]["epoch"] == 3

    history = fit(small(), rows(), num_epochs=9, callbacks=callback)
    assert history.stopped == "callback" and "stopped by callback" in repr(history)
    assert [r["epoch"] for r in seen] == [1, 2, 3] and seen == history.records
    frame = history.frame()
    assert list(frame["valid"]) == history.valid_loss and frame["seconds"].is_monotonic_increasing


def test_an_error_in_a_callback_is_raised_and_the_best_state_is_kept():
    def callback(history):
        if len(history.records) == 3:
            found.append(history)
            raise KeyError("mine")

    for validation in (0.1, 0):
        flow, found = small(), []
        with pytest.raises(KeyError, match="mine"):
            fit(
                flow,
                rows(),
                num_epochs=9,
                lr=0.05,
                standardize=False,
                callbacks=[callback],
                validation=validation,
            )
        assert not flow.training
        held = torch.randperm(240, generator=torch.Generator().manual_seed(0))[:24]
        if validation:
            loss = -flow.log_prob(rows()[held]).mean().item()
            assert loss == pytest.approx(min(found[0].valid_loss), abs=1e-5)
        else:
            assert -flow.log_prob(rows()).mean() < found[0].train_loss[-1]
            assert not torch.equal(state(flow), state(small()))


def test_optimizers_and_schedulers_of_ones_own():
    x, sgd = rows(), partial(torch.optim.SGD, momentum=0.5)
    options = dict(num_epochs=3, lr=0.01, batch_size=72, optimizer=sgd)
    history = fit(small(), x, scheduler=partial(ExponentialLR, gamma=0.5), **options)
    assert [r["lr"] for r in history.records] == pytest.approx([0.01, 0.005, 0.0025])
    one = partial(OneCycleLR, max_lr=0.02, total_steps=9)
    cycle = [r["lr"] for r in fit(small(), x, scheduler=one, **options).records]
    reference = OneCycleLR(torch.optim.SGD([torch.zeros(1)], 0.01, momentum=0.5), 0.02, 9)
    expected = []
    for _ in range(9):
        reference.optimizer.step()
        expected.append(reference.get_last_lr()[0])
        reference.step()
    assert cycle == pytest.approx([*expected[3::3], reference.get_last_lr()[0]], rel=1e-6)
    flat = partial(ReduceLROnPlateau, patience=0, threshold=1e9, threshold_mode="abs")
    rates = [r["lr"] for r in fit(small(), x, scheduler=flat, **options).records]
    assert rates == pytest.approx([0.01, 0.01, 0.001])
    with pytest.raises(TypeError, match="functools.partial"):
        fit(small(), x, optimizer=torch.optim.SGD(small().parameters(), 0.1))
    with pytest.raises(ValueError, match="weight_decay"):
        fit(small(), x, optimizer=torch.optim.SGD, weight_decay=0.1)
    with pytest.raises(ValueError, match="pass lr to fit"):  # which would take its place unseen
        fit(small(), x, optimizer=partial(torch.optim.SGD, lr=0.1))


def test_lbfgs_finds_the_normal():
    x = rows()
    flow = Flow(2, [T.elementwise_affine(2)])
    lbfgs = partial(torch.optim.LBFGS, line_search_fn="strong_wolfe")
    fit(flow, x, num_epochs=4, lr=1.0, batch_size=240, validation=0, optimizer=lbfgs)
    exact = torch.distributions.Normal(x.mean(0), x.std(0, correction=0))
    assert flow.log_prob(x).mean().item() == pytest.approx(
        exact.log_prob(x).sum(-1).mean().item(), abs=1e-4
    )


def test_the_average_is_what_is_kept():
    x, live = rows(), []
    flow = small()

    def callback(history):
        live.append([p.detach().clone() for p in flow.parameters()])

    options = dict(num_epochs=4, batch_size=240, callbacks=callback, validation=(x,))
    history = fit(flow, x, ema=0.9, lr=0.01, **options)
    assert history.num_steps == 4 and history.best_epoch == 3
    start = [p.detach() for p in small().parameters()]
    for n, values in enumerate(live, 1):
        decay = min(0.9, n / (n + 10))
        start = [decay * a + (1 - decay) * b for a, b in zip(start, values, strict=True)]
    for kept, mean in zip(flow.parameters(), start, strict=True):
        torch.testing.assert_close(kept.detach(), mean)


def test_clippers_that_tell_nothing_are_refused():
    with pytest.raises(TypeError, match=r"MedianNorm\(\), not its class"):
        fit(small(), rows(), clip_norm=MedianNorm)
    with pytest.raises(TypeError, match="must return whether the gradients are finite"):
        fit(small(), rows(), clip_norm=partial(torch.nn.utils.clip_grad_norm_, max_norm=1.0))


def test_batches_without_rows_are_no_steps():
    x = rows()
    whole, gappy = small(), small()
    expected = fit(whole, Again(x[:100], x[100:]), num_epochs=2, callbacks=None)
    history = fit(gappy, Again(x[:100], x[:0], x[100:]), num_epochs=2)
    assert history.losses == expected.losses and history.skipped_steps == 0
    assert torch.equal(state(gappy), state(whole))


def test_other_clippers_and_a_time():
    history = fit(small(), rows(), num_epochs=3, clip_norm=MedianNorm(2.0))
    assert history.skipped_steps == 0 and history.num_steps > 9
    short = fit(small(), rows(), num_epochs=10**6, max_time=0.3, patience=10**6)
    assert short.stopped == "max_time" and len(short.records) < 10**5
    assert short.records[-1]["lr"] < 1e-3
    with pytest.raises(ValueError, match="positive max_time; got -1"):
        fit(small(), rows(), max_time=-1)


# ---------------------------------------------------------------------------- interrupted, resumed


class Noisy(Flow):
    """Its noise is drawn from the global generator, as dropout's is."""

    def log_prob(self, value, context=None):
        noise = 0.1 * torch.randn_like(value) if self.training else 0.0
        return super().log_prob(value + noise, context)


def noisy():
    torch.manual_seed(0)
    return Noisy(2, [T.actnorm(2), T.affine_coupling(2, [8])])


def shuffled(x):
    return DataLoader(TensorDataset(x), 48, shuffle=True, generator=torch.Generator())


class Stop:
    """Ctrl-C in the middle of an epoch."""

    def __init__(self, x, at):
        self.x, self.at, self.count = x, at, 0

    def __len__(self):
        return 5

    def __iter__(self):
        for batch in self.x.split(48):
            self.count += 1
            if self.count == self.at:
                raise KeyboardInterrupt
            yield batch


OTHERS = dict(
    optimizer=partial(torch.optim.SGD, momentum=0.9),
    scheduler=partial(OneCycleLR, max_lr=0.02, total_steps=60),
    clip_norm=MedianNorm(1.0),
)


@pytest.mark.parametrize("data", ["rows", "loader"])
@pytest.mark.parametrize("options", [{}, {"ema": 0.9, "validation": (rows(seed=1),)}, OTHERS])
def test_a_fit_goes_on_to_the_same_numbers(tmp_path, data, options):
    make = {"rows": lambda: rows(), "loader": lambda: shuffled(rows())}[data]
    options = dict(num_epochs=6, lr=0.01, **options)
    whole = noisy()
    expected = fit(whole, make(), **options)
    path = tmp_path / "fit.pt"

    def callback(history):
        return len(history.records) in (2, 5)

    flow = noisy()
    torch.manual_seed(99)
    assert fit(flow, make(), checkpoint=path, callbacks=callback, **options).stopped == "callback"
    other = noisy()
    for p in other.parameters():
        p.data.add_(1.0)  # what it begins with does not matter
    fit(other, make(), checkpoint=path, callbacks=callback, **options)
    last = noisy()
    history = fit(last, make(), checkpoint=path, **options)
    assert torch.equal(state(last), state(whole))
    assert history.losses == expected.losses and history.best_epoch == expected.best_epoch
    assert history.train_loss == expected.train_loss
    assert history.valid_loss == expected.valid_loss
    again = noisy()
    finished = fit(again, make(), checkpoint=path, **options)
    assert torch.equal(state(again), state(whole)) and finished.losses == expected.losses


class Drawn(Dataset):
    """Rows with noise of the global generator, or of their own."""

    def __init__(self, generator=None):
        self.x, self.generator = rows(), generator

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i] + 0.1 * torch.randn(2, generator=self.generator)


def nested():
    sampler = RandomSampler(range(240), generator=torch.Generator().manual_seed(5))
    return DataLoader(TensorDataset(rows()), batch_sampler=BatchSampler(sampler, 48, True))


RANDOM = {
    "global": lambda: DataLoader(Drawn(), 48),
    "own": lambda: DataLoader(Drawn(torch.Generator().manual_seed(5)), 48),
    "nested": nested,
}


@pytest.mark.parametrize("kind", RANDOM)
def test_what_loaders_draw_goes_on_too(tmp_path, kind):
    make, path = RANDOM[kind], tmp_path / "fit.pt"
    whole, parted, held = small(), small(), RANDOM["own"]
    options = dict(num_epochs=4, lr=0.01)
    expected = fit(whole, make(), validation=held(), **options)
    options["checkpoint"] = path
    fit(small(), make(), validation=held(), callbacks=lambda h: len(h.records) == 2, **options)
    history = fit(parted, make(), validation=held(), **options)
    assert history.losses == expected.losses and history.valid_loss == expected.valid_loss
    assert torch.equal(state(parted), state(whole))


def test_ctrl_c_in_the_middle_of_an_epoch(tmp_path):
    x, path = rows(), tmp_path / "fit.pt"
    whole, flow = noisy(), noisy()
    expected = fit(whole, Stop(x, at=0), num_epochs=4)
    history = fit(flow, Stop(x, at=18), num_epochs=4, checkpoint=path)
    assert history.interrupted and len(history.records) == 2
    history = fit(flow, Stop(x, at=0), num_epochs=4, checkpoint=path)
    assert history.losses == expected.losses and torch.equal(state(flow), state(whole))


_FRESH = """
import sys, torch
sys.path.insert(0, {tests!r})
from test_training_runs import fit, noisy, rows, state
flow = noisy()
fit(flow, rows(), num_epochs=5, lr=0.01, checkpoint={path!r})
torch.save(state(flow), {out!r})
"""


def test_a_fresh_process_goes_on(tmp_path):
    whole = noisy()
    fit(whole, rows(), num_epochs=5, lr=0.01)
    path, out = str(tmp_path / "fit.pt"), str(tmp_path / "out.pt")
    fit(noisy(), rows(), num_epochs=5, lr=0.01, checkpoint=path, callbacks=lambda h: True)
    script = _FRESH.format(tests=str(Path(__file__).parent), path=path, out=out)
    environment = {**os.environ, "PYTHONPATH": f"{Path(pf.__file__).parents[1]}"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, timeout=120)
    assert torch.equal(torch.load(out), state(whole))


def test_checkpoints_of_other_fits_are_refused(tmp_path):
    path = tmp_path / "fit.pt"
    fit(small(), rows(), num_epochs=2, checkpoint=path)
    written = path.read_bytes()
    with pytest.raises(ValueError, match=r"of another fit: lr was '0.002' and is '0.1'"):
        fit(small(), rows(), num_epochs=2, lr=0.1, checkpoint=path)
    with pytest.raises(ValueError, match="another fit: rows was"):
        fit(small(), rows() + 1, num_epochs=2, checkpoint=path)
    with pytest.raises(ValueError, match="another fit: flow was"):
        fit(noisy(), rows(), num_epochs=2, checkpoint=path)
    assert path.read_bytes() == written and [p.name for p in tmp_path.iterdir()] == ["fit.pt"]
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="no checkpoint of a fit"):
        fit(small(), rows(), num_epochs=2, checkpoint=path)


# ------------------------------------------------------------------------- processes that share


def shared(rank):
    """Fits of which each of two processes has its share."""
    found = {}
    watched = Watched(rows())
    fit(small(1), watched, num_epochs=1, batch_size=20, standardize=False)
    found["seen"] = torch.tensor(watched.seen)
    for kind in ("rows", "weighted", "loader"):
        flow = small(seed=rank)  # what the first has counts
        x, weight = rows(), torch.linspace(0, 1, 240)
        options = dict(num_epochs=3, lr=0.01, validation=(rows(seed=1),))
        if kind == "loader":
            data = [x[:81][rank::2], x[81:][rank::2], x[:30]][: 2 + rank]
            fit(flow, data, standardize=False, **options)
        else:
            w = weight if kind == "weighted" else None
            fit(flow, x, sample_weight=w, batch_size=81, **options)
        found[kind] = state(flow)
    return found


def alone():
    found, x = {}, rows()
    options = dict(num_epochs=3, lr=0.01, validation=(rows(seed=1),))
    for kind in ("rows", "weighted", "loader"):
        flow = small()
        if kind == "loader":
            fit(flow, [x[:81], x[81:]], standardize=False, **options)
        else:
            weight = torch.linspace(0, 1, 240) if kind == "weighted" else None
            fit(flow, x, sample_weight=weight, batch_size=81, **options)
        found[kind] = state(flow)
    return found


def test_two_processes_fit_as_one(tmp_path):
    environment = {**os.environ, "PYTHONPATH": f"{Path(pf.__file__).parents[1]}"}
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, tmp_path, str(rank)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in (0, 1)
    ]
    for worker in workers:
        _, error = worker.communicate(timeout=120)
        assert worker.returncode == 0, error.decode()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    shares = [set(f.pop("seen").unique(return_counts=True)[0].tolist()) for f in (first, second)]
    assert len(shares[0] & shares[1]) == 24  # what is held out
    assert len(shares[0] | shares[1]) == 24 + 2 * (108 // 10) * 10
    for kind, one in alone().items():
        torch.testing.assert_close(first[kind], second[kind], atol=0, rtol=0)
        torch.testing.assert_close(first[kind], one, atol=1e-5, rtol=1e-4)
    assert (tmp_path / "written.pt").exists()


def work(folder, rank):
    """One of two processes."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    found = shared(rank)
    seen = []
    checkpoint = Path(folder) / "written.pt"
    pf.fit(small(), rows(), num_epochs=1, checkpoint=checkpoint, callbacks=seen.append)
    assert len(seen) == (rank == 0)
    mine = small()
    fit(mine, rows(seed=rank), num_epochs=1, distributed=False)
    found["apart"] = state(mine)
    torch.save(found, Path(folder) / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    work(sys.argv[1], int(sys.argv[2]))
