"""Where and in what precision to compute."""

import torch

from uldm_cli.errors import UsageError


def pick_device(name: str) -> torch.device:
    """The device named `cpu`, `cuda`, `cuda:1`, `mps`; `auto` takes an accelerator if there is one.

    Raises:
        UsageError: no such device on this machine.
    """
    usable = ["cpu"]
    if torch.accelerator.is_available() and (accelerator := torch.accelerator.current_accelerator()):
        kind = accelerator.type
        usable = [kind, *(f"{kind}:{i}" for i in range(torch.accelerator.device_count())), *usable]
    if name == "auto":
        return torch.device(usable[0])
    if name not in usable:
        raise UsageError(f"--device {name} cannot be used on this machine", f"Use auto, or one of: {', '.join(usable)}")
    return torch.device(name)


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """`fp32`, `bf16`, `fp16`, `fp64`, or `auto`: bfloat16 where the device is faster in it.

    Raises:
        UsageError: fp16 without a CUDA device, which alone scales gradients so that they do not vanish in it.
    """
    if precision == "auto":
        return torch.bfloat16 if _is_faster_in_bfloat16(device) else torch.float32
    if precision == "fp16" and device.type != "cuda":
        raise UsageError(f"--precision fp16 needs a CUDA device, and this is {device.type}", "Use bf16")
    return _DTYPES[precision]


_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """What a loss or a statistic is computed in: float64 stays, lower precisions are lifted to float32."""
    return x if x.dtype == torch.float64 else x.float()


def _is_faster_in_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # A CPU without AMX takes longer than in float32, with AVX-512's instructions for bfloat16 as well.
    has_amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)  # not public: should it go, the answer is no
    return device.type == "cpu" and bool(has_amx())
