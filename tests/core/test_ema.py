"""The moving average of weights, against a loop written out by hand."""

import pytest
import torch
from torch import Tensor, nn

from uldm_cli.core.ema import EMA


class Module(nn.Module):
    """Parameters, a buffer that is averaged too, and ones that cannot be."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.register_buffer("codebook", torch.randn(5, 2))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("ready", torch.tensor(False))

    @torch.no_grad()
    def change(self, step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        for tensor in (*self.parameters(), self.codebook):
            tensor += torch.randn(tensor.shape, generator=generator)
        self.count += 1
        self.ready.fill_(step > 2)


def copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize(("decay", "steps"), [(0.999, 30), (0.5, 30), (0.0, 3)])
def test_equals_a_loop_by_hand(decay: float, steps: int) -> None:
    module = Module()
    ema = EMA(module, decay)
    expected = {name: value.double() for name, value in copied(module).items()}
    for n in range(1, steps + 1):
        module.change(n)
        ema.update()
        weight = min(decay, (1 + n) / (10 + n))
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                expected[name] = weight * expected[name] + (1 - weight) * value.double()
            else:
                expected[name] = value.double()
    assert ema.updates == steps
    for name, value in ema.state.items():
        assert value.dtype == module.state_dict()[name].dtype
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-5)


def test_the_decay_warms_up_to_its_value() -> None:
    """From 0 towards 1: the share that the average takes of the new value in the n-th update."""
    module = nn.Linear(1, 1, bias=False)
    shares = []
    for n in (1, 10, 100, 100_000):
        nn.init.zeros_(module.weight)
        ema = EMA(module, 0.99)
        ema.updates = n - 1
        nn.init.ones_(module.weight)
        ema.update()
        shares.append(ema.state["weight"].item())
    assert shares == pytest.approx([9 / 11, 9 / 20, 9 / 110, 0.01], rel=1e-5)


def test_applied_is_the_average_and_then_the_same_bits_again() -> None:
    module = Module()
    ema = EMA(module, 0.9)
    module.change(1)
    ema.update()
    own, average = copied(module), {name: value.clone() for name, value in ema.state.items()}
    with ema.applied():
        assert torch.is_grad_enabled()
        assert_same(copied(module), average)
        assert not torch.equal(module.conv.weight, own["conv.weight"])
    assert_same(copied(module), own)
    assert_same(ema.state, average)


def test_applied_restores_after_an_error() -> None:
    module = Module()
    ema = EMA(module, 0.9)
    module.change(1)
    own = copied(module)
    with pytest.raises(ZeroDivisionError), ema.applied():
        raise ZeroDivisionError
    assert_same(copied(module), own)
    assert torch.is_grad_enabled()


def test_continues_from_a_stored_average() -> None:
    def trained(stop: int | None) -> EMA:
        module = Module()
        ema = EMA(module, 0.999)
        for n in range(1, 11):
            if n == stop:
                stored = {name: value.clone() for name, value in ema.state.items()}
                updates, ema = ema.updates, EMA(module, 0.999)
                ema.load(stored, updates)
            module.change(n)
            ema.update()
        return ema

    whole, resumed = trained(None), trained(5)
    assert resumed.updates == whole.updates == 10
    assert_same(resumed.state, whole.state)
