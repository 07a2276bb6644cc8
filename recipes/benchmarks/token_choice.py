"""Which half of the tokens should a step see, and need the other half be stored? Accuracy at equal cost, and at equal bytes.

    python recipes/benchmarks/token_choice.py --model MODEL --data caltech50 --image-size 112 --json token_choice.json

The head trains alone first, on what the last block gives. Then the blocks behind ``--split-point`` train on hidden states of
one view of each image, in five ways:

* ``all``: every token; a step costs twice as much as in the others.
* ``random``: the prefix tokens and a random half of the patches, drawn anew in each epoch. This is ``token_keep=0.5``.
* ``stored``: the same random half in each epoch. The other half need not be stored: half of the bytes.
* ``attended``: the half that CLS attends to most in the last frozen block. Half of the bytes.
* ``dissimilar``: the half that is least like the mean of the image's patches (cosine). Half of the bytes.

Evaluation sees all tokens. Learning rates are tried on a quarter of the training rows, for each way by itself.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from accuracy_arms import Arm
from accuracy_runs import Runner, Task, decayed_optimizer
from record import save, spread
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup, set_seed

from hf_freezecache import split_model

WAYS = ("all", "random", "stored", "attended", "dissimilar")
KEEP, DECAY, HEAD_RATE = 0.5, 0.75, 1e-2


def states_of(runner: Runner, rows: datasets.Dataset, split_point: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return hidden states, labels, what the last block gives, and how much CLS attends to each patch."""
    model = runner.model.eval()
    model.set_attn_implementation("eager")
    states, features, attention = [], [], []
    rendered = rows.with_transform(runner.plain)
    with torch.no_grad():
        for begin in range(0, len(rows), 64):
            output = model.base_model(
                torch.stack(rendered[begin : begin + 64]["pixel_values"]),
                output_hidden_states=True,
                output_attentions=True,
            )
            states.append(output.hidden_states[split_point])
            features.append(output.last_hidden_state[:, 0])
            attention.append(output.attentions[split_point - 1].mean(1)[:, 0, 1:])
    model.set_attn_implementation("sdpa")
    return torch.cat(states), torch.tensor(rows["label"]), torch.cat(features), torch.cat(attention)


def scores(way: str, states: Tensor, attention: Tensor, seed: int) -> Tensor:
    """Return a number for each patch: those with the highest are seen."""
    if way == "attended":
        return attention
    patches = states[:, 1:]
    if way == "dissimilar":
        return -nn.functional.cosine_similarity(patches, patches.mean(1, keepdim=True), dim=-1)
    return torch.rand(patches.shape[:2], generator=torch.Generator().manual_seed(seed))


def seen(states: Tensor, score: Tensor) -> Tensor:
    """Return the prefix token and the patches with the highest scores, in their order."""
    kept = score.topk(round(KEEP * score.shape[1]), dim=1).indices.sort(1).values + 1
    kept = torch.cat([torch.zeros_like(kept[:, :1]), kept], 1)
    return states.gather(1, kept.unsqueeze(-1).expand(-1, -1, states.shape[-1]))


def batches(number: int, epochs: int, seed: int) -> Iterator[tuple[int, Tensor]]:
    order = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        for rows in torch.randperm(number, generator=order).split(32):
            yield epoch, rows


def train(args: argparse.Namespace, known: dict[Any, Any], way: str, lr: float, seed: int, tuning: bool) -> float:
    """Return the accuracy after training in one way, percent."""
    task = Task(args.model, args.data, args.image_size, folds=args.folds, train=args.train)
    runner = Runner(task, Arm("ours", schedule=f"0:{args.split_point}"), lr, seed, tuning)
    key = (tuning, seed if tuning or args.folds else None)  # else all seeds have the same rows
    if key not in known:
        known.clear()
        known[key] = [states_of(runner, rows, args.split_point) for rows in (runner.train_rows, runner.test_rows)]
    (states, labels, features, attention), (test_states, test_labels, _, _) = known[key]
    model, split = runner.model, split_model(runner.model, args.split_point)
    loss_of = nn.functional.cross_entropy
    set_seed(seed)
    head = torch.optim.AdamW(model.classifier.parameters(), lr=HEAD_RATE, weight_decay=0.05)
    for _, rows in batches(len(labels), args.head_epochs, seed):
        head.zero_grad()
        loss_of(model.classifier(features[rows]), labels[rows]).backward()
        head.step()
    for parameter in split.prefix_parameters().values():
        parameter.requires_grad_(False)
    optimizer = decayed_optimizer(model, lr, DECAY, runner.num_blocks)
    steps = args.epochs * -(-len(labels) // 32)
    scheduler = get_cosine_schedule_with_warmup(optimizer, round(0.05 * steps), steps)
    model.train()
    fixed = scores(way, states, attention, seed)
    for epoch, rows in batches(len(labels), args.epochs, seed):
        score = scores(way, states, attention, 1000 * seed + epoch) if way == "random" else fixed
        batch = states[rows] if way == "all" else seen(states[rows], score[rows])
        optimizer.zero_grad()
        split.suffix(batch, labels[rows]).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    model.eval()
    with torch.no_grad():
        found = torch.cat([split.suffix(part).logits.argmax(-1) for part in test_states.split(64)])
    return 100 * float((found == test_labels).float().mean())


def run(args: argparse.Namespace) -> dict[str, Any]:
    results: dict[str, Any] = {}
    known: dict[Any, Any] = {}
    tuned = {way: {lr: train(args, known, way, lr, 0, True) for lr in args.rates} for way in args.ways}
    rates = {way: max(tried, key=lambda one: tried[one]) for way, tried in tuned.items()}
    tested: dict[str, list[float]] = {way: [] for way in args.ways}
    for seed in args.seeds:
        for way in args.ways:
            tested[way].append(train(args, known, way, rates[way], seed, False))
    for way, found in tested.items():
        tried, lr = tuned[way], rates[way]
        results[way] = {
            "tried": {f"{one:g}": round(value, 2) for one, value in tried.items()},
            "lr": lr,
            **spread(found),
        }
        error = statistics.stdev(found) / len(found) ** 0.5 if len(found) > 1 else float("nan")
        print(f"{way}: {statistics.mean(found):.2f} +- {error:.2f}% at learning rate {lr:g}", flush=True)
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="as for time_to_accuracy.py")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--folds", type=int, default=0)
    parser.add_argument("--train", type=int, default=0)
    parser.add_argument("--split-point", type=int, default=6)
    parser.add_argument("--head-epochs", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", default=[6e-4, 1.2e-3, 2.4e-3, 4.8e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    datasets.disable_progress_bars()
    config = {name: value for name, value in copy.copy(vars(args)).items() if name != "json"}
    config |= {"model": Path(args.model).name, "data": Path(args.data).name}
    results = run(args)
    if args.json is not None:
        save(args.json, "token_choice", config, results)


if __name__ == "__main__":
    main()
