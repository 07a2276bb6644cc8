"""What ``hf-freezecache plan`` says of ImageNet-1k, from rates that a record of ``epoch_cost.py`` holds.

    python recipes/benchmarks/planning.py --model DIR --data DIR --record epoch_cost--deit-tiny--cpu.json --json FILE

Nothing is trained: a few images of DATA tell the bytes of a view and how fast the codec is, where the record does not.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from record import save
from records import load

from hf_freezecache.cli.build import BuildSettings
from hf_freezecache.cli.given_rates import GivenRates
from hf_freezecache.cli.plan import plan
from hf_freezecache.cli.planned_runs import PlanSettings

IMAGENET_ROWS = 1281167  # training images of ImageNet-1k


def rates_of(record: dict[str, Any]) -> dict[str, Any]:
    """Return the rates of the machine that a record of ``epoch_cost.py`` was made on, as a file of rates has them."""
    images, found, machine = int(record["config"]["images"]), record["results"].values(), record["machine"]
    rendering = statistics.median(images / one["render_seconds"]["median"] for one in found)
    training = statistics.median(one["images_per_second"]["full_in_memory"]["median"] for one in found)
    return {
        "name": f"{machine['accelerator'] or machine['processor']}, {machine['cores']} cores",
        "rendered_images_per_second": round(rendering),
        "full_training_images_per_second": round(training, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--record", required=True, help="name of a record of epoch_cost.py in results/")
    parser.add_argument("--rows", type=int, default=IMAGENET_ROWS)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--views", type=int, default=2)
    parser.add_argument("--schedules", nargs="+", default=["0:6", "0:9", "0:11", "0:6,15:9", "0:12,2:6"])
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    given = rates_of(load(args.record))
    settings = BuildSettings(args.model, args.data, 1, show_progress=False)
    asked = PlanSettings(args.epochs, args.schedules, args.rows, args.views, given=GivenRates(**given))
    found = plan(settings, asked)
    config = {"model": Path(args.model).name, "record": args.record, "given": given}
    save(args.json, "planning", config, found.to_dict())


if __name__ == "__main__":
    main()
