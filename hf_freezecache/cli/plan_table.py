"""Shows what ``hf-freezecache plan`` predicts, as a table."""

from __future__ import annotations

from .plan import Plan, Prediction

__all__ = ["table_cells", "table_lines"]

#: Name of a rate -> its unit in the table.
_UNITS = {
    "rendered_images_per_second": "rendering {} images/s",
    "block_passes_per_second": "blocks {} passes/s",
    "encode_mb_per_second": "encoding {} MB/s",
    "decode_mb_per_second": "decoding {} MB/s",
    "write_mb_per_second": "writing {} MB/s",
    "read_mb_per_second": "reading {} MB/s",
}


def table_lines(found: Plan) -> list[str]:
    """Return what predictions rest on, and a table of them, one line each."""
    machine = "This machine" if found.machine is None else found.machine
    lines = [f"{machine}: {_counted(found.devices, 'device')} with {_counted(found.processes, 'data process')} each."]
    for source in ("given", "measured"):
        rates = [
            _UNITS[name].format(_figure(rate["value"]))
            for name, rate in found.rates.items()
            if rate["source"] == source
        ]
        if rates:
            lines.append(f"{'Given' if source == 'given' else 'Measured here'}: {', '.join(rates)}.")
    chosen = all(one.num_views is not None for one in found.predictions)
    views = "views as num_views='auto' chooses" if chosen else _counted(found.num_views, "view")
    images = "1 image" if found.rows == 1 else f"{found.rows:,} images"
    lines.append(f"{images}, {views}, {_counted(found.epochs, 'epoch')}:")
    rows = table_cells(found)
    width = max(len(row[0]) for row in rows)
    lines += [" ".join([f"{row[0]:>{width}}", *(f"{cell:>10}" for cell in row[1:])]) for row in rows]
    return lines + [one.chosen for one in found.predictions if one.chosen is not None]


def table_cells(found: Plan) -> list[list[str]]:
    """Return the cells of a table of predictions, its head first."""
    rows = [["frozen", "cache", "peak disk", "build", "an epoch", "in all", "no cache", "unfrozen"]]
    for one in found.predictions:
        seconds = (one.build_seconds, one.epoch_seconds, one.cached_seconds, one.live_seconds, one.full_seconds)
        rows.append([_name(one), *map(_size, (one.cache_bytes, one.peak_bytes)), *map(_duration, seconds)])
    return rows


def _name(one: Prediction) -> str:
    """Return a schedule as the table has it: its only split point, or all of it; and its views, where they were chosen."""
    name = one.schedule.removeprefix("0:") if len(one.split_points) == 1 else one.schedule
    return name if one.num_views is None else f"{name}, {_counted(one.num_views, 'view')}"


def _counted(count: int, noun: str) -> str:
    several = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{count} {noun if count == 1 else several}"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _size(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB" if count < 2**30 else f"{count / 2**30:,.1f} GiB"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:,.1f} h"
