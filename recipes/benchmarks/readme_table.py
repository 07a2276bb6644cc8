"""Writes the tables of figures in README.md and docs/ from the records in recipes/benchmarks/results.

python recipes/benchmarks/readme_table.py
"""

from __future__ import annotations

import re
import statistics
from typing import Any

from accuracy_arms import Arm
from accuracy_front import best_within, given_of, line_of, points_of
from records import RESULTS, ROOT, link, load
from speed_tables import decisions, demos, epochs, evaluations, faults, growths, plans, readings, sweeps

RATES = "rate_distortion--deit-tiny--cpu.json"
ACCURACY = "codec_accuracy--deit-tiny--*--cpu.json"
AUGMENTATION = "augmentation--deit-tiny--*--cpu.json"
COPIES = "copies_rate--deit-tiny--cpu.json"
FRONTS = "time_to_accuracy--*.json"
TRIED = "explorations--deit-tiny.json"
#: Of a cost: the best run within it stands for a way of training only if it took that much.
LEAST_SHARE = 0.6
#: Of so many epochs and more, runs with a part of the budget have a table of their own.
MANY_EPOCHS = 8


def codecs() -> str:
    """Return the table of rates, and the accuracy of fine-tuning from lossy caches."""
    record = load(RATES)
    lines = [
        "| frozen blocks | bits per element | KiB per image | of its JPEG | of the best peer | of peers with CLS apart | decoded images/s, one thread |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, result in record["results"].items():
        found = result["codecs"]
        ours = found["transform"]

        def against(key: str, ours: dict[str, Any] = ours, found: dict[str, Any] = found) -> str:
            peer = ours[key]
            return f"{ours[f'ratio_to_{key}']:.2f}x ({peer.replace('_', ' ')}, {found[peer]['bits_per_element']:.2f})"

        lines.append(
            f"| {name.removeprefix('k=')} of 12 | {ours['bits_per_element']:.2f} | {ours['kib_per_image']:.1f} "
            f"| {ours['ratio_to_image_file']:.2f}x | {against('best_peer')} | {against('best_peer_of_all')} "
            f"| {ours['decode_images_per_second']['median']:,.0f} |"
        )
    config = record["config"]
    half = int(config["images"]) // 2
    lines += [
        "",
        f"`transform` at a KL of at most {config['target_kl']} nats per image to the exact logits, DeiT-Tiny, fitted on {half} "
        f"photos of Imagenette and measured on {half} others, all stored bytes counted. Peers: fp16 and bf16 with zstd, int2-8 "
        f"per channel with zstd, zfp, SZ3, blosc2, each tuned to the same KL. {link(RATES)}, made by "
        "`recipes/benchmarks/rate_distortion.py`.",
        "",
    ]
    for path in sorted(RESULTS.glob(ACCURACY)):
        accuracy = load(path.name)
        for data, arms in accuracy["results"].items():
            lines += accuracy_lines(data, arms, accuracy["config"], path.name)
    return "\n".join(lines)


def accuracy_lines(data: str, arms: dict[str, Any], config: dict[str, Any], record: str) -> list[str]:
    """Return what the codecs cost in final accuracy on one data set."""
    base = statistics.mean(arms["lossless"]["accuracy"]["values"])
    images = sum(run["test_images"] for run in arms["lossless"]["runs"])
    name, _, pixels = data.rpartition("-")
    lines = [
        f"* {name} at {pixels} px, {config['epochs']} epochs of the schedule `{config['schedule']}`, {config['views']} views, "
        f"{len(arms['lossless']['runs'])} seeds, {images} test images in all ({link(record)}): lossless {base:.2f}%"
    ]
    for arm, result in arms.items():
        if arm == "lossless":
            continue
        budget, _, weight = arm.removeprefix("auto:").partition(":")
        difference, stages = result["difference"], result["runs"][0]["stages"]
        lines.append(
            f"  * `auto`, distortion {budget}{f', gradient weight {weight}' if weight else ''}: {difference['mean']:+.2f} points "
            f"({difference['min']:+.2f} to {difference['max']:+.2f}), loss {result['loss_difference']['mean']:+.4f}, at "
            + " and ".join(f"{stage['bits_per_element']:.1f}" for stage in stages)
            + " bits per element"
        )
    return lines


def views() -> str:
    """Return the tables of final accuracy against bytes by ways of storing views, and what a further view costs."""
    lines: list[str] = []
    for path in sorted(RESULTS.glob(AUGMENTATION)):
        record = load(path.name)
        for data, arms in record["results"].items():
            lines += augmentation_lines(data, arms, record["config"], path.name)
    record = load(COPIES)
    lines += [
        "| frozen blocks | crop .35-1 and flip | flip alone | the same, gradient weight 0.5 | the same, from a first view at KL 0.002 |",
        "|---|---|---|---|---|",
    ]
    found = record["results"]
    for point in sorted(record["config"]["split_points"].split(","), key=int):

        def ratios(base: str, weight: str, point: str = point) -> list[str]:
            keys = (f"k={point} base={base} {name} weight={weight}" for name in ("crop", "flip"))
            return [f"{found[key]['ratio']:.2f}" for key in keys]

        cells = [*ratios("exact", "0"), ", ".join(ratios("exact", "0.5")), ", ".join(ratios("0.002", "0"))]
        lines.append(f"| {point} of 12 | {' | '.join(cells)} |")
    images = record["config"]["images"]
    lines += [
        "",
        "Bits of a further view as the residual of its prediction over bits of the same view stored directly by the same codec, "
        f"both at a KL of {record['config']['kl']}; DeiT-Tiny, {images} photos of Imagenette that neither fit nor choice of the "
        f"predictor saw. {link(COPIES)}, made by `recipes/benchmarks/copies_rate.py`.",
    ]
    return "\n".join(lines)


def augmentation_lines(data: str, arms: dict[str, Any], config: dict[str, Any], record: str) -> list[str]:
    """Return the table of one data set."""
    name, pixels, rows = data.rsplit("-", 2)
    gap = arms["gap"]
    lines = [
        f"{name}, {rows} training images at {pixels} px, {config['epochs']} epochs of the schedule `{config['schedule']}`, "
        f"{gap['seeds']} seeds with {config['test']} test images each; the gap between live augmentation and one view is "
        f"{gap['mean']:.1f} points ({gap['min']:.1f} to {gap['max']:.1f}). {link(record)}",
        "",
        "| views | accuracy | of the gap | bytes, of one view | seconds |",
        "|---|---|---|---|---|",
    ]
    for arm, found in arms.items():
        if arm == "gap":
            continue
        recovered = f"{found['recovered']:.0%}" if found["recovered"] is not None and arm not in ("live", "one") else ""
        stored = "" if arm in ("live",) or arm.startswith("finetune") else f"{found['bytes_over_one_view']:.2f}x"
        epochs = statistics.median(run["epochs"] for run in found["runs"])
        longer = f" ({epochs:.0f} epochs)" if arm.endswith("+") else ""
        lines.append(
            f"| {arm_words(arm)}{longer} | {found['accuracy']['mean']:.1f}% | {recovered} | {stored} "
            f"| {found['seconds']['median']:.0f} |"
        )
    lines += [
        "",
        "Means over the seeds; one test image is "
        f"{100 / int(config['test']):.2f} points. Seconds, with build, of one thread on a machine that did other work as well: they set "
        "the epochs of the longer runs, and compare no speeds.",
    ]
    return [*lines, ""]


def arm_words(arm: str) -> str:
    """Return an arm of ``augmentation.py`` in a reader's words."""
    name, _, features = arm.rstrip("+").partition(":features=")
    words = {
        "live": "live, no cache",
        "one": "one",
        "finetune": "all blocks trained, live",
        "default": "4, as by default",
    }
    if name in words:
        text = words[name]
    elif name.startswith("default-"):
        text = f"{name[8:]}, as by default"
    else:
        count, storage, *budget = name.split(":")
        text = f'{count}, `copies="{storage}"`' + (
            ", together in the bytes of one" if budget else ", distortion of the first"
        )
    return f"{text}, `{features}`" if features else text


def fronts() -> str:
    """Return a table of accuracy over cost: arms with at least two seeds on the test rows."""
    lines = ["| data | arm | accuracy | cost, epochs of full fine-tuning | seeds |", "|---|---|---|---|---|"]
    records = []
    for path in sorted(RESULTS.glob(FRONTS)):
        record = load(path.name)
        config = record["config"]
        rows = sorted(
            (point for point in points_of(record).values() if len(point.accuracies) > 1), key=lambda one: one.cost
        )
        part = f", {config['train']} training images" if config["train"] else ""
        for point in rows:
            lines.append(
                f"| {config['data']}, {config['image_size']}\u00a0px{part} | {line_of(point.arm)}: `{point.arm.name}` "
                f"| {point.words} | {point.cost:.2f} | {len(point.accuracies)} |"
            )
        records.append(link(path.name))
    lines += [
        "",
        "DeiT-Tiny, batch 32, fp32; each arm with the best of at least four learning rates on a part of the training images, `auto` with "
        "that of full fine-tuning, or of LoRA, of the nearest number of epochs; means and standard errors. The cost counts passes through blocks, building included. "
        f"{', '.join(records)}, made by `recipes/benchmarks/time_to_accuracy.py`.",
    ]
    return "\n".join(lines)


def levers() -> str:
    """Return a table of ``auto`` with one setting given, beside ``auto`` with none, on the test rows."""
    lines = [
        "| data | given | frozen blocks | views | epochs behind them | of the patches | accuracy | cost |",
        "|" + "---|" * 8,
    ]
    for path in sorted(RESULTS.glob(FRONTS)):
        record = load(path.name)
        config, points = record["config"], points_of(record)
        autos = [point for point in points.values() if point.arm.kind == "auto" and len(point.accuracies) > 1]
        bases = [point for point in autos if not given_of(point.arm) and not point.arm.rank]
        for base in sorted(bases, key=lambda point: point.cost):
            bare = (base.arm.epochs, base.arm.budget, base.arm.rank)
            others = [
                point
                for point in autos
                if len(given_of(point.arm)) == 1 and (point.arm.epochs, point.arm.budget, point.arm.rank) == bare
            ]
            if not others:
                continue
            for point in [base, *sorted(others, key=lambda one: given_words(one.arm))]:
                run = next(
                    run for run in record["results"]["runs"] if (run["arm"], run["phase"]) == (point.arm.name, "test")
                )
                stage = run["stages"][-1]
                lines.append(
                    f"| {config['data']}, {config['image_size']}\u00a0px | {given_words(point.arm)} | {stage['split_point']} "
                    f"| {stage['views']} | {stage['epochs']:.3g} | {stage['keep']:.0%} | {point.words} | {point.cost:.2f} |"
                )
    lines += [
        "",
        'Means and standard errors of three seeds on the test images; `schedule="auto"` chooses what is not given. The learning rate is that '
        "which was best for full fine-tuning with the same decay.",
    ]
    return "\n".join(lines)


def given_words(arm: Arm) -> str:
    """Return what ``auto`` was given as a user writes it."""
    names = {"keep": "token_keep", "decay": "layer_decay", "views": "num_views", "scale": "lr_scale"}
    names |= {
        "plain": "plain_epochs",
        "unfrozen": "unfrozen_token_keep",
        "weights": "block_weights",
        "rows": "head_rows",
    }
    settings = [f"`{names[name]}={getattr(arm, name)}`" for name in given_of(arm)]
    return ", ".join(settings) or "nothing"


def summary() -> str:
    """Return a short table: the best that each way reaches within the cost of half an epoch to sixteen of full fine-tuning."""
    ways = {
        '`schedule="auto"`': ("schedule='auto'",),
        "full fine-tuning": ("full fine-tuning", "full, layer-wise decay"),
        '`schedule="auto"`, LoRA': ("schedule='auto', LoRA",),
        "LoRA": ("LoRA",),
        "linear probe": ("linear probe", "linear probe, cached"),
    }
    lines = [f"| data | epochs' cost | {' | '.join(ways)} |", "|---" * (len(ways) + 2) + "|"]
    for path in sorted(RESULTS.glob(FRONTS)):
        record = load(path.name)
        config = record["config"]
        points = [point for point in points_of(record).values() if len(point.accuracies) > 1]
        shown: tuple[float, ...] = ()
        for budget in (0.5, 1, 2, 4, 8, 16):
            best = []
            for name, own in ways.items():
                of_own = [point for point in points if line_of(point.arm) in own]
                # What was never run for that long is left out; a linear probe gains nothing by it.
                long = of_own if "probe" in name else [one for one in of_own if one.cost >= LEAST_SHARE * budget]
                best.append(best_within(of_own, budget) if best_within(long, budget) else None)
            # A row for each budget that ours and full fine-tuning make use of.
            used = tuple(0.0 if point is None else point.cost for point in best[:2])
            if None in best[:2] or used == shown:
                continue
            shown = used
            top = max(point.accuracy for point in best if point is not None)
            texts = ["" if point is None else point.words for point in best]
            cells = [
                f"**{text}**" if point is not None and point.accuracy == top else text
                for point, text in zip(best, texts, strict=True)
            ]
            lines.append(f"| {config['data']}, {config['image_size']}\u00a0px | {budget} | {' | '.join(cells)} |")
    lines += [
        "",
        "Test accuracy of DeiT-Tiny within the cost of so many epochs of full fine-tuning, counted in passes through blocks, building "
        "included; means and standard errors of three seeds or more, learning rates tuned on other images; empty where no run took "
        f"{LEAST_SHARE:g} of the cost. Full fine-tuning is the better of "
        'that with and that without layer-wise decay; `schedule="auto"` has all its defaults, and the rate of that without. The '
        "first panels of the picture are by the clock: the first seed of each arm, evaluation left out, on two threads. "
        "[All arms](docs/accuracy.md)",
        "",
        "A part of what full fine-tuning of many epochs costs, with layer-wise decay alone; otherwise as above:",
        "",
        thirds(),
    ]
    return "\n".join(lines)


def thirds() -> str:
    """Return a table of runs with a budget for many epochs and all other defaults, beside full fine-tuning, with decay, of these."""
    lines = [
        '| data | epochs | full fine-tuning | `budget` | `schedule="auto"` | its cost | by the clock | over its cache |',
        "|---|---|---|---|---|---|---|---|",
    ]
    for path in sorted(RESULTS.glob(FRONTS)):
        record = load(path.name)
        points = points_of(record)
        for ours in sorted(points.values(), key=lambda point: point.cost):
            arm = ours.arm
            if arm.kind != "auto" or not 0 < arm.budget < 1 or arm.epochs < MANY_EPOCHS or given_of(arm) or arm.rank:
                continue
            full = [point for point in points.values() if line_of(point.arm) == "full, layer-wise decay"]
            whole = [point for point in full if point.arm.epochs == arm.epochs]
            if not whole:
                continue
            best = max(whole, key=lambda point: point.accuracy)
            seconds = [
                "" if one is None or best.seconds is None else f"{one:.0f} s for {best.seconds:.0f}"
                for one in (ours.seconds, ours.seconds_again)
            ]
            cells = [f"{arm.epochs:g}", best.words, f"{arm.budget:g}", ours.words, f"{ours.cost:.1f}", *seconds]
            lines.append(
                f"| {record['config']['data']}, {record['config']['image_size']}\u00a0px | {' | '.join(cells)} |"
            )
    return "\n".join(lines)


def tried() -> str:
    """Return a table of single runs by which the rule of ``schedule="auto"`` was found: of each arm that with the best rate."""
    record = load(TRIED)
    arms: dict[tuple[str, str], dict[float, list[dict[str, Any]]]] = {}
    for run in record["results"]["runs"]:
        others = f", scored on {run['scored_on']}" if "scored_on" in run else ""
        arm = arms.setdefault((f"{run['data']}, {run['image_size']} px{others}", run["arm"]), {})
        arm.setdefault(run["lr"], []).append(run)
    lines = ["| data | arm | rate | accuracy, of each seed | cost |", "|---|---|---|---|---|"]
    for (data, name), rates in sorted(arms.items(), key=lambda arm: (arm[0][0], mean_of(best_of(arm[1]), "cost"))):
        runs = best_of(rates)
        accuracies = ", ".join(f"{run['accuracy']:.1f}" for run in sorted(runs, key=lambda run: run["seed"]))
        lines.append(f"| {data} | `{name}` | {runs[0]['lr']:g} | {accuracies} | {mean_of(runs, 'cost'):.2f} |")
    scored = "Scored on a quarter of the training images, a point being two to four images, or on so many others."
    lines += ["", f"{scored} {link(TRIED)}"]
    return "\n".join(lines)


def mean_of(runs: list[dict[str, Any]], figure: str) -> float:
    return statistics.mean(run[figure] for run in runs)


def best_of(rates: dict[float, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the runs with the learning rate of the best mean accuracy."""
    return max(rates.values(), key=lambda runs: mean_of(runs, "accuracy"))


#: Mark of a table -> the page that it is on, and what makes it.
SECTIONS = {
    "summary": ("README.md", summary),
    "figures": ("docs/benchmarks.md", epochs),
    "fronts": ("docs/accuracy.md", fronts),
    "levers": ("docs/accuracy.md", levers),
    "tried": ("docs/trials.md", tried),
    "evaluations": ("docs/evaluating.md", evaluations),
    "plans": ("docs/schedules.md", plans),
    "sweeps": ("docs/schedules.md", sweeps),
    "demos": ("docs/quick_start.md", demos),
    "readings": ("docs/benchmarks.md", readings),
    "decisions": ("docs/benchmarks.md", decisions),
    "growths": ("docs/benchmarks.md", growths),
    "codecs": ("docs/compression.md", codecs),
    "views": ("docs/augmented_views.md", views),
    "faults": ("docs/several_processes.md", faults),
}


def section(mark: str) -> str:
    """Return a table with links as its page has them."""
    page, table = SECTIONS[mark]
    return table() if "/" not in page else table().replace("](recipes/", "](../recipes/")


def main() -> None:
    for mark, (page, _) in SECTIONS.items():
        text = (ROOT / page).read_text()
        start, end = re.escape(f"<!-- {mark}:"), re.escape(f"<!-- /{mark} -->")
        table = section(mark)
        replace = rf"({start}.*?-->\n).*?({end})"
        text, count = re.subn(replace, lambda m, table=table: f"{m[1]}{table}\n{m[2]}", text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"{page} must have one block '<!-- {mark}: ... --> ... <!-- /{mark} -->', has {count}")
        (ROOT / page).write_text(text)


if __name__ == "__main__":
    main()
