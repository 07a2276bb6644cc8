"""Tables of speed, and of what survives faults, for ``readme_table.py``."""

from __future__ import annotations

import itertools
import json
import statistics
from typing import Any

from records import interval, link, load

from hf_freezecache.cli.plan import Plan, Prediction
from hf_freezecache.cli.plan_table import table_cells

LOSSLESS = "epoch_cost--deit-tiny--cpu.json"
AUTO = "epoch_cost--deit-tiny--cpu--auto.json"
EVALUATING = "evaluating--deit-tiny--cpu.json"
READING = "reading--cpu.json"
GROWTH = "growth--cpu.json"
DECIDING = "deciding--deit-tiny--cpu.json"
SWEEPING = ("sweeping--deit-tiny--cpu.json", "sweeping--deit-tiny--cpu--six-epochs.json")
DEMO, UNSEEN = "demo.json", "demo--unseen-digits.json"
FAULTS = "faults.json"
SCALE = "scale.json"
PLANNING = "planning--deit-tiny--imagenet-1k--cpu.json"


def epochs() -> str:
    """Return the table of what an image costs in training."""
    lossless, auto = load(LOSSLESS), load(AUTO)

    def ratio(result: dict[str, Any], name: str) -> str:
        value = result["ratios"][name]
        return f"{value['median']:.2f}x ({value['min']:.2f}-{value['max']:.2f})"

    # Split points are measured in order of worth.
    points = sorted(lossless["results"], key=lambda name: int(name.removeprefix("k=")))
    # Two tables: one is wider than a page.
    lines = [
        "| frozen blocks | images/s trained from the cache | over full fine-tuning | over frozen, no cache | with half of the patches |",
        "|---|---|---|---|---|",
    ]
    for name in points:
        result = lossless["results"][name]
        cells = [f"{name.removeprefix('k=')} of 12", f"{result['images_per_second']['cached']['median']:.0f}"]
        cells += [ratio(result, one) for one in ("cached/full", "cached/frozen", "cached_kept/cached")]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "| frozen blocks | codec | of the limit, chunks in memory | of the limit, each chunk read | building | cache per view |",
        "|---" * 6 + "|",
    ]
    for name, (codec, record, digits) in itertools.product(points, (("lossless", lossless, 0), ("`auto`", auto, 1))):
        result = record["results"][name]
        ratios, read = result["ratios"], "cached_read/limit"
        # Records of before chunks were held in memory have one arm, which reads each.
        of_limit = [ratios["cached/limit"], ratios[read]] if read in ratios else [None, ratios["cached/limit"]]
        cells = [f"{name.removeprefix('k=')} of 12", codec]
        cells += ["" if value is None else interval(value) for value in of_limit]
        cells += [interval(result["build_ratio"]), f"{result['cache_bytes_per_image'] / 1024:.{digits}f} KiB"]
        lines.append(f"| {' | '.join(cells)} |")
    config, versions, machine = lossless["config"], lossless["versions"], lossless["machine"]
    lines += [
        "",
        f"DeiT-Tiny, 224 px, {'fp32' if config['fp32'] == 'True' else 'bf16'}, batch {config['batch_size']}, {of_both(lossless, auto)}, "
        f"{machine['cores']} cores; medians (extremes) of interleaved rounds, or of windows of chunks "
        f"where arms are compared with the limit; lossless {config['rounds']}, `auto` {auto['config']['rounds']} rounds. Images are rendered live in "
        "the uncached arms; building not included. The limit is the same suffix fed from memory. Decoded chunks stay in memory up "
        f"to `memory_gb`; the first table is of {'these' if 'cached_read' in lossless['results'][points[0]]['images_per_second'] else 'chunks that are read in each epoch'}. Building is over rendering and running "
        f"the frozen blocks alone. Lossless: {stored_views(config)}; `auto`: {stored_views(auto['config'])}, most of them stored as what others do "
        "not predict. "
        f"torch {versions['torch']}, transformers {versions['transformers']}; lossless {link(LOSSLESS)}, "
        f"`auto` {link(AUTO)}, made by `recipes/benchmarks/epoch_cost.py`.",
    ]
    return "\n".join(lines)


def of_both(lossless: dict[str, Any], auto: dict[str, Any]) -> str:
    """Return what computed both records, told apart if it is not the same."""
    first, second = (record["machine"]["accelerator"] or record["machine"]["processor"] for record in (lossless, auto))
    return first if first == second else f"{first} (lossless) and {second} (`auto`)"


def stored_views(config: dict[str, Any]) -> str:
    """Return how many views of how many images were stored."""
    views = int(config.get("views", 1))
    return f"{views} view{'s' if views > 1 else ''} of {config['images']} images"


def growths() -> str:
    """Return the exponents of what building, training and storing take."""
    record = load(GROWTH)
    config, results, machine = record["config"], record["results"], record["machine"]
    lines = ["| grows | building | an epoch | bytes | memory added |", "|---|---|---|---|---|"]
    base = results["cases"]["base"]["peak_memory_bytes"]["median"]
    for name, exponents in results["exponents"].items():
        factor = config["grows"][name][-1]
        added = (results["cases"][f"{name} x{factor}"]["peak_memory_bytes"]["median"] - base) / 2**20
        figures = [f"{exponents[one]:.2f}" for one in ("build_cpu_seconds", "epoch_cpu_seconds", "cache_bytes")]
        lines.append(f"| {name} x{factor} | {' | '.join(figures)} | {added:+.0f} MiB |")
    first = config["base"]
    return "\n".join(
        [
            *lines,
            "",
            f"Exponents from {first['rows']} rows, {first['views']} view of {round(first['pixels'] ** 0.5)} px and a width of {first['width']} "
            "to the largest: 1 is linear; with the width, matrices grow by its square. CPU seconds of one thread, medians of "
            f"{config['rounds']} rounds, {config['blocks']} blocks, {config['split_point']} of them frozen; {machine['processor']}. "
            f"{link(GROWTH)}, made by `recipes/benchmarks/growth.py`.",
        ]
    )


def readings() -> str:
    """Return how fast caches are read, by threads, beside the limit of each part."""
    record = load(READING)
    config, machine, counts = record["config"], record["machine"], record["config"]["threads"]
    parts = {"files": "files", "zstd": "zstd", "files_zstd_unpacking": "files, zstd, unpacking", "copying": "copying"}
    by_threads = " | ".join(f"{count} thread{'' if count == 1 else 's'}" for count in counts)
    alone = " | ".join(f"{name} alone" for name in parts.values())
    lines = [f"| cache | KiB an image | {by_threads} | {alone} |", "|---" * (2 + len(counts) + len(parts)) + "|"]
    for name, result in record["results"].items():
        rates = result["images_per_second"]
        cells = [f"{rates[key]['median']:,.0f}" for key in (*(f"threads_{count}" for count in counts), *parts)]
        lines.append(
            f"| {name.replace('hidden=', 'width ').replace(f' chunk={32}', ',')} | {result['stored_bytes_per_image'] / 1024:.1f} | {' | '.join(cells)} |"
        )
    return "\n".join(
        [
            *lines,
            "",
            f"Images per second, medians of {config['rounds']} rounds, on made-up states of {config['tokens']} tokens; batches of "
            f"{config['batch_size']} are copied by one thread more, the one that trains. {machine['processor']}, {machine['cores']} cores. "
            f"{link(READING)}, made by `recipes/benchmarks/reading.py`.",
        ]
    )


def decisions() -> str:
    """Return what ``mode="auto"`` decided, and what that took beside the better of both."""
    record = load(DECIDING)
    config, machine = record["config"], record["machine"]
    lines = [
        "| case | from a cache, s | without, s | `auto`, s | over the better | decided | predicted over took |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, result in record["results"].items():
        took = [result[f"{mode}_seconds"] for mode in ("always", "never", "auto")]
        seconds = [interval(one, ".1f") for one in took]
        always, never, auto = (one["median"] for one in took)
        predicted = [result[f"{name}_predicted_over_outcome"] for name in ("cached", "live")]
        ratios = ", ".join(f"{one['median']:.2f}" for one in predicted if one)
        decided = ", ".join(sorted({{"none": "without"}.get(one, "cache") for one in result["decided"]}))
        lines.append(f"| {name} | {' | '.join(seconds)} | {auto / min(always, never):.2f} | {decided} | {ratios} |")
    return "\n".join(
        [
            *lines,
            "",
            f"Medians (extremes) of {config['rounds']} rounds, all modes in turn; seconds of `train()`, checks and building included. "
            "What was predicted, with a cache and without, where images were measured. "
            f"Short runs pay for the measuring. DeiT-Tiny, {config['size']} px, {machine['processor']}, {machine['cores']} cores. "
            f"{link(DECIDING)}, made by `recipes/benchmarks/deciding.py`.",
        ]
    )


def evaluations() -> str:
    """Return how much faster evaluations from a cache are."""
    record = load(EVALUATING)
    lines = [
        "| frozen blocks | from images | from the cache | times faster | the first, which builds it |",
        "|---|---|---|---|---|",
    ]
    for name, found in record["results"].items():
        lines.append(
            f"| {name.removeprefix('k=')} of 12 | {found['images_seconds']['median']:.1f} s | {found['cache_seconds']['median']:.1f} s "
            f"| {interval(found['factor'], '.1f')} | {found['building_seconds']:.1f} s |"
        )
    config, machine = record["config"], record["machine"]
    lines += [
        "",
        f"DeiT-Tiny, 224 px, {config['images']} photos, {machine['processor']}, {machine['cores']} cores; medians (extremes) of "
        f"{config['rounds']} rounds. {link(EVALUATING)}, made by `recipes/benchmarks/evaluating.py`.",
    ]
    return "\n".join(lines)


def plans() -> str:
    """Return what ``hf-freezecache plan`` says of a larger data set, from the rates of a record."""
    record = load(PLANNING)
    config, results = record["config"], record["results"]
    found = Plan(**{**results, "predictions": [Prediction(**one) for one in results["predictions"]]})
    rows = [list(row) for row in table_cells(found)]
    lines = [f"| {' | '.join(rows[0])} |", "|---" * len(rows[0]) + "|"]
    lines += [f"| {' | '.join([f'`{row[0]}`', *row[1:]])} |" for row in rows[1:]]
    measured = [f"{name} {rate['value']:.0f}" for name, rate in found.rates.items() if rate["source"] == "measured"]
    lines += [
        "",
        f"DeiT-Tiny, {found.rows:,} images, {counted(found.epochs, 'epoch', 'epochs')}, "
        f"{counted(found.num_views, 'view', 'views')}. The file of rates is `{json.dumps(config['given'])}`, from "
        f"{link(config['record'])}, of photos of 224 px; measured: {', '.join(measured)}. {link(PLANNING)}, made by "
        "`recipes/benchmarks/planning.py`.",
    ]
    return "\n".join(lines)


def counted(number: int, one: str, several: str) -> str:
    return f"one {one}" if number == 1 else f"{number} {several}"


def sweeps() -> str:
    """Return what sweeps over one cache cost, of few epochs and of those that ``recipes/sweep.py`` has by default."""
    return "\n\n".join(map(_sweep, SWEEPING))


def _sweep(name: str) -> str:
    record = load(name)
    config, results, machine = record["config"], record["results"], record["machine"]
    runs = results["runs"]["cached"]
    words = {"full": "full fine-tuning", "lora": "LoRA"}
    against = [
        f"{results[arm]['sweep_over_as_many_runs']:.3f} of what {len(runs)} runs of {way} take (one takes "
        f"{results[arm]['run_seconds']['median']:.0f} s, and {counted(len(results['runs'][arm]), 'was', 'were')} timed)"
        for arm, way in words.items()
    ]
    seconds = [run["seconds"] for run in runs]
    of_eight = [
        f"{sum(seconds[:8]) / (8 * results[arm]['run_seconds']['median']):.3f} of {way}" for arm, way in words.items()
    ]
    return (
        f"{len(runs)} runs of {config['epochs']} epochs over one cache, learning rates times heads, {config['split_point']} blocks "
        f"frozen, {config['token_keep']:g} of the patches: {results['sweep_seconds']:.0f} s with the build, {' and '.join(against)}. "
        f"The first 8 take {sum(seconds[:8]):.0f} s: {', '.join(of_eight)}. A run that finds its cache takes "
        f"{statistics.median(seconds[1:]):.1f} s. "
        f"DeiT-Tiny, 224 px, {config['train_images']} training and {config['test_images']} test images; each run is "
        f"evaluated once, those of the sweep from a cache; {machine['processor']}, {machine['cores']} cores. {link(name)}, made by "
        "`recipes/benchmarks/sweeping.py` around `recipes/sweep.py`."
    )


def demos() -> str:
    """Return what the demo shows, and the harder task."""
    lines = ["| task | run | accuracy | seconds |", "|---|---|---|---|"]
    for name in (DEMO, UNSEEN):
        figures = load(name)
        lines += [
            f"| {figures['task']} | {run['run']} | {run['accuracy']:.1%} | {run['seconds']:.1f} |"
            for run in figures["runs"]
        ]
    images = [load(name)["test_images"] for name in (DEMO, UNSEEN)]
    frozen = [load(name)["runs"][-1] for name in (DEMO, UNSEEN)]
    best = [max(run["accuracy_after_seconds"], key=lambda point: point[1]) for run in frozen]
    lines += [
        "",
        "The cost counts passes through blocks. On the way, the frozen and cached runs had "
        + " and ".join(f"{accuracy:.1%} after {seconds:.1f} s" for seconds, accuracy in best)
        + ".",
        f"One seed, {images[0]} and {images[1]} held-out images: differences of less than 3 points say little. Seconds are wall-clock of "
        f"one thread, building included. {link(DEMO)}, {link(UNSEEN)}, made by `hf-freezecache demo` and `hf-freezecache demo "
        "--unseen-digits`.",
    ]
    return "\n".join(lines)


def faults() -> str:
    """Return what the fault harness counted, and what many rows cost before the first batch."""
    counts, scale = load(FAULTS)["results"]["counts"], load(SCALE)
    small, large = (scale["results"][str(width)] for width in scale["config"]["widths"])

    def count(name: str) -> int:
        return int(counts.get(name, 0))

    return "\n".join(
        [
            f"* {count('kills')} processes killed ({count('kills with 2 processes')} of them in runs of two; in builds, promotions, "
            f"stage changes, checkpoints, steps and starts): {count('recoveries')} recoveries. All ends are compared to the bit with an "
            "undisturbed run, and no complete shard may be written again. "
            f"{count('terminations')} SIGTERMs, {count('vanished folders')} removed folders, {count('full disks')} full disks, "
            f"{count('flips')} flipped bits and {count('truncations')} truncations beside them: {count('wrong results')} wrong "
            f"results. {link(FAULTS)}, made by `recipes/benchmarks/faults.py`.",
            f"* {scale['config']['rows']:,} rows: opened in {large['open_seconds']['median']:.2f} s, sampler made in "
            f"{1e3 * large['sampler_seconds']['median']:.2f} ms, first batch of a run resumed in the middle of an epoch after "
            f"{large['resume_seconds']['median']:.2f} s, in {large['peak_mib']['median']:.0f} MiB of memory. A cache "
            f"with as many rows and {small['cache_bytes'] / large['cache_bytes']:.2f} of the bytes takes "
            f"{small['peak_mib']['median']:.0f} MiB. {link(SCALE)}, made by `recipes/benchmarks/scale.py`.",
        ]
    )
