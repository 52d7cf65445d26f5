"""The README's blocks work as written. Its install lines are run by `.ci/run`, which has a fresh environment for them.

A block of bash or Python runs, in the README's order, in one folder that has the repository's `configs`. An HTML
comment `<!-- not run: reason -->` above a block leaves it out.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import uldm_cli

PACKAGE_PARENT = Path(uldm_cli.__file__).resolve().parent.parent
ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"

_BLOCK = re.compile(
    r"(?:<!--\s*not run:\s*(?P<reason>[^>]*?)\s*-->\s*\n)?"
    r"^```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```\s*$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block: `line` is where its code begins, `reason` why it is not run, if it is not."""

    language: str
    code: str
    line: int
    reason: str | None

    @property
    def install_lines(self) -> list[str]:
        return [line for line in self.code.splitlines() if line.startswith("pip install")]

    @property
    def runnable(self) -> str:
        """The code without its install lines and comments."""
        lines = self.code.splitlines()
        kept = [line for line in lines if line not in self.install_lines]
        return "\n".join(kept) if any(line.strip() and not line.startswith("#") for line in kept) else ""


def blocks(text: str) -> list[Block]:
    """Every fenced block of a Markdown text."""
    return [
        Block(found["language"], found["code"], text.count("\n", 0, found.start("code")) + 1, found["reason"])
        for found in _BLOCK.finditer(text)
    ]


ALL = blocks(README.read_text(encoding="utf-8")) if README.exists() else []
RUN = [block for block in ALL if block.language in ("bash", "python") and block.reason is None and block.runnable]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder with `configs`, and a `uldm` that is the package under test."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "configs").symlink_to(ROOT / "configs")
    command = folder / ".bin" / "uldm"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m uldm_cli "$@"\n')
    command.chmod(0o755)
    return folder


@pytest.mark.parametrize("block", RUN, ids=lambda block: f"line-{block.line}")
def test_block_runs(block: Block, folder: Path) -> None:
    path = os.pathsep.join([str(folder / ".bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    interpreter = ["bash", "-euo", "pipefail", "-c"] if block.language == "bash" else [sys.executable, "-c"]
    ended = subprocess.run(
        [*interpreter, block.runnable],
        cwd=folder,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(PACKAGE_PARENT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, f"README.md:{block.line}\n{block.code}\n{ended.stdout}\n{ended.stderr}"


@pytest.mark.skipif(not README.exists(), reason="an installed copy has no README.md")
def test_readme_sets_up_with_exactly_two_commands() -> None:
    assert [line for block in ALL for line in block.install_lines] == [
        "pip install . && uldm ldm sample --total-steps 200 --step-size 40",
        "pip install '.[test]' && pytest -n logical",
    ]


def test_blocks_are_found_with_their_reasons() -> None:
    text = "a\n\n<!-- not run: takes an hour -->\n```bash\nuldm\n```\n\n```python\n1\n\n2\n```\n```yaml\nx: 1\n```\n"
    assert blocks(text) == [
        Block("bash", "uldm\n", 5, "takes an hour"),
        Block("python", "1\n\n2\n", 9, None),
        Block("yaml", "x: 1\n", 14, None),
    ]


def test_install_lines_and_comments_are_not_run() -> None:
    assert Block("bash", "# one\npip install . && uldm\n", 1, None).runnable == ""
    assert Block("bash", "# one\npip install .\nuldm --help\n", 1, None).runnable == "# one\nuldm --help"
