"""The layout of the published latent diffusion models: a pickled Lightning checkpoint, and a YAML of Python names."""

from uldm_cli.formats.compvis.buffers import check_schedule
from uldm_cli.formats.compvis.config import Translated, read_config
from uldm_cli.formats.compvis.read import MissingConfig, read, weights_in
from uldm_cli.formats.compvis.write import write

__all__ = ["MissingConfig", "Translated", "check_schedule", "read", "read_config", "weights_in", "write"]
