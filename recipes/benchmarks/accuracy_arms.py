"""The arms of ``time_to_accuracy.py``: what one is called, what it costs, and which learning rates it is tried with.

An arm is written as text without blanks, ``KIND/NAME=VALUE/...``, e.g. ``full/epochs=4/decay=0.75`` or
``ours/k=9/epochs=8/views=2/keep=0.5/decay=0.75``. Kinds:

* ``full``: plain ``Trainer``, all parameters.
* ``lora``: plain ``Trainer``, PEFT's LoRA of rank 16 on queries and values, and the classifier.
* ``live``: the frozen blocks run in every step; every epoch draws new views. With ``k=all`` it is a linear probe.
* ``naive``: what a user would write: hidden states of one view by ``datasets.map`` as Arrow floats, the rest under ``Trainer``.
* ``ours``: from a cache. With ``k=all`` it is a cached linear probe.
* ``auto``: ``FreezeConfig(schedule="auto")``. What ``views``, ``keep``, ``decay`` and ``scale`` give is settled, the rest is chosen.

``k=9`` is short for ``schedule=0:9``. In a schedule ``all`` stands for the number of blocks: ``schedule=0:all,5:6`` trains the
head alone for five epochs, then all behind block 6. It may be a policy: ``ours/schedule=autofreeze(75)/epochs=8``, whose stages, and so
its cost, are known once it has run. ``head`` is what the learning rate is multiplied by while the head trains
alone. With ``rank=16`` blocks train by LoRA of that rank, as those of ``lora`` do; a budget of ``auto`` is then a
share of the cost of LoRA. ``keep`` is the share of the patch tokens behind frozen blocks, ``unfrozen`` that where none is frozen.
``plain`` last epochs show images as they are evaluated. With ``weights=qkv`` queries, keys and values train alone of the blocks. ``rows`` is the share of the rows that a head sees which trains alone. ``decay`` is layer-wise: the head has a factor of 1, block ``i`` of ``N`` has
``decay ** (N - i)``, the embeddings have ``decay ** (N + 1)``.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_freezecache.schedules import adaptive_policy, plan_stages

KINDS = ("full", "lora", "live", "naive", "ours", "auto")
#: Gradients of inputs count as a forward pass, and so do those of all weights.
INPUTS = WEIGHTS = 1
#: Share of a block's weights that makes queries, keys and values.
QKV = 0.25


@dataclass(frozen=True)
class Arm:
    """What is compared. The fields are the names of its text."""

    kind: str
    schedule: str = "0:0"
    epochs: float = 1.0
    views: int = 1
    keep: float = 1.0
    decay: float = 1.0
    head: float = 1.0
    scale: str = ""
    budget: float = 0.0
    codec: str = "lossless"
    rank: int = 0
    plain: int = 0
    unfrozen: float = 1.0
    weights: str = ""
    rows: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Arm:
        kind, *settings = text.split("/")
        if kind not in KINDS:
            raise SystemExit(f"{text}: {kind!r} is no kind of arm. Choose one of: {', '.join(KINDS)}.")
        defaults = {one.name: one.default for one in dataclasses.fields(cls)}
        found: dict[str, Any] = {}
        for setting in settings:
            name, equals, value = setting.partition("=")
            if name == "k":
                name, value = "schedule", f"0:{value}"
            if not equals or name not in defaults or name == "kind":
                raise SystemExit(f"{text}: {setting!r} is no NAME=VALUE with k or one of {', '.join(defaults)}.")
            found[name] = type(defaults[name])(value)
        if kind == "naive" and adaptive_policy(found.get("schedule", "").replace("all", "0") or None) is not None:
            raise SystemExit(
                f"{text}: a naive cache is of one split point, k=9; {found['schedule']} decides while training."
            )
        if kind in ("naive", "live", "ours") and "schedule" not in found:
            raise SystemExit(f"{text}: say how many blocks are frozen, k=9 or schedule=0:6,4:9.")
        return cls(kind, **found)

    @property
    def name(self) -> str:
        """The text that gives this arm, in one form only."""
        parts = [self.kind]
        for one in dataclasses.fields(self)[1:]:
            value = getattr(self, one.name)
            if one.name == "epochs" or value != one.default:
                single = one.name == "schedule" and re.fullmatch(r"0:(\w+)", value)
                text = f"{value:g}" if isinstance(value, float) else value
                parts.append(f"k={single[1]}" if single else f"{one.name}={text}")
        return "/".join(parts)

    def stages(self, num_blocks: int) -> list[tuple[int, float, int]]:
        """Return (start epoch, epochs, split point) of each stage that is planned, epochs before the first one included."""
        if self.kind in ("full", "lora", "auto"):
            return [(0, self.epochs, 0)]
        pairs = plan_stages(self.schedule.replace("all", str(num_blocks)), math.ceil(self.epochs), num_blocks)
        points = [(stage.start_epoch, stage.split_point) for stage in pairs if stage.start_epoch < self.epochs]
        points = [(0, 0), *points] if not points or points[0][0] > 0 else points
        ends = [*(start for start, _ in points[1:]), self.epochs]
        return [(start, end - start, point) for (start, point), end in zip(points, ends, strict=True)]

    @property
    def tuned(self) -> bool:
        """Whether its learning rate is chosen by a grid of its own; else it is that of full fine-tuning."""
        return self.kind != "auto" and not self.scale

    @property
    def several_caches(self) -> bool:
        """Whether it writes caches behind trained blocks, which are of no use to another run."""
        points = [point for _, _, point in self.stages(10**6)]
        if self.kind == "ours" and adaptive_policy(self.schedule.replace("all", "0")) is not None:
            return True
        return self.kind == "auto" or (self.kind == "ours" and points != sorted(points, reverse=True))


# ---- Costs ----


def kept_share(keep: float, patches: int, prefix_tokens: int = 1) -> float:
    """Return the share of all tokens that a training step sees behind the split."""
    return (prefix_tokens + round(keep * patches)) / (prefix_tokens + patches)


@dataclass
class Passes:
    """Passes through blocks, per image."""

    built: float = 0.0
    trained: float = 0.0

    def epochs(self, num_blocks: int) -> dict[str, float]:
        """Return the cost in epochs of full fine-tuning."""
        unit = (1 + INPUTS + WEIGHTS) * num_blocks
        build, train = self.built / unit, self.trained / unit
        return {"cost": round(build + train, 4), "cost_build": round(build, 4), "cost_train": round(train, 4)}


def count_passes(arm: Arm, num_blocks: int, patches: int, stages: Sequence[Mapping[str, Any]] | None = None) -> Passes:
    """Count the passes through blocks of a whole run, its builds in full, as if there had been no cache before.

    Args:
        arm: The arm.
        num_blocks: Blocks of the model.
        patches: Patch tokens of an image.
        stages: What stages did, of ``ours`` and ``auto``: ``epochs``, ``split_point``, ``cached``, ``views``, ``keep``, and
            ``trained``, the share of their weights that blocks train, and ``rows``, the share of the rows in the cache; default: what is
            planned.
    """
    if arm.kind == "lora":
        # No gradients of the blocks' own weights; the small matrices beside them are left out, in favour of the arm.
        return Passes(trained=2 * num_blocks * arm.epochs)
    if stages is None:
        cached = arm.kind in ("ours", "naive")
        views = 1 if arm.kind == "naive" else arm.views
        stages = [
            {
                "epochs": epochs,
                "split_point": point,
                "cached": cached and point > 0,
                "views": views,
                "keep": arm.keep if point else arm.unfrozen,
                "trained": QKV if arm.weights else 1.0,
                "rows": arm.rows if point == num_blocks else 1.0,
            }
            for _, epochs, point in arm.stages(num_blocks)
        ]
    passes, states_at, rows_at = Passes(), 0, 1.0
    for stage in stages:
        point = stage["split_point"]
        share, whole = kept_share(stage["keep"], patches), int(point == 0)  # block 0 sees all tokens
        weights = 0.0 if arm.rank else WEIGHTS * stage.get("trained", 1.0)
        passes.trained += (1 + INPUTS + weights) * (whole + (num_blocks - point - whole) * share) * stage["epochs"]
        if stage["cached"]:
            # The next cache is computed from this one; one that lies before it was built on the way.
            rows = stage.get("rows", 1.0)
            passes.built += stage["views"] * (
                max(point - states_at, 0) * rows + min(point, states_at) * max(rows - rows_at, 0)
            )
            states_at, rows_at = point, rows
        else:
            passes.trained += point * stage["epochs"]
            states_at, rows_at = 0, 1.0
    return passes


# ---- Which arms ----


def _arms(pattern: str, **values: Sequence[Any]) -> list[str]:
    """``_arms("full/epochs={e}", e=(1, 2))`` -> one text for each combination."""
    return [pattern.format(**dict(zip(values, row, strict=True))) for row in itertools.product(*values.values())]


DECAY = "decay=0.75"
#: Names for several arms; in each the cheap ones come first.
GROUPS: dict[str, list[str]] = {
    "start": [
        f"ours/k=11/epochs=6/views=1/{DECAY}",
        f"full/epochs=1/{DECAY}",
        f"full/epochs=2/{DECAY}",
        f"ours/k=6/epochs=4/views=2/{DECAY}",
        f"ours/k=9/epochs=8/views=2/{DECAY}",
        f"full/epochs=4/{DECAY}",
        f"full/epochs=8/{DECAY}",
    ],
    "coarse": [
        f"ours/k=11/epochs=6/views=1/{DECAY}",
        f"full/epochs=1/{DECAY}",
        f"ours/k=9/epochs=8/views=2/keep=0.5/{DECAY}",
        f"full/epochs=2/{DECAY}",
        f"ours/k=6/epochs=4/views=2/{DECAY}",
        f"full/epochs=4/{DECAY}",
        f"full/epochs=8/{DECAY}",
    ],
    "full": _arms("full/epochs={e}/" + DECAY, e=(0.5, 1, 2, 3, 4, 8, 16, 30)),
    "plain": _arms("full/epochs={e}", e=(1, 2, 3, 4, 8, 16, 30)),
    "lora": _arms("lora/epochs={e}", e=(1, 2, 4, 8, 16)),
    "live": _arms("live/k={k}/epochs={e}/" + DECAY, k=(11, 9, 6), e=(2, 4, 8)),
    "probe": [
        *_arms("ours/k=all/epochs={e}/views={v}", e=(8, 30), v=(1, 2)),
        *_arms("live/k=all/epochs={e}", e=(2, 4, 8, 16)),
    ],
    "naive": [f"naive/k=11/epochs=6/{DECAY}", f"naive/k=9/epochs=8/{DECAY}", f"naive/k=6/epochs=4/{DECAY}"],
    "ours": [
        f"ours/k=11/epochs=3/views=1/{DECAY}",
        f"ours/k=11/epochs=6/views=1/{DECAY}",
        f"ours/k=11/epochs=8/views=2/{DECAY}",
        f"ours/k=9/epochs=4/views=1/keep=0.5/{DECAY}",
        f"ours/k=9/epochs=8/views=1/keep=0.5/{DECAY}",
        f"ours/k=9/epochs=8/views=2/keep=0.5/{DECAY}",
        f"ours/k=6/epochs=6/views=2/keep=0.5/{DECAY}",
        f"ours/k=6/epochs=4/views=2/{DECAY}",
        f"ours/k=6/epochs=8/views=2/keep=0.5/{DECAY}",
        f"ours/schedule=0:6,4:9/epochs=10/views=2/keep=0.5/{DECAY}",
        f"ours/schedule=0:6,6:9/epochs=16/views=4/keep=0.5/{DECAY}",
        f"ours/k=6/epochs=16/views=4/keep=0.5/{DECAY}",
        f"ours/k=3/epochs=8/views=4/keep=0.5/{DECAY}",
        f"ours/k=6/epochs=16/views=8/{DECAY}",
    ],
    "auto": [*_arms("auto/epochs=8/budget={b}", b=(0.1, 0.2, 0.33, 0.5)), *_arms("auto/epochs={e}", e=(4, 8, 16))],
    # ---- One lever at a time ----
    "levers": [
        *_arms("auto/epochs=1/budget=1/keep={s}", s=(0.25, 0.5, 0.75, 0.99)),
        "auto/epochs=1/budget=1/views=2",
        "auto/epochs=1/budget=1/scale=1",
        "ours/schedule=0:all,2:6,4:0/epochs=5/keep=0.5/scale=0:0.5,6:0.6,12:4",
    ],
    "keep": [
        *_arms("ours/k=9/epochs=8/views=2/keep={s}/" + DECAY, s=(0.25, 0.5, 0.75, 1)),
        *_arms("ours/k=6/epochs=8/views=2/keep={s}/" + DECAY, s=(0.25, 0.5, 0.75, 1)),
    ],
    "decay": [
        *_arms("ours/k=9/epochs=8/views=2/keep=0.5/decay={d}", d=(0.75, 0.9, 1)),
        *_arms("ours/k=6/epochs=4/views=2/decay={d}", d=(0.75, 0.9, 1)),
    ],
    "scale": [
        *_arms("ours/k={k}/epochs={e}/views=2/keep=0.5/decay=0.75/scale=auto", k=(9, 6), e=(4, 8)),
        *_arms("ours/k={k}/epochs={e}/views=2/keep=0.5/decay=0.75/scale=1", k=(9, 6), e=(4, 8)),
    ],
    "views": [
        *_arms("ours/k=11/epochs=6/views={v}/" + DECAY, v=(1, 2, 4)),
        *_arms("ours/k=9/epochs=8/views={v}/keep=0.5/" + DECAY, v=(1, 2, 4, 8)),
        *_arms("ours/k=6/epochs=8/views={v}/keep=0.5/" + DECAY, v=(1, 2, 4, 8)),
    ],
    "lossy": _arms("ours/k=9/epochs=8/views=2/keep=0.5/decay=0.75/codec={c}", c=("lossless", "auto")),
    "long": [
        f"ours/k=6/epochs=30/views=4/keep=0.5/{DECAY}",
        f"ours/schedule=0:6,10:9/epochs=30/views=4/keep=0.5/{DECAY}",
        f"ours/k=3/epochs=16/views=4/keep=0.5/{DECAY}",
        f"full/epochs=16/{DECAY}",
        f"full/epochs=30/{DECAY}",
    ],
}
GROUPS["all"] = list(dict.fromkeys(arm for group in list(GROUPS.values())[1:] for arm in group))


def chosen_arms(names: Sequence[str]) -> list[Arm]:
    """Return the arms of groups and of texts, in order, each once."""
    texts = [text for name in names for text in GROUPS.get(name, [name])]
    return list(dict.fromkeys(Arm.parse(text) for text in texts))


# ---- Learning rates ----

#: Of all arms: this times powers of two.
BASE_RATE = 3e-4
#: Values in the grid at first, and at most.
GRID = (4, 8)


def rate(power: int) -> float:
    return float(f"{BASE_RATE * 2.0**power:.4g}")


def first_power(arm: Arm) -> int:
    """Return where the grid of an arm begins; it grows where the best rate lies on its edge."""
    if arm.kind == "full":
        return -2 if arm.decay == 1 else 0
    if arm.kind == "lora" or arm.rank:
        return 1
    if arm.schedule.endswith(":all"):
        return 3
    return 1 if arm.decay != 1 else 0


def rates_to_try(arm: Arm, scores: Mapping[float, tuple[float, float]], grid: tuple[int, int] = GRID) -> list[float]:
    """Return the learning rates that are still to be tried: those of the grid, then beyond the edge, while the best lies there.

    Args:
        arm: The arm.
        scores: Of each rate that was tried: accuracy, and the negative loss, which decides between equals.
        grid: Values at first, and at most.
    """
    first = first_power(arm)
    powers = list(range(first, first + grid[0]))
    if missing := [rate(power) for power in powers if rate(power) not in scores]:
        return missing
    while rate(powers[0] - 1) in scores:
        powers.insert(0, powers[0] - 1)
    while rate(powers[-1] + 1) in scores:
        powers.append(powers[-1] + 1)
    best = max(scores, key=lambda one: scores[one])
    if len(powers) >= grid[1]:
        return []
    edges = {rate(powers[0]): rate(powers[0] - 1), rate(powers[-1]): rate(powers[-1] + 1)}
    return [edges[best]] if best in edges else []


def rate_source(arm: Arm, arms: Sequence[Arm]) -> Arm | None:
    """Return the arm without freezing whose learning rate an arm takes over, or ``None`` if the arm is tuned itself.

    That is full fine-tuning, or LoRA where adapters train.
    """
    if arm.tuned:
        return None
    if arm.rank:
        full = [one for one in arms if one.kind == "lora"]
    else:
        full = [one for one in arms if one.kind == "full" and one.decay == (1 if arm.decay == 1 else 0.75)]
    return min(full, key=lambda one: abs(math.log(one.epochs / arm.epochs)), default=None)
