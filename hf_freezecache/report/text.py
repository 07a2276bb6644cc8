"""Figures in a reader's words: the same on pages, on cards and on the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = [
    "accuracy_cost",
    "codec_words",
    "counted",
    "describe_schedule",
    "distortion_of",
    "distortion_words",
    "duration",
    "format_runs",
    "how_it_ended",
    "how_it_trained",
    "is_share",
    "metric",
    "over_time_words",
    "points",
    "runs_words",
    "seeds_words",
    "size_words",
    "spread_words",
    "stage_account",
    "time_cost",
    "time_unit",
    "when_not_to_use",
]

Figures = Mapping[str, Any]

_UNTOLD = " Whether the learning rate of either was tuned is not recorded."
_STANDINGS = {"ahead": "ahead", "behind": "behind", "level": "level with the baseline"}

#: Metrics that are shares of 1, and are shown in per cent.
_SHARES = ("accuracy", "f1", "precision", "recall", "top5", "top_5")


def duration(seconds: float) -> str:
    """Return seconds, minutes or hours, with three digits or so."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} h"


def time_unit(last: float) -> tuple[int, str]:
    """Return the seconds in a unit of time, and its name, for figures side by side of which the largest is so many seconds."""
    return (1, "s") if last < 600 else (60, "min") if last < 2 * 3600 else (3600, "h")


def size_words(num_bytes: float) -> str:
    """Return a size in B, KiB, MiB or GiB."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"


def is_share(name: str) -> bool:
    """Say whether a metric is a share of 1."""
    return name.endswith(_SHARES)


def metric(name: str, value: float) -> str:
    """Return the value of a metric; shares in per cent."""
    return f"{value:.2%}" if is_share(name) else f"{value:.4g}"


def points(name: str, difference: float) -> str:
    """Return a difference of a metric; of shares in percentage points."""
    return f"{100 * difference:+.2f} points" if is_share(name) else f"{difference:+.4g}"


def runs_words(spread: Figures) -> str:
    """Return how many runs there are, and their seeds, e.g. ``3 runs, seeds 0, 1, 2``."""
    seeds = spread["seeds"]
    return f"{len(spread['runs'])} runs" + (f", seeds {', '.join(map(str, seeds))}" if seeds else "")


def spread_words(name: str, spread: Figures) -> str:
    """Return mean and standard deviation of a metric, e.g. ``85.33% ± 1.20%``."""
    found = spread["metrics"][name]
    return f"{metric(name, found['mean'])} \N{PLUS-MINUS SIGN} {metric(name, found['standard_deviation'])}"


def seeds_words(figures: Figures) -> str | None:
    """Say what runs of several seeds scored, in one sentence; ``None`` if there was one run, or they have no metric."""
    spread = figures["seeds"]
    if not spread or not spread["metric"]:
        return None
    name, found = spread["metric"], spread["metrics"][spread["metric"]]
    return (
        f"{name} {spread_words(name, spread)} (mean and standard deviation) over {runs_words(spread)}, from "
        f"{metric(name, found['lowest'])} to {metric(name, found['highest'])}."
    )


def codec_words(codec: dict[str, Any]) -> str:
    """Return a codec, ``{"name", "configuration"}``, in one line."""
    from ..codecs import PRESETS  # here, since it imports torch

    if codec == PRESETS["lossless"].to_dict():
        return "lossless"
    words = []
    for step in codec["configuration"]["steps"]:
        settings = ", ".join(
            f"{name} {f'({len(value)} of them)' if isinstance(value, list) and len(value) > 4 else value}"
            for name, value in step["configuration"].items()
            if name != "state"
        )
        words.append(f"{step['name']} ({settings})" if settings else step["name"])
    return " > ".join(words)


def distortion_words(calibration: dict[str, Any]) -> str:
    """Return what calibration measured of a lossy codec, in one line."""
    agreement = "" if calibration["agreement"] is None else f"agreement {calibration['agreement']:.1%}, "
    return (
        f"{calibration['distortion']:.3g} ({calibration['measure']}), {agreement}relative error "
        f"{calibration['relative_error']:.3f}, on {calibration['num_test']} held-out images, states from the "
        f"{calibration['source']}"
    )


# ---- What a run did ----


def describe_schedule(figures: Figures) -> str:
    """Return the schedule, e.g. ``6 of 12 blocks frozen from epoch 0, 9 from epoch 3``; and what of it was not reached.

    What was asked of images and rates follows, e.g. ``; layer_decay 0.75; lr_scale auto (1.5, 2 by stage)``.
    """
    num_blocks, done = figures["model"].get("num_blocks"), figures["epochs_done"]
    stages = figures["planned_stages"] or figures["stages"]
    if not stages:
        return "no block frozen" + _settings(figures)
    words = []
    for number, stage in enumerate(stages):
        first = f"{f' of {num_blocks}' if num_blocks else ''} blocks frozen" if number == 0 else ""
        ahead = " (not reached)" if number and done is not None and stage["start_epoch"] >= done else ""
        words.append(f"{stage['split_point']}{first} from epoch {stage['start_epoch']:g}{ahead}")
    chosen = " (chosen by schedule='auto')" if figures["freezing"].get("chosen") else ""
    return ", ".join(words) + chosen + _settings(figures)


def _settings(figures: Figures) -> str:
    """Return what was asked of images and learning rates, beginning with a semicolon; nothing if nothing was."""
    freezing = figures["freezing"]
    plain, decay, scale, rows = (freezing.get(key) for key in ("plain_epochs", "layer_decay", "lr_scale", "head_rows"))
    words = {"qkv": "; of blocks, queries, keys and values train alone"}.get(freezing.get("block_weights"), "")
    words += f"; {rows:.3g} of the rows while the head trains alone" if rows not in (None, 1) else ""
    words += f"; plain images in the end, for {counted(plain, 'epoch')}" if plain else ""
    words += "" if decay is None else f"; layer_decay {decay:g}"
    used = ", ".join(f"{stage['lr_scale']:.3g}" for stage in figures["stages"])
    return words if scale is None else f"{words}; lr_scale {scale}" + (f" ({used} by stage)" if used else "")


def counted(number: float, noun: str) -> str:
    """Return ``one view``, ``2 views``."""
    return f"one {noun}" if number == 1 else f"{number} {noun}s"


def how_it_trained(figures: Figures) -> str | None:
    """Say from what the stages with frozen blocks were trained; ``None`` if no stage was entered."""
    stages = figures["stages"]
    if not stages:
        return None
    frozen = [stage for stage in stages if stage["split_point"]]
    cached = [stage for stage in frozen if stage["trained_from"] == "cache"]
    if not frozen:
        return "No block was frozen, and nothing was cached."
    if not cached:
        nothing = "" if any(stage["has_cache"] for stage in stages) else "; nothing was cached"
        return f"The frozen blocks ran in every step{nothing}."
    if len(cached) == len(frozen):
        return "Where blocks were frozen, they ran once per stored view, and the rest was trained from a cache of their output."
    rest = len(frozen) - len(cached)
    return (
        f"Of {len(frozen)} stages with frozen blocks, {len(cached)} trained from a cache of their output; in the other"
        f"{f' {rest}' if rest > 1 else ''} the frozen blocks ran in every step."
    )


def _training_source(stage: Figures) -> str:
    """Say what a stage was trained on, and where its cache came from."""
    if stage["trained_from"] == "images" and not stage["split_point"]:
        return "It trained on images, and no block was frozen."
    if stage["trained_from"] == "images":
        return f"It trained on images, and {counted(stage['split_point'], 'frozen block')} ran in every step."
    images = "each image" if stage["rows_share"] == 1 else f"{stage['rows_share']:.3g} of the images"
    cache = f"It trained from a cache of {counted(stage['num_views'], 'view')} of {images}"
    if stage["cache"] == "found":
        return f"{cache}, which was found."
    chosen = ", with a codec chosen by measurement" if stage["calibrated"] else ""
    source = f"the cache of split point {stage['built_from']}" if stage["built_from"] else "the images"
    if ahead := stage["built_ahead"]:
        several = "s" if len(ahead) > 1 else ""
        caches = f"cache{several} of later stages at split point{several} {', '.join(map(str, ahead))}"
        source = (
            f"the images, by way of the {caches}" if stage["built_from"] in ahead else f"{source}, after the {caches}"
        )
    return f"{cache}, which this run built from {source}{chosen}."


def stage_account(stage: Figures) -> str:
    """Say what a stage, one of ``figures["stages"]``, did, why, and what it cost against what was predicted, in a few sentences."""
    sentences = [_training_source(stage)]
    if stage["token_keep"] < 1:
        behind = "frozen blocks" if stage["split_point"] else "first block"
        sentences.append(f"Each step saw a random {stage['token_keep']:.0%} of the patch tokens behind the {behind}.")
    if stage["reason"]:
        sentences.append(f"Reason: {stage['reason'].rstrip('.')}.")
    predicted, spent = stage["predicted"], stage["passes_spent"]
    if predicted:
        costs = [
            f"{predicted[name]:,.4g} {words}"
            for name, words in (("cached_passes", "with a cache"), ("live_passes", "without one"))
            if name in predicted
        ]
        taken = "" if spent is None else f"; it took {spent:,.4g}"
        sentences.append(f"Predicted passes through blocks per image: {', '.join(costs)}{taken}.")
    if stage["lr_scale"] != 1:
        sentences.append(f"Learning rates were multiplied by {stage['lr_scale']:.3g}.")
    trained = duration(stage["train_seconds"])
    if stage["has_cache"]:
        doing = "Building" if stage["cache"] == "built" else "Finding"
        sentences.append(f"{doing} the cache took {duration(stage['build_seconds'])}, training {trained}.")
    elif stage["build_seconds"]:
        sentences.append(f"Trying to build a cache took {duration(stage['build_seconds'])}, training {trained}.")
    else:
        sentences.append(f"Training took {trained}.")
    return " ".join(sentences)


def distortion_of(stage: Figures) -> str:
    """Return what the cache of a stage cost in nats per image, for a table."""
    if not stage["has_cache"]:
        return "\N{EN DASH}"
    distortion = stage["distortion"].get("distortion")
    if distortion is not None:
        return f"{distortion:.2g}"
    # Every lossy codec of the base view has a calibration.
    return "exact" if stage["calibration"] is None else "not measured"


def how_it_ended(figures: Figures) -> str | None:
    """Say that training did not finish, or was stopped early; ``None`` if it ended as planned."""
    if figures["complete"] and not figures["stopped_early"]:
        return None
    steps = f"step {figures['steps']:,}" + (f" of {figures['max_steps']:,}" if figures["max_steps"] else "")
    if figures["complete"]:
        return f"Training was stopped early, after {figures['epochs_done'] or 0:.3g} epochs, {steps}."
    return f"Training did not finish: the figures are those of {steps}."


def accuracy_cost(figures: Figures) -> str:
    """Say what freezing and caching cost in accuracy, as far as it was measured."""
    compared, result = figures["comparison"], figures["result"]
    if compared is None:
        return "Not measured: no run without freezing was recorded to compare with. It may be lower than such a run's."
    if compared["difference"] is None:
        return f"Not measured: this run and the baseline '{figures['baseline']['run']}' have no metric in common."
    baseline, name = figures["baseline"], compared["metric"]
    text = (
        f"{points(name, compared['difference'])} of {name} against the baseline '{baseline['run']}' without freezing "
        f"({metric(name, result['value'])} against {metric(name, baseline['result']['value'])}), one run each."
    )
    if (means := compared["means"]) and means["metric"] == name:
        mine, others, unit = figures["seeds"], baseline["spread"], " points" if is_share(name) else ""
        error = means["standard_error"] * (100 if unit else 1)
        return (
            f"{points(name, means['difference'])} of {name} against the baseline '{baseline['run']}' without freezing, of the "
            f"means: {spread_words(name, mine)} over {runs_words(mine)}, against {spread_words(name, others)} over "
            f"{runs_words(others)} (mean and standard deviation). By that spread, the difference has a standard error of "
            f"{error:.2g}{unit}.{_UNTOLD}{_caveats(compared)}"
        )
    if compared["standard_error"]:
        least = f"{200 * compared['standard_error']:.1f} points"
        text += f" With {result['images']:,} evaluation images, differences below about {least} say little."
    return text + _UNTOLD + _caveats(compared)


def time_cost(figures: Figures) -> str:
    """Say what the run took, against a run without freezing that was measured or is estimated."""
    cost, compared, baseline = figures["cost"], figures["comparison"], figures["baseline"]
    if cost["seconds"] is None:
        return "Not measured: no epoch was finished."
    taken = f"{duration(cost['seconds'])} of training, {duration(cost['entering_seconds'])} of it for building or opening caches"
    if compared is not None and compared["speedup"]:
        text = (
            f"{duration(cost['whole_seconds'])} against the baseline's {duration(baseline['seconds'])}, a factor of "
            f"{compared['speedup']:.2f}: wall-clock of train() with building, without evaluations, one run each."
        )
        if not baseline["device"] or baseline["device"] != figures["device"]:
            text += " That both ran on the same idle machine is not recorded."
        return text + _caveats(compared)
    if cost["no_freezing_seconds"] is None:
        return f"{taken}. What a run without freezing takes was not measured, and there is nothing to estimate it from."
    if cost["no_freezing_measured"]:
        return f"{taken}. At the images per second {cost['no_freezing_text']}: {duration(cost['no_freezing_seconds'])}."
    return (
        f"{taken}. Without freezing about {duration(cost['no_freezing_seconds'])}: {cost['no_freezing_text']}. This is an "
        "estimate, not a measurement."
    )


def over_time_words(figures: Figures) -> str | None:
    """Say when this run was ahead of its baseline and when behind; ``None`` if they were not both timed and evaluated."""
    found = figures["comparison"] and figures["comparison"]["over_time"]
    if not found:
        return None
    name, spans = found["metric"], found["spans"]
    factor, unit = time_unit(max(found["mine"][-1][0], found["theirs"][-1][0]))

    def after(seconds: float) -> str:
        return f"{seconds / factor:.3g} {unit}"

    text = (
        f"The first score of this run is there after {after(found['mine'][0][0])}, of the baseline after "
        f"{after(found['theirs'][0][0])}."
    )
    if not spans:
        return f"{text} Whether a higher {name} is better is not known."
    if len(spans) == 1:
        text += f" From {after(spans[0][0])} on this run is {_STANDINGS[spans[0][2]]} throughout."
    elif len(spans) <= 4:
        words = [f"{_STANDINGS[standing]} from {after(start)}" for start, _, standing in spans]
        text += f" This run is {', '.join(words[:-1])} and {words[-1]}."
    else:
        text += f" Since {after(spans[0][0])} the lead has changed {len(spans) - 1} times; this run ends {_STANDINGS[spans[-1][2]]}."
    target = f"{found['target']:.4f}" if name is None else metric(name, found["target"])
    what = f"what the baseline ended at, {'a loss of ' if name is None else ''}{target}"
    took = after(found["baseline_reached"])
    if found["reached"] is None:
        return f"{text} It never had {what}; the baseline had it after {took}."
    return f"{text} It had {what}, after {after(found['reached'])}, the baseline after {took}."


def _caveats(compared: Figures) -> str:
    return f" Mind that {'; '.join(compared['caveats'])}." if compared["caveats"] else ""


def when_not_to_use(figures: Figures) -> list[str]:
    """Return when this way of training is the wrong one."""
    points = {stage["split_point"] for stage in figures["stages"]}
    lines = ["In runs of a few epochs: each stored view goes through the frozen blocks once before it pays."]
    if 0 not in points or points - {0, figures["model"].get("num_blocks")}:
        lines.append(
            "When every epoch must show new images, or the collator mixes samples: a cache shows what was stored."
        )
    if 0 not in points:
        lines.append("When data differ much from what the frozen blocks were trained on: they cannot adapt.")
    cost = figures["cost"]
    if cost["seconds"] is not None and cost["no_freezing_seconds"] is not None:
        ratio = cost["seconds"] / cost["no_freezing_seconds"]
        if ratio > 1:
            kind = "measured" if cost["no_freezing_measured"] else "estimated"
            lines.insert(0, f"In a run like this one: it took {ratio:.2f} times the {kind} time without freezing.")
    return lines


# ---- Runs side by side ----


def format_runs(runs: Sequence[Figures]) -> str:
    """Return a plain-text table, one line per run: name, accuracy, seconds, of which build, bytes per image.

    Args:
        runs: Each with ``run`` (a name), ``accuracy`` (from 0 to 1), ``seconds``, of which ``build_seconds``, and
            ``cache_bytes_per_image``.
    """
    rows = [("run", "accuracy", "seconds", "of it build", "bytes per image")]
    for run in runs:
        cached = run["cache_bytes_per_image"] > 0
        rows.append(
            (
                run["run"],
                f"{run['accuracy']:.1%}",
                f"{run['seconds']:.1f}",
                f"{run['build_seconds']:.1f}" if cached else "-",
                f"{run['cache_bytes_per_image']:,.0f}" if cached else "-",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)
