"""glibc's allocator, told how tensors come and go: on a CPU a training step then takes less time and memory.

It reads its settings once, when a process starts, so a process that wants others begins anew.
"""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress

VARIABLE = "GLIBC_TUNABLES"
SETTINGS = ":".join(
    f"glibc.malloc.{name}={value}"
    for name, value in {
        # Memory that is freed stays with the process, which asks for it again in the next step.
        "mmap_threshold": 2**30,
        "trim_threshold": 2**31 - 1,
        # A tensor is aligned, which cuts slivers off the block that it gets. As long as these are kept for small
        # objects, the block cannot grow together again, and is too short for the next tensor of that size.
        "tcache_count": 0,
        "mxfast": 0,
        # Pages of 2 MiB, where the system has them for the asking.
        "hugetlb": 1,
    }.items()
)
_ACCELERATORS = "/dev/nvidiactl", "/dev/kfd"
"""There are these where a driver of CUDA or of ROCm runs."""


def begin_anew(args: Sequence[str]) -> None:
    """Replaces this process by one with `SETTINGS`, if it is going to train on a CPU with glibc and has no others.

    Args:
        args: those of `uldm`; what trains is `uldm GROUP train`.
    """
    trains = args[1:2] == ["train"] and not {"--help", "--dry-run"} & set(args)
    if not trains or sys.platform != "linux" or VARIABLE in os.environ or any(map(os.path.exists, _ACCELERATORS)):
        return
    os.environ[VARIABLE] = SETTINGS
    with suppress(OSError):  # what cannot begin anew goes on as it is
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
