"""What a further view costs beside the first, at equal distortion: stored as the residual of its prediction, or directly.

    python recipes/benchmarks/copies_rate.py --model facebook/deit-tiny-patch16-224 --data imagenette224 --json record.json

Images of the test split are cut into three parts: codecs and predictors are fitted on the first, one of the predictors that the
package tries is chosen on the second, and bits are compared on the third, which nothing else saw, where both ways are brought
to the same KL to the exact logits. First views, from which the others are predicted, are exact, as from a lossless cache, or
decoded at a KL of their own.
Views: ``crop``, a random resized crop of .35 to 1 of the area and a flip in half of them; ``flip``, all mirrored. All bytes of
the views count but the fitted state. With ``weight`` the basis of both ways weighs directions by the gradient.

Last, what calibration promises: a step chosen for the KL on the second part is measured on the third.

With ``--plot`` a picture is drawn of what augmentation moves: how much of ``crop`` the first view predicts, by channel and token.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from record import save
from sensitivity_plot import draw_sensitivity
from torch import Tensor
from transformers import AutoModelForImageClassification

from hf_freezecache.codecs import (
    Codec,
    CopyCodec,
    Pack,
    Predictor,
    Transform,
    Zstd,
)
from hf_freezecache.codecs.predictor import WHOLE
from hf_freezecache.compression.sensitivity import measure_sensitivity
from hf_freezecache.compression.step_search import roundtrip
from hf_freezecache.data.image_transform import ImageTransform
from hf_freezecache.model.split import Split

GRID, PREFIX, CHUNK = (14, 14), 1, 32
#: As ``hf_freezecache.compression.extra_views`` tries them: pull, and whether channels mix.
PREDICTORS = ((0.0, True), (0.5, True), (0.5, False))


def codec(transform: Transform) -> Codec:
    return Codec((transform, Pack(), Zstd(matches="skip")))


class Suffix:
    """KL to the exact logits, and Fisher gradients, at one split point."""

    def __init__(self, model: Any, split_point: int) -> None:
        self.split = Split(model, split_point)
        self.split.image_shape = (3, 224, 224)

    def logs(self, states: Tensor) -> Tensor:
        with torch.no_grad():
            return (
                torch.cat([self.split.logits_and_features(part)[0] for part in states.split(CHUNK)])
                .double()
                .log_softmax(-1)
            )

    def kl(self, exact: Tensor, states: Tensor) -> float:
        return float((exact.exp() * (exact - self.logs(states))).sum(-1).mean())

    def gradients(self, states: Tensor) -> Tensor:
        generator, found = torch.Generator().manual_seed(0), []
        for part in states.split(CHUNK):
            leaf = part.clone().requires_grad_(True)
            scores = self.split.logits_and_features(leaf)[0].log_softmax(-1)
            labels = torch.multinomial(scores.detach().exp(), 1, generator=generator)
            found.append(torch.autograd.grad(scores.gather(1, labels).sum(), leaf)[0])
        return torch.cat(found)


def search(
    transform: Transform, given: Tensor, offset: Tensor | float, kl: Callable[[Tensor], float], target: float
) -> Any:
    """Return the step that gives the KL, and the bits per element there, between the two nearest of the steps tried."""
    assert transform.step is not None
    position, tried = math.log2(transform.step), []
    for _ in range(9):
        decoded, bits = roundtrip(codec(transform.with_step_size(2**position)), given, CHUNK)
        found = max(kl(decoded + offset), 1e-9)
        tried.append((math.log(found), bits, position))
        if abs(math.log2(found / target)) < 0.04:
            break
        position += min(max(0.5 * math.log2(target / found), -1.5), 1.5)
    tried.sort()
    logs, rates, steps = zip(*tried, strict=True)
    return 2 ** float(np.interp(math.log(target), logs, steps)), float(np.interp(math.log(target), logs, rates))


def compare(
    suffix: Suffix,
    base: Tensor,
    view: Tensor,
    place: Tensor,
    parts: tuple[slice, slice, slice],
    fit: Callable[[Tensor], Transform],
    target: float,
) -> dict[str, Any]:
    """Return bits of a view directly and as residual at one KL, on the third part."""
    first, second, third = parts
    chosen_on, measured_on = (partial(suffix.kl, suffix.logs(view[part])) for part in (second, third))
    direct = fit(view)
    step, direct_bits = search(direct, view[third], 0.0, measured_on, target)
    best: Any = None
    for pull, full in PREDICTORS:
        predictor = Predictor(pull, full, PREFIX, GRID).fit(base[first], place[first], view[first])
        residual, predicted = CopyCodec(codec(direct), predictor).residual(view, base, place), predictor(base, place)
        transform = fit(residual)
        own_step, bits = search(transform.with_step_size(step), residual[second], predicted[second], chosen_on, target)
        if best is None or bits < best[0]:
            best = (bits, own_step, transform, residual, predicted, pull, full)
    _, own_step, transform, residual, predicted, pull, full = best
    own = transform.with_step_size(own_step)
    _, residual_bits = search(own, residual[third], predicted[third], measured_on, target)
    promised, _ = roundtrip(codec(own), residual[third], CHUNK)
    left = residual[third][:, PREFIX:].square().sum()
    spread = (view[third][:, PREFIX:] - view[first][:, PREFIX:].mean(0)).square().sum()
    return {
        "direct_bits": round(direct_bits, 4),
        "residual_bits": round(residual_bits, 4),
        "ratio": round(residual_bits / direct_bits, 4),
        "residual_energy": round(float(left / spread), 4),
        "pull": pull,
        "channels_mix": full,
        "kl_of_unseen_images": round(measured_on(promised + predicted[third]), 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="DeiT-Tiny, a folder or a name on the Hub.")
    parser.add_argument("--data", required=True, help="Folder with test.parquet: image, label.")
    parser.add_argument("--images", type=int, default=96, help="Images in each of the three parts.")
    parser.add_argument("--split_points", default="3,6,9,11")
    parser.add_argument("--weights", default="0,0.5")
    parser.add_argument("--bases", default="exact,0.002", help="KL of the first views that predict; exact: lossless.")
    parser.add_argument("--kl", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, help="PNG to draw.")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    rows = datasets.load_dataset("parquet", data_files={"test": f"{args.data}/test.parquet"})["test"]
    order = np.random.default_rng(args.seed).permutation(len(rows))[: 3 * args.images]
    images = [rows[int(row)]["image"].convert("RGB") for row in order]
    looks: dict[str, Any] = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    still = ImageTransform(224, train=False, **looks)
    moving = {
        "crop": ImageTransform(224, train=True, scale=(0.35, 1.0), flip=0.5, **looks),
        "flip": ImageTransform(224, train=True, scale=None, flip=1.0, **looks),
    }
    random.seed(args.seed)
    pixels, geometry = {"base": torch.stack([still.render(i, still.draw(*i.size)) for i in images])}, {}
    for name, transform in moving.items():
        drawn = [transform.draw(*image.size) for image in images]
        pixels[name] = torch.stack([transform.render(i, p) for i, p in zip(images, drawn, strict=True)])
        views = torch.tensor([p.geometry() for p in drawn], dtype=torch.float32)
        geometry[name] = torch.stack([torch.tensor([WHOLE]).expand(len(views), -1), views], 1)
    model = AutoModelForImageClassification.from_pretrained(args.model).eval()
    first, second, third = (slice(part * args.images, (part + 1) * args.images) for part in range(3))
    results: dict[str, Any] = {}
    states: dict[str, tuple[Tensor, ...]] = {}
    with torch.no_grad():
        for name, batch in pixels.items():
            parts = [model(pixel_values=part, output_hidden_states=True).hidden_states for part in batch.split(CHUNK)]
            states[name] = tuple(torch.cat(layer) for layer in zip(*parts, strict=True))
    split_points = [int(split_point) for split_point in args.split_points.split(",")]
    if args.plot:
        measured = []
        for split_point in split_points:
            flip, crop = (
                partial(
                    measure_sensitivity,
                    states["base"][split_point],
                    states[name][split_point],
                    geometry[name],
                    PREFIX,
                    GRID,
                )
                for name in ("flip", "crop")
            )
            measured.append((split_point, crop({"flip": flip().overall})))
        draw_sensitivity(measured, args.plot)
    for split_point in split_points:
        suffix = Suffix(model, split_point)
        for distortion in args.bases.split(","):
            base = states["base"][split_point]
            if distortion != "exact":
                fitted = Transform().fit(base[first], PREFIX, GRID)
                kl = partial(suffix.kl, suffix.logs(base[second]))
                step, _ = search(fitted, base[second], 0.0, kl, float(distortion))
                base, _ = roundtrip(codec(fitted.with_step_size(step)), base, CHUNK)
            for name in moving:
                view, place = states[name][split_point], geometry[name]
                for weight in map(float, args.weights.split(",")):
                    gradients = suffix.gradients(view[first]) if weight else None

                    def fit(sample: Tensor, w: float = weight, g: Any = gradients) -> Transform:
                        return Transform(gradient_weight=w).fit(sample[first], PREFIX, GRID, g)

                    key = f"k={split_point} base={distortion} {name} weight={weight:g}"
                    results[key] = compare(suffix, base, view, place, (first, second, third), fit, args.kl)
                    found = results[key]
                    print(
                        f"{key}: {found['direct_bits']:.3f} bits directly, {found['residual_bits']:.3f} as residual, ratio "
                        f"{found['ratio']:.3f}; residual energy {found['residual_energy']:.2f}, pull {found['pull']}, "
                        f"{'all channels' if found['channels_mix'] else 'each channel'}; calibrated to {args.kl:g}, unseen "
                        f"{found['kl_of_unseen_images']:.4f}",
                        flush=True,
                    )
        config = {name: str(value) for name, value in vars(args).items() if name not in ("json", "plot")}
        config |= {"model": Path(args.model).name, "data": Path(args.data).name}
        save(args.json, "copies_rate", config, results)


if __name__ == "__main__":
    main()
