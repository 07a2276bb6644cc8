"""Code blocks of README.md."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
#: Blocks behind these comments are what ``.ci/run`` runs.
RUN_BY_CI = ("<!-- run -->", "<!-- test -->")


@dataclass(frozen=True)
class Block:
    line: int
    language: str
    text: str
    by_ci: bool

    @property
    def name(self) -> str:
        return f"README.md:{self.line}"


def read_blocks() -> list[Block]:
    lines = (ROOT / "README.md").read_text().splitlines()
    blocks, start = [], None
    for number, line in enumerate(lines):
        if not line.lstrip().startswith("```"):
            continue
        if start is None:
            start = number
        else:
            text = "\n".join(lines[start + 1 : number]) + "\n"
            by_ci = start > 0 and lines[start - 1] in RUN_BY_CI
            blocks.append(Block(start + 1, lines[start].lstrip().removeprefix("```"), text, by_ci))
            start = None
    assert start is None, f"a code block of README.md is never closed: line {start}"
    return blocks
