"""Code blocks and links of README.md and the pages of docs/."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
#: Blocks behind these comments are what ``.ci/run`` runs.
RUN_BY_CI = ("<!-- run -->", "<!-- test -->")


#: In the order in which a reader would go through them; each page finds what those before it have made.
PAGES = (
    "README.md",
    "recipes/README.md",
    *(
        f"docs/{name}.md"
        for name in ("quick_start", "training", "schedules", "evaluating", "compression", "augmented_views")
    ),
    *(
        f"docs/{name}.md"
        for name in (
            "several_processes",
            "sharing",
            "reports",
            "questions",
            "benchmarks",
            "accuracy",
            "trials",
            "README",
        )
    ),
    *(f"docs/{name}.md" for name in ("format", "architectures")),
)


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    text: str
    by_ci: bool

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"


def read_blocks(*pages: str) -> list[Block]:
    """Return the code blocks of some pages; default: of all but the format's, which are no code."""
    return [block for page in pages or PAGES[:-2] for block in blocks_of(page)]


def blocks_of(page: str) -> list[Block]:
    lines = (ROOT / page).read_text().splitlines()
    blocks, start = [], None
    for number, line in enumerate(lines):
        if not line.lstrip().startswith("```"):
            continue
        if start is None:
            start = number
        else:
            text = "\n".join(lines[start + 1 : number]) + "\n"
            by_ci = start > 0 and lines[start - 1] in RUN_BY_CI
            blocks.append(Block(page, start + 1, lines[start].lstrip().removeprefix("```"), text, by_ci))
            start = None
    assert start is None, f"a code block of {page} is never closed: line {start}"
    return blocks
