"""Names of devices and precisions."""

import pytest
import torch

from uldm_cli.core.device import pick_device, pick_dtype
from uldm_cli.errors import UsageError

CPU = torch.device("cpu")
without_accelerator = pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has an accelerator")


def test_cpu() -> None:
    assert pick_device("cpu") == CPU


@without_accelerator
def test_auto_falls_back_to_the_cpu() -> None:
    assert pick_device("auto") == CPU


# The last ones are names that torch knows, but nothing could be computed on.
@pytest.mark.parametrize("name", ["cuda:99", "", "gpu", "CPU", " cpu", "cpu:x", "0", "mkldnn", "meta", "hpu", "xla"])
def test_what_is_no_device_here_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        pick_device(name)
    assert str(caught.value).startswith(f"--device {name} cannot be used on this machine. Use auto, or one of: ")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


@without_accelerator
@pytest.mark.parametrize("name", ["cuda", "cuda:0", "mps"])
def test_accelerator_that_is_not_there(name: str) -> None:
    with pytest.raises(UsageError, match=f"^--device {name} cannot be used on this machine. Use auto, or one of: cpu$"):
        pick_device(name)


@pytest.mark.gpu
def test_cuda() -> None:
    assert pick_device("auto").type == "cuda"
    assert pick_device("cuda") == torch.device("cuda")
    assert pick_device("cuda:0") == torch.device("cuda:0")


def test_precisions() -> None:
    assert pick_dtype("fp32", CPU) == torch.float32
    assert pick_dtype("bf16", CPU) == torch.bfloat16
    assert pick_dtype("auto", torch.device("mps")) == torch.float32


@pytest.mark.parametrize(("amx", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_on_a_cpu(amx: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever AVX-512 can: without AMX, float32 is faster."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    assert pick_dtype("auto", CPU) == expected
