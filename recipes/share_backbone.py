"""Run a frozen backbone once, share its hidden states through the Hub, train several heads from them without images.

One machine has the images. It computes what the first blocks make of them, and pushes that to two private data sets:

    python recipes/share_backbone.py share --model facebook/deit-tiny-patch16-224 --data ./flower_photos --repo_id user/flowers-k09

Any other machine pulls and trains; it has no images, and needs none:

    python recipes/share_backbone.py train --model facebook/deit-tiny-patch16-224 --repo_id user/flowers-k09

``--data`` is what ``datasets.load_dataset`` takes; it has the splits ``train`` and ``test``, with columns ``image`` and ``label``. The
data sets on the Hub are private, since hidden states can reveal the images they were computed from.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageClassification, TrainingArguments, set_seed

from hf_freezecache import CachedDataset, FreezeCacheTrainer, SuffixModel
from hf_freezecache.cli.build import BuildSettings, build
from hf_freezecache.data.collators import collate_cached

#: What the heads shall tell apart: a name, and the new class of each class of the data set.
HEADS: dict[str, Any] = {
    "all classes": lambda label, count: label,
    "the first class, or another": lambda label, count: int(label > 0),
    "first or second half": lambda label, count: int(label >= count / 2),
}


def share(options: argparse.Namespace) -> None:
    for split, views in (("train", options.views), ("test", 1)):
        settings = {name: getattr(options, name) for name in ("model", "split_point", "codec", "cache_dir")}
        cached, trainer = build(BuildSettings(dataset=options.data, split=split, num_views=views, **settings))
        card = {"dataset_name": options.dataset_name, "license": options.license}
        report = trainer.push_cache_to_hub(f"{options.repo_id}-{split}", **card)
        index = cached.reader.index
        size = f"{index.total_bytes / 2**20:.1f} MiB, {index.bits_per_element:.2f} bits per element"
        print(f"{split}: {index.num_samples} images in {index.num_views} views, {size}, pushed to {report.url}")


def collate(items: list[dict[str, torch.Tensor]], relabel: Any, count: int) -> dict[str, Any]:
    batch = collate_cached(items)
    return {**batch, "labels": torch.tensor([relabel(int(label), count) for label in batch["labels"]])}


def train(options: argparse.Namespace) -> None:
    # All chunks of the test set stay in memory: it is read in the order of its rows, which lie all over it.
    cached = CachedDataset.from_pretrained(f"{options.repo_id}-train")
    test = CachedDataset.from_pretrained(f"{options.repo_id}-test", max_chunks=10**6)
    print(f"pulled and checked: {len(cached)} and {len(test)} images", flush=True)
    count = 1 + max(int(test[row]["labels"]) for row in range(len(test)))
    for number, (name, relabel) in enumerate(HEADS.items()):
        folder = Path(options.output_dir) / f"head-{number}"
        set_seed(0)  # of the head
        model = AutoModelForImageClassification.from_pretrained(
            options.model, num_labels=1 + relabel(count - 1, count), ignore_mismatched_sizes=True
        )
        args = {"num_train_epochs": options.epochs, "learning_rate": options.learning_rate, "bf16": options.bf16}
        args |= {"per_device_train_batch_size": 32, "lr_scheduler_type": "cosine", "seed": 0}
        trainer = FreezeCacheTrainer(
            model=SuffixModel.for_cache(model, cached, relabelled=True),
            args=TrainingArguments(str(folder), save_strategy="no", report_to="none", disable_tqdm=True, **args),
            train_dataset=cached,
            eval_dataset=test,
            data_collator=partial(collate, relabel=relabel, count=count),
            compute_metrics=lambda found: {"accuracy": (found.predictions.argmax(-1) == found.label_ids).mean().item()},
        )
        trainer.train()
        model.save_pretrained(folder)  # whole
        print(f"{name}: accuracy {trainer.evaluate()['eval_accuracy']:.3f} on {len(test)} held-out images", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=["share", "train"])
    parser.add_argument("--model", required=True, help="A model on the Hub, or its folder.")
    parser.add_argument("--repo_id", required=True, help="user/name; -train and -test are appended.")
    parser.add_argument("--data", help="share: a data set on the Hub, or its folder.")
    parser.add_argument("--dataset_name", help="share: source of the images, for the card.")
    parser.add_argument("--license", help="share: its licence, for the card.")
    parser.add_argument("--bf16", action="store_true")
    defaults = {"split_point": 9, "views": 4, "codec": "auto", "cache_dir": "caches"}  # share
    for name, default in {**defaults, "output_dir": "heads", "epochs": 3, "learning_rate": 3e-4}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    options = parser.parse_args()
    if options.step == "share" and options.data is None:
        parser.error("share needs --data")
    {"share": share, "train": train}[options.step](options)


if __name__ == "__main__":
    main()
