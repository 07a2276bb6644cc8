"""Writes the table of figures in README.md from the records in recipes/benchmarks/results.

python recipes/benchmarks/readme_table.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path

HERE = Path(__file__).parent
RECORD = HERE / "results" / "epoch_cost--deit-tiny--cpu.json"
README = HERE.parents[1] / "README.md"


def table(record: dict) -> str:
    """Return the table of one ``epoch_cost`` record."""

    def ratio(result: dict, name: str) -> str:
        value = result["ratios"][name]
        return f"{value['median']:.2f}x ({value['min']:.2f}-{value['max']:.2f})"

    lines = [
        "| frozen blocks | images/s trained from the cache | over full fine-tuning | over frozen, no cache | of the limit | cache per view |",
        "|---|---|---|---|---|---|",
    ]
    for name, result in record["results"].items():
        lines.append(
            f"| {name.removeprefix('k=')} of 12 | {result['images_per_second']['cached']['median']:.0f} "
            f"| {ratio(result, 'cached/full')} | {ratio(result, 'cached/frozen')} "
            f"| {result['ratios']['cached/limit']['median']:.2f} | {result['cache_bytes_per_image'] / 1024:.0f} KiB |"
        )
    config, versions, machine = record["config"], record["versions"], record["machine"]
    lines += [
        "",
        f"DeiT-Tiny, 224 px, bf16, batch {config['batch_size']}, {machine['accelerator'] or machine['processor']}, "
        f"{machine['cores']} cores; medians (extremes) of {config['rounds']} interleaved rounds, images rendered live in "
        "the uncached arms; building not included. The limit is the same suffix fed from memory. "
        f"torch {versions['torch']}, transformers {versions['transformers']}; "
        f"[record](recipes/benchmarks/results/{RECORD.name}), made by `recipes/benchmarks/epoch_cost.py`.",
    ]
    return "\n".join(lines)


def main() -> None:
    text = README.read_text()
    figures = table(json.loads(RECORD.read_text()))
    start, end = re.escape("<!-- figures:"), re.escape("<!-- /figures -->")
    new = re.sub(rf"({start}.*?-->\n).*?({end})", lambda m: f"{m[1]}{figures}\n{m[2]}", text, flags=re.DOTALL)
    README.write_text(new)


if __name__ == "__main__":
    main()
