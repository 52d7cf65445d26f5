"""Which timesteps a sampling run visits. Plain integers: a plan asks before torch is there."""

from uldm_cli.errors import ConfigError, UsageError


def uniform_timesteps(T: int, steps: int) -> list[int]:
    """The timesteps of a sampling run, falling, with the one that the last step arrives at: `steps + 1` integers.

    `t_i = floor(i T / steps) + 1`, arriving at 0. For every divisor of T below T this is the spacing of the
    latent-diffusion code; any other number gives exactly the steps asked for. With `steps = T` every timestep from
    T - 1 to 0 is taken, arriving at the clean end, -1.

    Raises:
        UsageError: fewer than one step, or more than T.
    """
    _check(T, steps)
    if steps == T:
        return list(range(T - 1, -2, -1))
    return [i * T // steps + 1 for i in range(steps - 1, -1, -1)] + [0]


def trailing_timesteps(T: int, steps: int) -> list[int]:
    """As many timesteps, evenly spread from the last, T - 1, on, and the clean end, -1 (Lin et al. 2023, table 2).

    `t_i = round(T - i T / steps) - 1`, halves being rounded to the even number. A model whose last timestep holds no
    signal was trained to begin there.

    Raises:
        UsageError: fewer than one step, or more than T.
    """
    _check(T, steps)
    return [round(T - i * T / steps) - 1 for i in range(steps)] + [-1]


def compvis_timesteps(T: int, steps: int) -> list[int]:
    """The timesteps of the latent-diffusion code, falling, arriving at 0: often more than the `steps` asked for.

    They lie `T // steps` apart, from 1 on, so that of 1000 timesteps "400 steps" makes 500.

    Raises:
        ConfigError: the last of them would lie beyond the schedule, where that code fails; names the numbers that work.
    """
    if not _compvis_works(T, steps):
        hint = _working_neighbours(T, steps)
        raise ConfigError(f"the compvis spacing cannot take {steps} steps over {T} timesteps", hint)
    return [t + 1 for t in reversed(range(0, T, T // steps))] + [0]


def _check(T: int, steps: int) -> None:
    if not 1 <= steps <= T:
        raise UsageError(f"{steps} sampling steps asked for", f"The model's schedule allows 1 to {T}")


def _compvis_works(T: int, steps: int) -> bool:
    return 1 <= steps <= T and (T - 1) % (T // steps) != 0


def _working_neighbours(T: int, steps: int) -> str | None:
    below = next((n for n in range(min(steps, T), 0, -1) if _compvis_works(T, n)), None)
    above = next((n for n in range(max(steps, 1), T) if _compvis_works(T, n)), None)
    named = [f"{n} (it makes {len(compvis_timesteps(T, n)) - 1})" for n in (below, above) if n is not None]
    return f"The nearest that work: {' and '.join(named)}" if named else None
