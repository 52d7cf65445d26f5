"""glibc's settings, in processes of their own: one that begins anew is still the same to whoever started it."""

import os
import platform
import subprocess
import sys

import pytest

from uldm_cli.allocator import SETTINGS, VARIABLE

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")
UNTOLD = {name: value for name, value in os.environ.items() if name != VARIABLE}
# Says what it is, as if there were no accelerator.
BEGINS = f"""
import os, sys
from uldm_cli import allocator
allocator._ACCELERATORS = {{accelerators}}
allocator.begin_anew(sys.argv[1:])
print(os.getpid(), os.environ.get("{VARIABLE}"), *sys.argv[1:], sep="|")
"""
# 20 tensors of 40 MB, one after the other: page faults, and by how many MB the process grew after the first.
COMING_AND_GOING = """
import re, resource, torch
torch.set_num_threads(1)
scores = torch.zeros(10, 1000, 1000)

def megabytes():
    return int(re.search(r"VmData:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) // 1000

before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.softmax(scores, dim=-1)
first = megabytes()
for _ in range(19):
    torch.softmax(scores, dim=-1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, megabytes() - first)
"""


def begun(*args: str, environment: dict[str, str] = UNTOLD, accelerators: tuple[str, ...] = ()) -> list[str]:
    """The settings and the arguments of a process that may have begun anew, which has kept its number."""
    command = [sys.executable, "-c", BEGINS.format(accelerators=accelerators), *args]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        out, _ = process.communicate()
    number, *rest = out.rstrip("\n").split("|")
    assert process.returncode == 0
    assert int(number) == process.pid
    return rest


@pytest.mark.parametrize("group", ["vqvae", "ldm"])
def test_what_trains_begins_anew_with_its_arguments(group: str) -> None:
    assert begun(group, "train", "data=a b", "--seed", "3") == [SETTINGS, group, "train", "data=a b", "--seed", "3"]


@pytest.mark.parametrize(
    "args", [(), ("ldm",), ("ldm", "sample"), ("ldm", "train", "--help"), ("vqvae", "train", "--dry-run")]
)
def test_nothing_else_does(args: tuple[str, ...]) -> None:
    assert begun(*args) == ["None", *args]


@pytest.mark.parametrize("own", ["glibc.malloc.arena_max=2", ""])
def test_settings_of_the_users_own_stay(own: str) -> None:
    assert begun("ldm", "train", environment=UNTOLD | {VARIABLE: own}) == [own, "ldm", "train"]


def test_not_where_an_accelerator_may_train() -> None:
    assert begun("ldm", "train", accelerators=("/dev/null",)) == ["None", "ldm", "train"]


def coming_and_going(environment: dict[str, str]) -> tuple[int, int]:
    command = [sys.executable, "-c", COMING_AND_GOING]
    said = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    faults, grown = map(int, said.split())
    return faults, grown


def test_a_tensor_gets_the_memory_of_one_of_its_size_that_is_gone() -> None:
    """Where it is given back, all of it is asked for every time; where it is kept but in slivers, ever more is."""
    faults, grown = coming_and_going(UNTOLD | {VARIABLE: SETTINGS})
    assert faults < 1.1 / 20 * coming_and_going(UNTOLD)[0]
    assert grown < 40
