"""What the tests of the core share: the reference's small models (see tests/golden), and computing in two processes."""

import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import uldm_cli
from uldm_cli.core.latent import LatentDiffusion
from uldm_cli.runs.models import load_latent_diffusion, resolve

FOLDER = Path(__file__).parents[1] / "golden" / "compvis"


@dataclass(frozen=True)
class Golden:
    """A model of the reference and what it computed."""

    model: LatentDiffusion
    """With the averaged weights."""
    stored: dict[str, Tensor]
    """Inputs and results by name; see the README beside the files."""


@pytest.fixture(scope="session", params=sorted(path.name for path in FOLDER.iterdir()))
def golden(request: pytest.FixtureRequest, golden_checkpoint: Callable[[str], Path]) -> Golden:
    model = load_latent_diffusion(resolve(str(golden_checkpoint(request.param))))
    return Golden(model, load_file(FOLDER / request.param / "golden.safetensors"))


@dataclass(frozen=True)
class Computed:
    """What `compute()` in a file of tests returned."""

    alone: dict[str, Tensor]
    """In one process."""
    parts: list[dict[str, Tensor]]
    """In each of two, which form a group of `torch.distributed`."""


RANK_OF_TWO = """
import os, runpy, sys, torch
import torch.distributed as dist
file, rank, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
torch.save(runpy.run_path(file)["compute"](), f"{folder}/{rank}.pt")
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # a thread of torch's that still runs while Python shuts down may abort what is done and saved
"""


@pytest.fixture(scope="module")
def computed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Computed:
    """What the function `compute` beside the test returns, in one process and in two."""
    file, folder = str(request.path), tmp_path_factory.mktemp("two")
    environment = os.environ | {"PYTHONPATH": str(Path(uldm_cli.__file__).parents[1]), "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-c", RANK_OF_TWO, file]
    started = [
        subprocess.Popen([*command, str(rank), str(folder)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    alone = runpy.run_path(file)["compute"]()
    for process in started:
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
    return Computed(alone, [torch.load(folder / f"{rank}.pt") for rank in (0, 1)])
