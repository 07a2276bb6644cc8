"""What it costs to compute the hidden states of a later stage from those of an earlier one.

    python recipes/benchmarks/promotion.py --json FILE

``blocks`` runs the blocks between the two split points and nothing else. ``promoted`` is ``Split.run_blocks``, with which a
build from an earlier cache computes each batch. Both run in turn, and the ratio is taken round by round. The model has the
shape of DeiT-Tiny and random weights.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from record import save, spread
from transformers import DeiTConfig, DeiTForImageClassification, set_seed

from hf_freezecache.model.probe import first_tensor
from hf_freezecache.model.split import Splits

SEED = 0


def seconds(function: Callable[[], object], batches: int) -> float:
    """Return the seconds of some calls."""
    started = time.perf_counter()
    for _ in range(batches):
        function()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", type=int, default=6, help="Split point of the earlier cache.")
    parser.add_argument("--stop", type=int, default=9, help="Split point of the later cache.")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--batches", type=int, default=4, help="Batches per round.")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="Record to write.")
    args = parser.parse_args()

    set_seed(SEED)
    model = DeiTForImageClassification(
        DeiTConfig(hidden_size=192, num_attention_heads=3, intermediate_size=768, num_labels=10)
    ).eval()
    splits = Splits(model, (3, 224, 224))
    earlier = splits.at(args.start)
    with torch.no_grad():
        states = earlier.prefix(torch.randn(args.batch_size, 3, 224, 224))

        def blocks() -> torch.Tensor:
            hidden_states = states
            for block in list(splits.blocks)[args.start : args.stop]:
                hidden_states = first_tensor(block(hidden_states))
            return hidden_states

        def promoted() -> torch.Tensor:
            return earlier.run_blocks(states, args.stop)

        assert torch.equal(blocks(), promoted())
        rounds = [(seconds(blocks, args.batches), seconds(promoted, args.batches)) for _ in range(args.rounds)]
    ratios = [promotion / plain for plain, promotion in rounds]
    print(
        f"promoting {args.start} -> {args.stop}: {statistics.median(ratios):.3f} x the blocks alone "
        f"({min(ratios):.3f} to {max(ratios):.3f}), {args.rounds} rounds of {args.batches} batches of {args.batch_size}"
    )
    if args.json is not None:
        config = {name: value for name, value in vars(args).items() if name != "json"} | {"seed": SEED}
        results = {
            "blocks_seconds": spread([plain for plain, _ in rounds]),
            "promoted_seconds": spread([promotion for _, promotion in rounds]),
            "promoted_over_blocks": spread(ratios),
        }
        save(args.json, "promotion", config, results)


if __name__ == "__main__":
    main()
