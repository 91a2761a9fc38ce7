"""The device audit must catch what it is for; otherwise its silence says nothing."""

import functools

import pytest
import torch
from device import (
    FakeGPU,
    MixedDevices,
    audit_process,
    check_factories,
    on_fake_gpu,
    stray_tensors,
)
from torch import nn


class Clean(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("order", torch.tensor([2, 0, 1]))

    def forward(self, x):
        h = self.linear(x[..., self.order])
        return h + torch.arange(3, device=x.device, dtype=x.dtype)


class Stray(Clean):
    def __init__(self, hide):
        super().__init__()
        self.hidden = hide(torch.ones(3))


class Forgetful(Clean):
    def forward(self, x):
        return super().forward(x) + torch.zeros(3)


class Careless(Clean):
    def forward(self, x):
        return super().forward(x).detach().cpu()


class Slotted:
    __slots__ = ("tensor",)

    def __init__(self, tensor):
        self.tensor = tensor


HIDING_PLACES = {
    "attribute": lambda t: t,
    "list": lambda t: [t],
    "dict": lambda t: {"a": {"b": t}},
    "closure": lambda t: lambda: t,
    "default": lambda t: eval("lambda a=t: a", {"t": t}),
    "partial": lambda t: functools.partial(torch.add, t),
    "slots": Slotted,
    "class attribute": lambda t: type("Constants", (), {"one": t})(),
}


def test_clean_module_passes():
    module, x = Clean(), torch.randn(4, 3)
    assert stray_tensors(module) == []
    torch.testing.assert_close(check_factories(module, x), module(x))
    assert module.linear.weight.device.type == "cpu"


@pytest.mark.parametrize("place", HIDING_PLACES)
def test_stray_tensor_is_named(place):
    module = Stray(HIDING_PLACES[place])
    (path,) = stray_tensors(module)
    assert path.startswith(".hidden")


def test_factory_without_device_is_caught():
    x = torch.randn(4, 3)
    with pytest.raises(RuntimeError, match="meta|device"):
        check_factories(Forgetful(), x)
    with pytest.raises(MixedDevices, match=r"\(2,\)"):
        check_factories(lambda: torch.zeros(2))


@audit_process
def test_values_and_gradients_are_those_of_the_cpu():
    module, x = Clean(), torch.randn(4, 3)

    def loss_and_gradient(module, x):
        loss = torch.logsumexp(module(x).sin(), -1).mean()
        loss.backward()
        return loss, module.linear.weight.grad

    on_gpu = on_fake_gpu(loss_and_gradient, module, x)
    torch.testing.assert_close(on_gpu, loss_and_gradient(module, x))


@audit_process
def test_optimizers_and_copies_run():
    def train(module, x):
        optimizer = torch.optim.Adam(module.parameters(), lr=0.1, fused=True)
        for _ in range(3):
            optimizer.zero_grad()
            module(x).square().mean().backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
        best = {name: value.detach().clone() for name, value in module.state_dict().items()}
        module.load_state_dict(best)
        return module.linear.weight.detach()

    module, x = Clean(), torch.randn(4, 3)
    on_gpu = on_fake_gpu(train, module, x)
    torch.testing.assert_close(on_gpu, train(module, x))


@audit_process
def test_factories():
    with FakeGPU():
        for tensor in [
            torch.zeros(2, device="fakegpu"),
            torch.tensor([1.0, 2.0], device="fakegpu"),
            torch.arange(3, device="fakegpu"),
            torch.randn(3).to("fakegpu").new_ones(2),
            torch.randn(2, device="fakegpu").double(),
        ]:
            assert tensor.device == torch.device("fakegpu", 0)
            assert tensor.cpu().device.type == "cpu"
        assert torch.ones((), device="fakegpu").item() == 1.0
        assert torch.ones(2, device="fakegpu").tolist() == [1.0, 1.0]


@audit_process
def test_hidden_tensor_factory_and_wrong_output_are_caught():
    x = torch.randn(4, 3)
    torch.testing.assert_close(on_fake_gpu(Clean(), x).shape, x.shape)
    with pytest.raises(MixedDevices, match="aten.add.Tensor"):
        on_fake_gpu(Forgetful(), x)
    with pytest.raises(MixedDevices, match="outputs"):
        on_fake_gpu(Careless(), x)


def _mixtures(cpu, gpu):
    first = torch.zeros(1, dtype=torch.long)
    return {
        "add": lambda: gpu + cpu,
        "scalar on the GPU": lambda: torch.tensor(1.0, device="fakegpu") + cpu,
        "where": lambda: torch.where(gpu > 0, gpu, cpu),
        "cat": lambda: torch.cat([gpu, cpu]),
        "gather": lambda: gpu.gather(0, first),
        "matrix product": lambda: gpu @ cpu,
        "matrix product with a scalar": lambda: torch.outer(gpu, cpu[:1]),
        "index": lambda: cpu[first.to("fakegpu")],
        "index_put": lambda: gpu.index_put((first,), cpu[:1]),
        "generator": lambda: torch.randn(3, device="fakegpu", generator=torch.Generator()),
    }


@pytest.mark.parametrize("operation", _mixtures(torch.ones(3), torch.ones(3)))
@audit_process
def test_mixture_is_refused(operation):
    with FakeGPU():
        cpu, gpu = torch.ones(3), torch.ones(3, device="fakegpu")
        with pytest.raises(MixedDevices):
            _mixtures(cpu, gpu)[operation]()


@audit_process
def test_mixture_that_cuda_takes():
    with FakeGPU():
        cpu, gpu = torch.ones(3), torch.ones(3, device="fakegpu")
        for out in [gpu + torch.tensor(1.0), gpu[torch.tensor([0, 2])], gpu.copy_(cpu)]:
            assert out.device.type == "fakegpu"
        with pytest.raises((TypeError, RuntimeError)):
            gpu.numpy()
