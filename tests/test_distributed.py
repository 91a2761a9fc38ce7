"""Processes that train together agree on what layers take from the data."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

import pyroflows as pf
from pyroflows import transforms as T
from pyroflows.flow import Flow


class Loss(nn.Module):
    """What a wrapper for training calls."""

    def __init__(self, flow):
        super().__init__()
        self.flow = flow

    def forward(self, y):
        return -self.flow.log_prob(y).mean()


def build(kind):
    torch.manual_seed(0)
    layer = T.actnorm(3) if kind == "actnorm" else T.batchnorm(3, momentum=0.5)
    mask = T.half_mask(3, swap=True)
    affine = T.elementwise_affine(3)
    couplings = T.affine_coupling(3, [8]), T.affine_coupling(3, [8], mask=mask)
    return Flow(3, [couplings[0], layer, couplings[1], affine])


def rows():
    data = torch.randn(64, 3, generator=torch.Generator().manual_seed(1))
    return data * torch.tensor([1.0, 5.0, 0.2]) + torch.arange(64.0)[:, None] / 16  # unlike halves


def train(flow, loss, data):
    optimizer = torch.optim.SGD(flow.parameters(), 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        loss(data).backward()
        optimizer.step()
    return {name: value.clone() for name, value in flow.state_dict().items()}


def test_two_processes_train_as_one(tmp_path):
    environment = {**os.environ, "PYTHONPATH": f"{Path(pf.__file__).parents[1]}"}
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, tmp_path, str(rank)],
            env=environment,
            stderr=subprocess.PIPE,
        )
        for rank in (0, 1)
    ]
    for worker in workers:
        _, error = worker.communicate(timeout=120)
        assert worker.returncode == 0, error.decode()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for kind in ("actnorm", "batchnorm"):
        flow = build(kind)
        alone = train(flow, Loss(flow), rows())
        torch.testing.assert_close(first[kind], second[kind], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(first[kind], alone, atol=1e-5, rtol=1e-4)


def work(folder, rank):
    """One of two processes; each has half of the rows."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    found = {}
    for kind in ("actnorm", "batchnorm"):
        flow = build(kind)
        parallel = nn.parallel.DistributedDataParallel(Loss(flow))
        found[kind] = train(flow, parallel, rows().chunk(2)[rank])
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    work(sys.argv[1], int(sys.argv[2]))
