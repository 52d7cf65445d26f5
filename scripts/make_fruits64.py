"""Makes `uldm_cli/assets/fruits64.safetensors` from a finished run of configs/fruits64/ldm.yaml.

usage: python scripts/make_fruits64.py CHECKPOINT.safetensors

The averaged weights and the autoencoder, in float16; the header stays what the run wrote.
"""

import sys
from pathlib import Path

import torch

from uldm_cli.formats.native import load_tensors, read_header, save

OUT = Path(__file__).parents[1] / "uldm_cli" / "assets" / "fruits64.safetensors"


def main() -> None:
    source = Path(sys.argv[1])
    parts = {part: load_tensors(source, f"{part}.") for part in ("ema", "autoencoder")}
    halved = {
        part: {key: value.half() if value.dtype == torch.float32 else value for key, value in state.items()}
        for part, state in parts.items()
    }
    save(OUT, read_header(source), halved)


if __name__ == "__main__":
    main()
