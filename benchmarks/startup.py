"""How long `uldm` takes to show a help, as a ratio to `import torch` on the same machine in the same minutes.

python benchmarks/startup.py            # a table
python benchmarks/startup.py --check    # and exit 1 where a ratio is over its limit
"""

import argparse
import os
import subprocess
import sys
import time
from statistics import median

from uldm_cli import console
from uldm_cli.cli.app import GROUPS, builtin_group

ROOT_LIMIT = 0.15
SUBCOMMAND_LIMIT = 0.25
TORCH = ("-c", "import torch")


def helps() -> list[tuple[str, ...]]:
    """The arguments of every help there is: the root's, the groups', the commands'."""
    commands = [(group, name) for group in GROUPS for name in builtin_group(group).commands]
    return [(*words, "--help") for words in [(), *((group,) for group in GROUPS), *commands]]


def seconds(arguments: tuple[str, ...]) -> float:
    """Wall-clock time of one fresh interpreter."""
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, env=os.environ)
    return time.perf_counter() - began


def measure(rounds: int) -> dict[tuple[str, ...], float]:
    """The median of each call, in seconds. The calls take turns, so that a slow moment strikes all of them."""
    calls = [TORCH, *(("-m", "uldm_cli", *help_) for help_ in helps())]
    times: dict[tuple[str, ...], list[float]] = {call: [] for call in calls}
    for call in calls:
        seconds(call)  # fills the disk cache and writes the bytecode
    with console.progress(rounds * len(calls), "starting", "processes") as progress:
        for _ in range(rounds):
            for call in calls:
                times[call].append(seconds(call))
                progress.advance()
    return {call: median(taken) for call, taken in times.items()}


def main() -> int:
    """Print the table; 1 where `--check` finds a ratio over its limit."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="runs of each call; their median counts (default: 5)")
    parser.add_argument("--check", action="store_true", help="exit 1 where a ratio is over its limit")
    parser.add_argument("--json", action="store_true", help="the figures as JSON")
    options = parser.parse_args()
    console.configure(json=options.json)
    medians = measure(options.rounds)
    torch = medians.pop(TORCH)
    rows = [
        (
            " ".join(["uldm", *call[2:]]),
            taken,
            taken / torch,
            ROOT_LIMIT if call[2:] == ("--help",) else SUBCOMMAND_LIMIT,
        )
        for call, taken in medians.items()
    ]
    over = [name for name, _, ratio, limit in rows if ratio > limit]
    console.result(
        {
            "torch_seconds": torch,
            "calls": [dict(zip(("call", "seconds", "ratio", "limit"), row, strict=True)) for row in rows],
        },
        columns=("call", "seconds", "ratio", "limit"),
        rows=rows,
        summary=f"import torch: {torch:.2f} s. "
        + (f"over the limit: {', '.join(over)}" if over else "all within limits"),
    )
    return 1 if over and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
