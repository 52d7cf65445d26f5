"""How many processes share the work, and which of them this is, as torchrun and accelerate tell it."""

import os

from uldm_cli.errors import ConfigError


def processes() -> int:
    """How many processes the launcher started.

    Raises:
        ConfigError: WORLD_SIZE is no number of processes.
    """
    given = os.environ.get("WORLD_SIZE") or "1"
    if not given.isdecimal() or not int(given):
        raise ConfigError(f"WORLD_SIZE={given} in the environment is no number of processes", "Unset it")
    return int(given)


def sharded() -> bool:
    """Whether each of them is to hold a part of the weights only, as `accelerate launch --use_fsdp` asks for."""
    return processes() > 1 and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def neighbours() -> tuple[int, int]:
    """This process's number among those on this machine, and how many they are."""
    return int(os.environ.get("LOCAL_RANK") or 0), int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
