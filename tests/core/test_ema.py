"""Moving averages of weights, against loops written out by hand and recorded trajectories."""

import pytest
import torch
from torch import Tensor, nn

from uldm_cli.core.ema import EMA, WIDEST, PowerEMA, Profiles, gamma_of, post_hoc_factors


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


# Averages of a width that grows with the training


def whole_numbers_left_out(module: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in copied(module).items() if value.is_floating_point()}


@pytest.mark.parametrize("sigma", [0.01, 0.05, 0.1, 0.25, 0.28])
def test_the_power_of_a_width(sigma: float) -> None:
    """The standard deviation of the density (gamma + 1) u^gamma on [0, 1], by the moments of that density."""
    gamma = gamma_of(sigma)
    mean, square = (gamma + 1) / (gamma + 2), (gamma + 1) / (gamma + 3)
    assert (square - mean**2) ** 0.5 == pytest.approx(sigma, rel=1e-9)


def test_the_papers_powers() -> None:
    """Karras et al. 2024, section 3.1: gamma is 6.94 for 10 %, 16.97 for 5 %; a plain mean has the greatest width."""
    assert (gamma_of(0.10), gamma_of(0.05)) == pytest.approx((6.94, 16.97), abs=0.005)
    assert gamma_of(WIDEST) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("sigma", [0.05, 0.2, 0.28])
def test_equals_the_average_of_a_recorded_trajectory(sigma: float) -> None:
    module, steps = Module(), 40
    ema = PowerEMA(module, sigma)
    trajectory = []
    for n in range(1, steps + 1):
        module.change(n)
        ema.update()
        trajectory.append(whole_numbers_left_out(module))
    exponent = gamma_of(sigma) + 1
    shares = [(k**exponent - (k - 1) ** exponent) / steps**exponent for k in range(1, steps + 1)]
    assert sum(shares) == pytest.approx(1)
    for name in trajectory[0]:
        expected = sum(share * weights[name].double() for share, weights in zip(shares, trajectory, strict=True))
        torch.testing.assert_close(ema.state[name].double(), expected, rtol=1e-5, atol=1e-5)
    assert ema.state["count"] == module.count
    assert ema.state["ready"] == module.ready


def walk(steps: int) -> Tensor:
    """Weights that wander: float64 `[steps, 64]`."""
    generator = torch.Generator().manual_seed(0)
    return torch.cumsum(torch.randn(steps, 64, generator=generator, dtype=torch.float64), 0)


def stored(trajectory: Tensor, sigmas: list[float], every: int) -> tuple[list[int], list[float], Tensor]:
    """What a training keeps: updates and widths of its averages, and the averages themselves in float32."""
    module = nn.Linear(1, 64, bias=False).double()
    profiles = Profiles(module, sigmas)
    found, updates, widths = [], [], []
    for n, weights in enumerate(trajectory, 1):
        with torch.no_grad():
            module.weight.copy_(weights[:, None])
        profiles.update()
        if n % every == 0:
            for average in profiles.averages:
                found.append(average.state["weight"].flatten().float())
                updates.append(average.updates)
                widths.append(average.sigma_rel)
    return updates, widths, torch.stack(found)


@pytest.mark.parametrize("wanted", [0.06, 0.08, 0.10, 0.13])
def test_an_average_that_was_not_tracked_is_made_of_those_that_were(wanted: float) -> None:
    trajectory = walk(2000)
    updates, widths, averages = stored(trajectory, [0.05, 0.10], 100)
    factors, missed = post_hoc_factors(updates, widths, 2000, wanted)
    assert sum(factors) == pytest.approx(1)
    made = torch.tensor(factors, dtype=torch.float64) @ averages.double()
    _, _, tracked = stored(trajectory, [wanted], 2000)
    wandered = (trajectory[-1] - tracked[0]).std()  # how much averaging matters here
    assert (made - tracked[0]).std() < 0.01 * wandered
    assert missed < 0.02


def test_an_average_of_an_earlier_step_is_made_likewise() -> None:
    trajectory = walk(2000)
    updates, widths, averages = stored(trajectory[:1200], [0.05, 0.10], 100)
    factors, _ = post_hoc_factors(updates, widths, 1200, 0.07)
    made = torch.tensor(factors, dtype=torch.float64) @ averages.double()
    _, _, tracked = stored(trajectory[:1200], [0.07], 1200)
    assert (made - tracked[0]).std() < 0.01 * (trajectory[1199] - tracked[0]).std()


def test_an_average_that_was_kept_is_itself() -> None:
    factors, missed = post_hoc_factors([500, 500, 1000, 1000], [0.05, 0.1, 0.05, 0.1], 1000, 0.05)
    assert factors == pytest.approx([0, 0, 1, 0], abs=1e-6)
    assert missed == pytest.approx(0, abs=1e-6)


def test_how_far_an_average_is_from_the_wanted_is_known() -> None:
    """By the weights themselves, which one can write down: each stored average is a mixture of steps."""
    updates, widths, steps = [600, 600, 1200, 1200], [0.05, 0.1, 0.05, 0.1], 1200

    def shares(n: int, sigma: float) -> Tensor:
        k, power = torch.arange(steps + 1, dtype=torch.float64).clamp(max=n), gamma_of(sigma) + 1
        return ((k / n) ** power).diff()

    factors, missed = post_hoc_factors(updates, widths, steps, 0.2)
    mixture = sum(f * shares(n, sigma) for f, n, sigma in zip(factors, updates, widths, strict=True))
    wanted = shares(steps, 0.2)
    assert missed == pytest.approx(float((mixture - wanted).norm() / wanted.norm()), rel=0.01)
    assert missed > 0.2


def test_profiles_continue_from_what_was_stored() -> None:
    def trained(stop: int | None) -> Profiles:
        module = Module()
        profiles = Profiles(module, [0.05, 0.2])
        for n in range(1, 11):
            if n == stop:
                state = {name: value.clone() for name, value in profiles.state_dict().items()}
                profiles = Profiles(module, [0.05, 0.2])
                profiles.load_state_dict(state)
            module.change(n)
            profiles.update()
        return profiles

    whole, resumed = trained(None), trained(5)
    assert_same(resumed.state_dict(), whole.state_dict())
    assert whole.state_dict()["updates"].tolist() == [10, 10]


def test_no_profiles_hold_nothing() -> None:
    profiles = Profiles(Module(), [])
    profiles.update()
    profiles.load_state_dict({})
    assert profiles.state_dict() == {}
