import time
from typing import Literal

from uldm_cli.api import Spec

time.sleep(60)


class Slow(Spec):
    """Never reached by a test."""

    kind: Literal["slow"] = "slow"


def main() -> None:
    """Nothing."""
