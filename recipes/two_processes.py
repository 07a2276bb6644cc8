"""Train on several processes. They build one cache together, each a run of its shards, and each trains on its own share of it.

    torchrun --nproc_per_node 2 recipes/two_processes.py --model facebook/deit-tiny-patch16-224 --data ./flower_photos
    accelerate launch --config_file recipes/accelerate/multi_gpu.yaml recipes/two_processes.py --model ... --data ...

Nothing in the script says how many processes there are. With ``torchrun`` and ``--use_cpu`` they talk through gloo, and no GPU is needed
(``accelerate launch`` starts only one process where there is no GPU). What is written does not depend on their number: any number
of processes finds the cache, or goes on with a build that another began. Few rows need a small ``--chunk_size``, and a small
``--shard_chunks``, so that there is one of each for all of them.

``--data`` is what ``datasets.load_dataset`` takes; it has the splits ``train`` and ``test``, with columns ``image`` and ``label`` (a
``ClassLabel``).
"""

from __future__ import annotations

import argparse
from typing import Any

from datasets import load_dataset
from transformers import AutoImageProcessor, AutoModelForImageClassification, TrainingArguments, set_seed

from hf_freezecache import CacheConfig, FreezeCacheTrainer, FreezeConfig
from hf_freezecache.data.image_transform import ImageTransform


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="A model on the Hub, or its folder.")
    parser.add_argument("--data", required=True, help="A data set on the Hub, or its folder.")
    parser.add_argument("--schedule", default="0:6,3:9", help="Start:split_point pairs, or auto.")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch_size", type=int, default=16, help="Of each process.")
    parser.add_argument("--chunk_size", type=int, default=32, help="Images of a chunk, which one process reads.")
    parser.add_argument("--shard_chunks", type=int, default=8, help="Chunks of a shard, which one process writes.")
    parser.add_argument("--cache_dir", default="caches", help="A folder that all processes see.")
    parser.add_argument("--output_dir", default="outputs/two_processes")
    parser.add_argument("--use_cpu", action="store_true")
    options = parser.parse_args()

    # First the arguments: they join the processes, so that main_process_first can let one of them prepare the data.
    args = TrainingArguments(
        options.output_dir,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        learning_rate=3e-4,
        use_cpu=options.use_cpu,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        remove_unused_columns=False,
        report_to="none",
    )
    with args.main_process_first():
        data = load_dataset(options.data)
    classes = data["train"].features["label"].names
    processor = AutoImageProcessor.from_pretrained(options.model)
    augmented, plain = (ImageTransform.from_processor(processor, train=train) for train in (True, False))
    set_seed(0)  # of the head, which is to be the same in all processes
    trainer = FreezeCacheTrainer(
        model=AutoModelForImageClassification.from_pretrained(
            options.model, num_labels=len(classes), id2label=dict(enumerate(classes)), ignore_mismatched_sizes=True
        ),
        args=args,
        train_dataset=data["train"].with_transform(augmented),
        eval_dataset=data["test"].with_transform(plain),
        processing_class=processor,
        compute_metrics=accuracy,
        freeze_config=FreezeConfig(schedule=options.schedule),
        cache_config=CacheConfig(
            cache_dir=options.cache_dir, chunk_size=options.chunk_size, shard_chunks=options.shard_chunks
        ),
    )
    trainer.train()
    trainer.save_model()
    found = trainer.evaluate()
    if args.should_log:
        print(f"{args.world_size} processes: accuracy {found['eval_accuracy']:.1%}")
    trainer.accelerator.end_training()  # a process that ends with its group open may be aborted


if __name__ == "__main__":
    main()
