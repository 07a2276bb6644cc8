"""Fine-tune an image classifier from a cache of its own frozen blocks.

The counterpart of Hugging Face's ``run_image_classification.py``, with the same arguments and ``Trainer`` replaced by
``FreezeCacheTrainer``:

    python recipes/image_classification.py \\
        --model_name_or_path facebook/deit-tiny-patch16-224 --ignore_mismatched_sizes \\
        --dataset_name ./flower_photos --output_dir outputs/flowers --freezecache_dir caches \\
        --do_train --do_eval --num_train_epochs 3 --per_device_train_batch_size 32 --learning_rate 3e-4 --bf16 \\
        --freeze_schedule 0:6,2:9 --num_views 2

``model_cards/`` has the cards of runs of it, with what they took.

- ``--dataset_name`` is a data set on the Hub, or a local folder of parquet files (``train*.parquet``, ``test*.parquet``)
  or of images (``train/<class>/*.jpg``, ``test/<class>/*.jpg``). It is evaluated on its split ``validation``, else on
  ``test``, else on ``--train_val_split`` of ``train``.
- ``--freezecache_dir`` is the folder of hidden states; ``--cache_dir`` is that of downloads, as in Hugging Face's script.
- Without ``--freeze_schedule`` it trains as ``Trainer`` does.
- ``hf-freezecache settings`` says what else can be set of freezing and caching.
- ``--resume_from_checkpoint True`` goes on from the last checkpoint in ``--output_dir``.
- One ``.json`` file may take the place of all arguments. ``accelerate launch`` starts it as well, on one process.
- Torchvision is not needed.
"""

from __future__ import annotations

import glob
import json
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import evaluate
import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    EvalPrediction,
    HfArgumentParser,
    TrainingArguments,
    set_seed,
)

from hf_freezecache import (
    CacheConfig,
    FreezeCacheTrainer,
    FreezeConfig,
)
from hf_freezecache.data.image_transform import ImageTransform


@dataclass
class ModelArguments:
    model_name_or_path: str = field(
        default="google/vit-base-patch16-224-in21k", metadata={"help": "A model on the Hub, or its folder."}
    )
    config_name: str | None = field(default=None, metadata={"help": "Configuration, if not the model's own."})
    image_processor_name: str | None = field(default=None, metadata={"help": "Processor, if not the model's own."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the Hub."})
    cache_dir: str | None = field(default=None, metadata={"help": "Folder for downloads."})
    token: str | None = field(
        default=None, metadata={"help": "Token for the Hub; default: the one of `hf auth login`."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code from the Hub. Read it first."})
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Start a new head where the model's own has another number of classes."}
    )


@dataclass
class DataTrainingArguments:
    dataset_name: str | None = field(
        default=None, metadata={"help": "A data set on the Hub, or a local folder of parquet files or of images."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    train_dir: str | None = field(default=None, metadata={"help": "Folder with one folder of images per class."})
    validation_dir: str | None = field(default=None, metadata={"help": "The same, for evaluation."})
    train_val_split: float = field(
        default=0.15, metadata={"help": "Fraction of train to evaluate on where there is no other split."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many samples, drawn by seed."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on so many samples."})
    image_column_name: str = field(default="image", metadata={"help": "Column that holds the images."})
    label_column_name: str = field(default="label", metadata={"help": "Column that holds the classes."})
    min_crop_scale: float = field(default=0.08, metadata={"help": "Least fraction of the area in a random crop."})
    brightness: float = field(default=0.0, metadata={"help": "Draw a factor of 1 - BRIGHTNESS to 1 + BRIGHTNESS."})
    contrast: float = field(default=0.0, metadata={"help": "The same for contrast."})
    saturation: float = field(default=0.0, metadata={"help": "The same for saturation."})
    card_dataset: str | None = field(
        default=None, metadata={"help": "Name of the data in the model card; default: --dataset_name, if on the Hub."}
    )
    card_base_model: str | None = field(
        default=None, metadata={"help": "The model on the Hub that a local --model_name_or_path is."}
    )
    card_baseline: list[str] = field(
        default_factory=list,
        metadata={"help": "--output_dir of a run without freezing, or of several, which the model card compares with."},
    )
    card_seeds: list[str] = field(
        default_factory=list,
        metadata={"help": "--output_dir of runs of other seeds: the model card then shows mean and spread."},
    )

    def __post_init__(self) -> None:
        if self.dataset_name is None and self.train_dir is None and self.validation_dir is None:
            raise ValueError("There are no data: give --dataset_name, or --train_dir and --validation_dir.")


def make_transform(processor: Any, data_args: DataTrainingArguments, train: bool) -> ImageTransform:
    """Render at the processor's size and normalisation; with ``train``, cropped, flipped and coloured at random."""
    return ImageTransform.from_processor(
        processor,
        train=train,
        scale=(data_args.min_crop_scale, 1.0),
        brightness=data_args.brightness,
        contrast=data_args.contrast,
        saturation=data_args.saturation,
        image_column=data_args.image_column_name,
        label_column=data_args.label_column_name,
    )


def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {
        "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
        "labels": torch.tensor([example["labels"] for example in examples]),
    }


def parse_arguments() -> tuple[Any, ...]:
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, TrainingArguments, FreezeConfig, CacheConfig))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        arguments = json.loads(Path(sys.argv[1]).read_text())
        aliases = {"freeze_schedule": "schedule"}  # parse_dict knows none
        return parser.parse_dict({aliases.get(name, name): value for name, value in arguments.items()})
    return parser.parse_args_into_dataclasses()


def load_splits(
    data_args: DataTrainingArguments, model_args: ModelArguments, seed: int
) -> tuple[datasets.Dataset | None, datasets.Dataset | None, list[str]]:
    """Return the training set, the evaluation set, and the names of the classes."""
    name = data_args.dataset_name
    if name is not None and glob.has_magic(name) and Path(name).is_dir():
        # `load_dataset` would take brackets in the name of a folder for a pattern.
        kind = "parquet" if any(Path(name).rglob("*.parquet")) else "imagefolder"
        folder = glob.escape(str(Path(name).absolute()))
        splits = datasets.load_dataset(kind, data_dir=folder, cache_dir=model_args.cache_dir)
    elif name is not None:
        splits = datasets.load_dataset(
            name,
            data_args.dataset_config_name,
            cache_dir=model_args.cache_dir,
            token=model_args.token,
        )
    else:
        folders = {"train": data_args.train_dir, "validation": data_args.validation_dir}
        data_files = {
            name: str(Path(glob.escape(folder)) / "**") for name, folder in folders.items() if folder is not None
        }
        splits = datasets.load_dataset("imagefolder", data_files=data_files, cache_dir=model_args.cache_dir)

    image_column, label_column = data_args.image_column_name, data_args.label_column_name
    features = next(iter(splits.values())).features
    for option, column in (("--image_column_name", image_column), ("--label_column_name", label_column)):
        if column not in features:
            raise ValueError(f"{option}={column} is no column of the data set. Choose one of: {', '.join(features)}.")
    if not isinstance(features[label_column], datasets.ClassLabel):
        raise ValueError(
            f"Column {label_column} holds {features[label_column]}, not a ClassLabel, so the classes have no names. Store "
            f"the data set again after dataset.class_encode_column({label_column!r})."
        )

    train, evaluation = splits.get("train"), splits.get("validation")
    # Test splits on the Hub often come without labels, written as -1.
    if evaluation is None and "test" in splits and min(splits["test"][label_column], default=-1) >= 0:
        evaluation = splits["test"]
    if evaluation is None and train is not None and data_args.train_val_split > 0:
        halves = train.train_test_split(data_args.train_val_split, seed=seed)
        train, evaluation = halves["train"], halves["test"]
    if train is not None and data_args.max_train_samples is not None:
        train = train.shuffle(seed=seed).select(range(min(data_args.max_train_samples, len(train))))
    if evaluation is not None and data_args.max_eval_samples is not None:
        evaluation = evaluation.shuffle(seed=seed).select(range(min(data_args.max_eval_samples, len(evaluation))))
    return train, evaluation, features[label_column].names


def main() -> None:
    model_args, data_args, training_args, freeze_config, cache_config = parse_arguments()
    # The transforms need the image column, which Trainer would take for unused.
    training_args.remove_unused_columns = False
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stdout)
    logging.getLogger("hf_freezecache").setLevel(logging.INFO if training_args.should_log else logging.WARNING)
    set_seed(training_args.seed)  # of the new head

    train_dataset, eval_dataset, classes = load_splits(data_args, model_args, training_args.seed)
    if training_args.do_train and train_dataset is None:
        raise ValueError("--do_train needs a split 'train', or --train_dir.")
    if training_args.do_eval and eval_dataset is None:
        raise ValueError("--do_eval needs a split 'validation' or 'test', --validation_dir, or --train_val_split > 0.")

    hub = {
        "cache_dir": model_args.cache_dir,
        "revision": model_args.model_revision,
        "token": model_args.token,
        "trust_remote_code": model_args.trust_remote_code,
    }
    name = model_args.model_name_or_path
    config = AutoConfig.from_pretrained(
        model_args.config_name or name,
        id2label=dict(enumerate(classes)),
        label2id={label: number for number, label in enumerate(classes)},
        **hub,
    )
    model = AutoModelForImageClassification.from_pretrained(
        name, config=config, ignore_mismatched_sizes=model_args.ignore_mismatched_sizes, **hub
    )
    processor = AutoImageProcessor.from_pretrained(model_args.image_processor_name or name, **hub)

    freezes = freeze_config.schedule is not None
    augmented, plain = (make_transform(processor, data_args, train) for train in (True, False))
    transforms = {}
    if freezes and cache_config.num_views not in (0, 1):
        # View 0 is then the evaluation's rendering, and what was drawn for the others is known.
        transforms = {"train_transform": augmented, "eval_transform": plain}
    elif train_dataset is not None:
        # A single view would be the evaluation's, and the augmentation would never be seen.
        train_dataset.set_transform(augmented)
    if eval_dataset is not None:
        eval_dataset.set_transform(plain)

    # A copy of this file alone asks the Hub for the metric.
    shipped = Path(__file__).with_name("accuracy")
    metric = evaluate.load(str(shipped) if shipped.is_dir() else "accuracy", cache_dir=model_args.cache_dir)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        return metric.compute(predictions=prediction.predictions.argmax(axis=1), references=prediction.label_ids)

    trainer = FreezeCacheTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset if training_args.do_train else None,
        eval_dataset=eval_dataset if training_args.do_eval else None,
        data_collator=collate,
        compute_metrics=compute_metrics,
        processing_class=processor,
        freeze_config=freeze_config if freezes else None,
        cache_config=cache_config,
        **transforms,
    )

    if training_args.do_train:
        checkpoint = training_args.resume_from_checkpoint
        checkpoint = {"true": True, "false": None}.get(str(checkpoint).lower(), checkpoint)
        result = trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()  # and the processor
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()

    if training_args.do_eval:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)

    card: dict[str, Any] = {"tasks": "image-classification", "tags": ["image-classification", "vision"]}
    # Local folders are nobody else's business.
    card["finetuned_from"] = data_args.card_base_model or (None if Path(name).exists() else name)
    if data_args.dataset_name is not None and not Path(data_args.dataset_name).exists():
        card["dataset_tags"], card["dataset"] = data_args.dataset_name, data_args.dataset_name
    if data_args.card_dataset is not None:
        card["dataset"] = data_args.card_dataset
    if freezes and data_args.card_baseline:
        card["baseline"] = data_args.card_baseline
    if freezes and data_args.card_seeds:
        card["seeds"] = data_args.card_seeds
    if training_args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)


if __name__ == "__main__":
    main()
