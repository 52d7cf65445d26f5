"""Makes `uldm_cli/assets/fruits64.safetensors` from a finished run of configs/fruits64/ldm.yaml.

usage: python scripts/make_fruits64.py CHECKPOINT.safetensors [DECODER.safetensors]

The averaged weights and the autoencoder, in float16; the header stays what the run wrote. DECODER is an autoencoder
that went on from that of CHECKPOINT with its encoder frozen (configs/fruits64/decoder.yaml): its averaged decoder is
taken.
"""

import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from uldm_cli.formats.native import load_tensors, read_header, save

OUT = Path(__file__).parents[1] / "uldm_cli" / "assets" / "fruits64.safetensors"
DECODING = ("post_quant_conv.", "decoder.")


def halved(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same in float16; integers stay."""
    return {key: value.half() if value.dtype == torch.float32 else value for key, value in state.items()}


def main() -> None:
    """Writes the file."""
    source, *decoders = map(Path, sys.argv[1:])
    parts = {part: halved(load_tensors(source, f"{part}.")) for part in ("ema", "autoencoder")}
    for path in decoders:
        found, known = halved(load_tensors(path, "ema.")), parts["autoencoder"]
        encoding = [key for key in known if not key.startswith(DECODING)]
        differing = [key for key in encoding if not torch.equal(found[key], known[key])]
        if differing:
            sys.exit(f"{path} makes other latents than {source}: {', '.join(differing[:3])} differ")
        parts["autoencoder"] = {key: found[key] for key in known}
    save(OUT, read_header(source), parts)


if __name__ == "__main__":
    main()
