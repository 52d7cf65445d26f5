from typing import Literal

from uldm_cli.api import Spec

TEXT = "no class"


class Misnamed(Spec):
    """Its kind is not the name of its entry point."""

    kind: Literal["other"] = "other"
