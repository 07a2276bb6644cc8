"""What ``time_to_accuracy.py`` found: the points of its records, the best of them for a cost, and tables of both."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from accuracy_arms import Arm

#: Costs at which the fronts are compared, in epochs of full fine-tuning.
BUDGETS = (0.5, 1, 1.5, 2, 3, 4, 6, 8, 16)


@dataclass(frozen=True)
class Point:
    """An arm on one data set, or its mean over several."""

    arm: Arm
    lr: float
    accuracies: tuple[float, ...]
    error: float
    cost: float
    cost_train: float
    seconds: float | None = None
    seconds_again: float | None = None
    images_per_second: float | None = None
    peak_memory_bytes: float | None = None
    cache_bytes: float = 0.0

    @property
    def accuracy(self) -> float:
        return statistics.mean(self.accuracies)

    @property
    def words(self) -> str:
        """``85.7 ± 0.3``, which no line of a table breaks."""
        return f"{self.accuracy:.1f}\u00a0±\u00a0{self.error:.1f}"


def line_of(arm: Arm) -> str:
    """Return the name of the line that an arm belongs to."""
    probe = arm.schedule == "0:all"
    if arm.kind == "full":
        return "full fine-tuning" if arm.decay == 1 else "full, layer-wise decay"
    if arm.kind == "ours":
        return "linear probe, cached" if probe else "cached (ours)"
    decays = "" if arm.decay == 1 else ", layer-wise decay"
    if arm.kind == "auto" and given_of(arm) not in ((), ("decay",)):
        return "schedule='auto', a setting given"
    names = {
        "lora": "LoRA",
        "live": "linear probe" if probe else "frozen, no cache",
        "naive": "naive cache",
        "auto": "schedule='auto', LoRA" if arm.rank else f"schedule='auto'{decays}",
    }
    return names[arm.kind]


def given_of(arm: Arm) -> tuple[str, ...]:
    """Return the names of what ``auto`` chooses by itself but was given, that adapters train left out."""
    fresh = Arm(arm.kind, arm.schedule)
    names = ("views", "keep", "decay", "head", "scale", "codec", "plain", "unfrozen", "weights", "rows")
    return tuple(name for name in names if getattr(arm, name) != getattr(fresh, name))


def points_of(record: dict[str, Any]) -> dict[str, Point]:
    """Return what was measured of each arm, by its name."""
    runs = record["results"]["runs"]
    found = {}
    for name in dict.fromkeys(run["arm"] for run in runs if run["phase"] == "test"):
        own = [run for run in runs if run["arm"] == name]
        tested = [run for run in own if run["phase"] == "test"]
        lr = tested[-1]["lr"]
        tested = sorted((run for run in tested if run["lr"] == lr), key=lambda run: run["seed"])
        timed = {
            phase: [run for run in own if run["phase"] == phase and run["lr"] == lr] for phase in ("clock", "again")
        }
        alone = timed["clock"][-1] if timed["clock"] else {}
        accuracies = tuple(run["accuracy"] for run in tested)
        found[name] = Point(
            arm=Arm.parse(name),
            lr=lr,
            accuracies=accuracies,
            error=statistics.stdev(accuracies) / math.sqrt(len(accuracies)) if len(accuracies) > 1 else math.nan,
            cost=statistics.mean(run["cost"] for run in tested),
            cost_train=statistics.mean(run["cost_train"] for run in tested),
            seconds=alone.get("seconds"),
            seconds_again=timed["again"][-1]["seconds"] if timed["again"] else None,
            images_per_second=alone.get("images_per_second"),
            peak_memory_bytes=alone.get("peak_memory_bytes"),
            cache_bytes=tested[-1]["cache_bytes"],
        )
    return found


def mean_points(sets: Sequence[dict[str, Point]]) -> dict[str, Point]:
    """Return means over data sets, of the arms that all of them have; standard errors as of independent means."""
    found = {}
    for name in [name for name in sets[0] if all(name in one for one in sets)]:
        points = [one[name] for one in sets]
        timed = all(point.seconds is not None for point in points)
        found[name] = Point(
            arm=points[0].arm,
            lr=math.nan,
            accuracies=tuple(point.accuracy for point in points),
            error=math.sqrt(sum(point.error**2 for point in points)) / len(points),
            cost=statistics.mean(point.cost for point in points),
            cost_train=statistics.mean(point.cost_train for point in points),
            seconds=statistics.mean(point.seconds or 0.0 for point in points) if timed else None,
        )
    return found


# ---- Fronts ----


def front(points: Sequence[Point], key: str = "cost") -> list[Point]:
    """Return the points that no cheaper or equally cheap one matches, by rising cost (or ``key="seconds"``)."""
    best: list[Point] = []
    for point in sorted(points, key=lambda one: (getattr(one, key), -one.accuracy)):
        if not best or point.accuracy > best[-1].accuracy:
            best.append(point)
    return best


def best_within(points: Sequence[Point], cost: float) -> Point | None:
    """Return the most accurate point of at most this cost, and 2% for the odd token."""
    return max((one for one in points if one.cost <= cost * 1.02), key=lambda one: one.accuracy, default=None)


def accuracy_at(points: Sequence[Point], cost: float) -> float | None:
    """Return what a front reaches at a cost, its points joined by lines over the logarithm of the cost.

    Between points that favours the arm: its runs have whole epochs. Below the first point there is nothing.
    """
    line = front(points)
    if not line or cost < line[0].cost * 0.999:
        return None
    for before, after in itertools.pairwise(line):
        if cost <= after.cost:
            part = math.log(max(cost, before.cost) / before.cost) / math.log(after.cost / before.cost)
            return before.accuracy + part * (after.accuracy - before.accuracy)
    return line[-1].accuracy


def cost_to_reach(points: Sequence[Point], accuracy: float, joined: bool) -> float | None:
    """Return the least cost at which a front has an accuracy; ``joined``: by the lines between its points as well."""
    line = front(points)
    for before, after in zip([None, *line], line, strict=False):
        if after.accuracy >= accuracy - 1e-9:
            if before is None or not joined:
                return after.cost
            part = (accuracy - before.accuracy) / (after.accuracy - before.accuracy)
            return before.cost * (after.cost / before.cost) ** part
    return None


#: In the order of tables and legends.
LINES = (
    "cached (ours)",
    "schedule='auto'",
    "schedule='auto', layer-wise decay",
    "schedule='auto', LoRA",
    "schedule='auto', a setting given",
    "full, layer-wise decay",
    "full fine-tuning",
    "LoRA",
    "frozen, no cache",
    "linear probe",
    "linear probe, cached",
    "naive cache",
)
#: Lines of ours, without the linear probe.
OURS = LINES[:5]


def groups_of(points: dict[str, Point]) -> tuple[list[Point], list[Point]]:
    """Return full fine-tuning, and ours without the linear probe."""
    full = [point for point in points.values() if point.arm.kind == "full"]
    ours = [point for point in points.values() if line_of(point.arm) in OURS]
    return full, ours


# ---- Tables ----


def number(value: float | None, form: str, factor: float = 1.0) -> str:
    return "" if value is None or math.isnan(value) else format(value * factor, form)


def print_tables(records: Sequence[dict[str, Any]]) -> None:
    """Print what each arm reaches, and the fronts against each other: for each data set, and on average."""
    sets = [
        (f"{record['config']['data']} {record['config']['image_size']} px", points_of(record)) for record in records
    ]
    if len(sets) > 1:
        sets.append((f"mean of {len(sets)} data sets", mean_points([points for _, points in sets])))
    for name, points in sets:
        if points:
            print(f"\n{name}\n")
            print_arms(points)
            print_fronts(points)


def print_arms(points: dict[str, Point]) -> None:
    full, _ = groups_of(points)
    header = [
        "arm",
        "lr",
        "seeds",
        "accuracy",
        "s.e.",
        "cost",
        "over full of that cost",
        "again",
        "s",
        "s again",
        "images/s",
        "peak MiB",
        "cache MiB",
    ]
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for point in sorted(points.values(), key=lambda one: (LINES.index(line_of(one.arm)), one.cost)):
        same = accuracy_at(full, point.cost)
        cells = [
            point.arm.name,
            number(point.lr, "g"),
            str(len(point.accuracies)),
            number(point.accuracy, ".2f"),
            number(point.error, ".2f"),
            number(point.cost, ".2f"),
            "" if same is None or point.arm.kind == "full" else f"{point.accuracy - same:+.2f}",
            number(point.cost_train, ".2f"),
            number(point.seconds, ".0f"),
            number(point.seconds_again, ".0f"),
            number(point.images_per_second, ".0f"),
            number(point.peak_memory_bytes, ".0f", 2**-20),
            number(point.cache_bytes or None, ".1f", 2**-20),
        ]
        print("| " + " | ".join(cells) + " |")


def print_fronts(points: dict[str, Point]) -> None:
    """Print the best of ours within each budget against full fine-tuning, and the cost of reaching its ceiling."""
    full, ours = groups_of(points)
    if not full or not ours:
        return
    print()
    for budget in BUDGETS:
        mine = best_within(ours, budget)
        if mine is not None:
            theirs = accuracy_at(full, max(budget, mine.cost))
            against = "none" if theirs is None else f"{theirs:.2f}, ours {mine.accuracy - theirs:+.2f}"
            print(
                f"within {budget:g} epochs of full fine-tuning: {mine.accuracy:.2f} ± {number(mine.error, '.2f')} "
                f"({mine.arm.name}); full {against}"
            )
    ceiling = max(point.accuracy for point in full)
    for below in (3.0, 1.5, 0.3, 0.0):
        mine = cost_to_reach(ours, ceiling - below, joined=False)
        theirs = cost_to_reach(full, ceiling - below, joined=True)
        if theirs is not None:
            ratio = "not reached" if mine is None else f"{mine:.2f}, {mine / theirs:.2f} of it"
            print(
                f"full fine-tuning's best ({ceiling:.2f}) less {below:g} points: full {theirs:.2f} epochs, ours {ratio}"
            )
