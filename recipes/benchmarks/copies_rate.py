"""What a further view costs beside the first, at equal fidelity: stored as the residual of its prediction, or directly.

    python recipes/benchmarks/copies_rate.py --model facebook/deit-tiny-patch16-224 --data imagenette224 --json record.json

Images of the test split are cut into three parts: codecs and predictors are fitted on the first, one of the predictors that the
package tries is chosen on the second, and bits are compared on the third, which nothing else saw, where both ways are brought
to the same KL to the exact logits. Base views are decoded from a transform codec at that KL, as the cache would give them.
Views: ``crop``, a random resized crop of .35 to 1 of the area and a flip in half of them; ``flip``, all mirrored. All bytes of
the views count but the fitted state. With ``weight`` the basis of both ways weighs directions by the gradient.

Last, what calibration promises: a step chosen for the KL on the second part is measured on the third.
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
from torch import Tensor
from transformers import AutoModelForImageClassification

from hf_freezecache.calibration import coded
from hf_freezecache.codecs import CopyCodec, Pack, Pipeline, Predictor, Transform, Zstd
from hf_freezecache.codecs.copies import WHOLE
from hf_freezecache.splitting import Split
from hf_freezecache.transforms import ImageTransform

GRID, PREFIX, CHUNK = (14, 14), 1, 32
#: As ``hf_freezecache.copying`` tries them: pull, and whether channels mix.
PREDICTORS = ((0.0, True), (0.5, True), (0.0, False), (0.5, False))


def codec(transform: Transform) -> Pipeline:
    return Pipeline((transform, Pack(), Zstd(matches="skip")))


class Suffix:
    """KL to the exact logits, and Fisher gradients, at one split point."""

    def __init__(self, model: Any, split_point: int) -> None:
        self.split = Split(model, split_point)
        self.split.image_shape = (3, 224, 224)

    def logs(self, states: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([self.split.outputs(part)[0] for part in states.split(CHUNK)]).double().log_softmax(-1)

    def kl(self, exact: Tensor, states: Tensor) -> float:
        return float((exact.exp() * (exact - self.logs(states))).sum(-1).mean())

    def gradients(self, states: Tensor) -> Tensor:
        generator, found = torch.Generator().manual_seed(0), []
        for part in states.split(CHUNK):
            leaf = part.clone().requires_grad_(True)
            scores = self.split.outputs(leaf)[0].log_softmax(-1)
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
        decoded, bits = coded(codec(transform.with_step(2**position)), given, CHUNK)
        found = max(kl(decoded + offset), 1e-9)
        tried.append((math.log(found), bits, position))
        if abs(math.log2(found / target)) < 0.04:
            break
        position += min(max(0.5 * math.log2(target / found), -1.5), 1.5)
    tried.sort()
    logs, rates, steps = zip(*tried, strict=True)
    return 2 ** float(np.interp(math.log(target), logs, steps)), float(np.interp(math.log(target), logs, rates))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="DeiT-Tiny, a folder or a name on the Hub.")
    parser.add_argument("--data", required=True, help="Folder with test.parquet: image, label.")
    parser.add_argument("--images", type=int, default=128, help="Images in each of the three parts.")
    parser.add_argument("--split_points", default="3,6,9,11")
    parser.add_argument("--weights", default="0,0.5")
    parser.add_argument("--kl", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
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
    for split_point in map(int, args.split_points.split(",")):
        suffix = Suffix(model, split_point)
        base = states["base"][split_point]
        fitted = Transform().fit(base[first], PREFIX, GRID)
        exact = suffix.logs(base[second])
        step, _ = search(fitted, base[second], 0.0, partial(suffix.kl, exact), args.kl)
        decoded, _ = coded(codec(fitted.with_step(step)), base, CHUNK)
        for name in moving:
            view = states[name][split_point]
            chosen_on, measured_on = (suffix.logs(view[part]) for part in (second, third))
            for weight in map(float, args.weights.split(",")):
                gradients = suffix.gradients(view[first]) if weight else None

                def fit(sample: Tensor, w: float = weight, g: Any = gradients) -> Transform:
                    return Transform(gradient_weight=w).fit(sample[first], PREFIX, GRID, g)

                direct = fit(view)
                _, chosen_bits = search(direct, view[second], 0.0, partial(suffix.kl, chosen_on), args.kl)
                _, bits = search(direct, view[third], 0.0, partial(suffix.kl, measured_on), args.kl)
                best: Any = None
                for pull, full in PREDICTORS:
                    predictor = Predictor(pull, full, PREFIX, GRID).fit(
                        decoded[first], geometry[name][first], view[first]
                    )
                    copies = CopyCodec(codec(direct), predictor)
                    residual = copies.residual(view, decoded, geometry[name])
                    predicted = predictor(decoded, geometry[name])
                    transform = fit(residual)
                    own_step, own_bits = search(
                        transform,
                        residual[second],
                        predicted[second],
                        partial(suffix.kl, chosen_on),
                        args.kl,
                    )
                    if best is None or own_bits < best[0]:
                        best = (own_bits, own_step, transform, residual, predicted, (pull, full))
                own_bits, own_step, transform, residual, predicted, which = best
                _, left = search(transform, residual[third], predicted[third], partial(suffix.kl, measured_on), args.kl)
                promised, _ = coded(codec(transform.with_step(own_step)), residual[third], CHUNK)
                unseen = suffix.kl(measured_on, promised + predicted[third])
                key = f"k={split_point} {name} weight={weight:g}"
                energy = float(
                    residual[third][:, PREFIX:].square().sum()
                    / (view[third][:, PREFIX:] - view[first][:, PREFIX:].mean(0)).square().sum()
                )
                results[key] = {
                    "direct_bits": round(bits, 4),
                    "residual_bits": round(left, 4),
                    "ratio": round(left / bits, 4),
                    "ratio_on_second_part": round(own_bits / chosen_bits, 4),
                    "residual_energy": round(energy, 4),
                    "pull": which[0],
                    "channels_mix": which[1],
                    "kl_of_unseen_images": round(unseen, 5),
                }
                print(
                    f"{key}: {bits:.3f} bits directly, {left:.3f} as residual, ratio {left / bits:.3f} (on the images it was "
                    f"chosen on {own_bits / chosen_bits:.3f}); energy {energy:.2f}, pull {which[0]}, "
                    f"{'all channels' if which[1] else 'each channel'}; calibrated to {args.kl:g}, unseen {unseen:.4f}",
                    flush=True,
                )
        config = {name: str(value) for name, value in vars(args).items() if name != "json"}
        config |= {"model": Path(args.model).name, "data": Path(args.data).name}
        save(args.json, "copies_rate", config, results)


if __name__ == "__main__":
    main()
