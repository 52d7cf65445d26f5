"""Folders of diffusers, in and out; diffusers itself is not needed for it."""

from uldm_cli.formats.diffusers.hub import local_folder
from uldm_cli.formats.diffusers.reading import is_folder, read
from uldm_cli.formats.diffusers.writing import write

__all__ = ["is_folder", "local_folder", "read", "write"]
