"""Writes which architectures train from a cache: ``python .ci/architectures.py docs/architectures.md [PATTERN]``.

Each vision encoder of the installed transformers is made tiny and random, and trained cached and uncached, for each number of
frozen blocks. PATTERN is a regular expression: only classes whose names match it are tried. The exit status is 1 if cached
training of one of them differs from uncached training without a refusal, or ends with an error that is no refusal.
"""

from __future__ import annotations

import copy
import gc
import inspect
import logging
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed
from transformers.models.auto import modeling_auto
from transformers.trainer_callback import PrinterCallback

from hf_freezecache import CacheConfig, FreezeCacheTrainer, FreezeConfig
from hf_freezecache.errors import FreezeCacheError
from hf_freezecache.model.split import find_blocks

NUM_LABELS, ROWS, BATCH_SIZE = 4, 12, 4
#: Models with up to this many blocks are tried with every number of frozen blocks; others with 1, half and all of them.
EVERY = 6

# ---- Tiny configurations ----

#: What a field of any configuration becomes, where the configuration has such a field that is not ``None``. A list is cut to
#: the length of the default; where the default is a list and this a number, every entry becomes this number.
SMALL: dict[str, Any] = {
    **{"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32},
    **{"image_size": 16, "patch_size": 4, "mlp_dim": 32, "projection_dim": 16, "pooler_output_size": 16},
    **{
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 50,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    },
    **{"pretrain_image_size": 16, "out_indices": [4], "encoder_stride": 4},
    **{"decoder_hidden_size": 16, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 2},
    **{"decoder_intermediate_size": 32, "num_frames": 4},
}
#: The same for configurations with ``depths``: of encoders in stages, with fewer tokens in each.
SMALL_STAGES: dict[str, Any] = {
    **{"image_size": 32, "depths": [2, 2, 2, 2], "hidden_sizes": [8, 8, 16, 16], "embed_dims": [8, 8, 16, 16]},
    **{"num_attention_heads": [1, 1, 2, 2], "num_heads": [1, 2, 2, 2], "sr_ratios": [4, 2, 1, 1], "embed_dim": 8},
    **{"sequence_reduction_ratios": [4, 2, 1, 1], "window_size": 2, "decoder_hidden_size": 16, "embedding_size": 8},
    **{"patch_size": 2},
}
#: What single classes need beside or in place of these. ``_drop`` names fields that stay as they are by default.
OVERRIDES: dict[str, dict[str, Any]] = {
    "CvtForImageClassification": {"embed_dim": [8, 8, 16], "num_heads": [1, 1, 2], "depth": [1, 2, 3]},
    "DinatForImageClassification": {"depths": [1, 1], "num_heads": [1, 2]},
    "EfficientNetForImageClassification": {
        **{"image_size": 32, "width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320},
    },
    "HieraForImageClassification": {
        **{"image_size": [32, 32], "patch_size": [7, 7], "depths": [2, 2, 2], "num_heads": [1, 2, 2], "mlp_ratio": 2.0},
        **{"masked_unit_size": [4, 4], "num_query_pool": 2},
    },
    "ImageGPTForImageClassification": {"vocab_size": 33, "n_positions": 16, "n_embd": 16, "n_layer": 4, "n_head": 2},
    "MobileViTForImageClassification": {
        **{"image_size": 64, "hidden_sizes": [16, 16, 16], "neck_hidden_sizes": [8, 8, 8, 8, 16, 16, 16]},
    },
    "MobileViTV2ForImageClassification": {"image_size": 64, "width_multiplier": 0.25, "_drop": ["patch_size"]},
    "BitForImageClassification": {"embedding_size": 32, "hidden_sizes": [32, 32, 32, 32], "num_groups": 8},
    "RegNetForImageClassification": {"groups_width": 8},
    "FocalNetForImageClassification": {"focal_levels": [1, 1, 1, 1]},
    "HGNetV2ForImageClassification": {"_drop": ["hidden_sizes", "embedding_size"]},
    "TextNetForImageClassification": {"image_size": [64, 64], "_drop": ["hidden_sizes"]},
    "Llama4VisionModel": {
        **{"vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64},
        **{"intermediate_size": 64, "pixel_shuffle_ratio": 0.5},
    },
    "MllamaVisionModel": {
        **{"num_hidden_layers": 3, "num_global_layers": 2, "attention_heads": 2, "intermediate_layers_indices": [0, 1]},
        **{"max_num_tiles": 1, "vision_output_dim": 48, "supported_aspect_ratios": [[1, 1]]},
    },
    "Swin2SRModel": {"image_size": 16, "patch_size": 1, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4},
    "TimesformerModel": {"num_frames": 4},
    "VivitModel": {"tubelet_size": [2, 4, 4]},
    "VideoPrismVisionModel": {"tubelet_size": [1, 4, 4], "num_spatial_layers": 4, "num_temporal_layers": 2},
    "LwDetrViTBackbone": {"num_windows": 4, "num_windows_side": 2, "window_block_indices": [0, 1]},
    "RfDetrDinov2Backbone": {"num_windows": 2, "window_block_indexes": [0, 1]},
    "MaskFormerSwinBackbone": {"_drop": []},
    "PPLCNetV4Backbone": {"_drop": ["hidden_sizes", "embedding_size"]},
    "VitPoseBackbone": {"image_size": [32, 32], "patch_size": [8, 8]},
    "AlignVisionModel": {
        **{"image_size": 32, "width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320},
    },
    "GroupViTVisionModel": {
        **{"image_size": 16, "patch_size": 4, "hidden_size": 16, "num_attention_heads": 2, "depths": [2, 2]},
        **{"num_group_tokens": [4, 0], "num_output_groups": [4, 4]},
    },
    "XCLIPVisionModel": {
        **{"num_frames": 1, "mit_hidden_size": 16, "mit_intermediate_size": 32, "mit_num_attention_heads": 2},
    },
    "Molmo2VisionModel": {"num_position_embeddings": 16, "num_key_value_heads": 2},
    "DepthProModel": {
        **{
            "patch_size": 16,
            "intermediate_hook_ids": [2, 0],
            "intermediate_feature_dims": [8, 8],
            "fusion_hidden_size": 8,
        },
        **{
            "scaled_images_ratios": [0.5, 1.0],
            "scaled_images_overlap_ratios": [0.0, 0.2],
            "scaled_images_feature_dims": [8, 8],
        },
        **{name: {"image_size": 16} for name in ("image_model_config", "patch_model_config", "fov_model_config")},
    },
    "GraniteDoclingVisionModel": {"out_hidden_size": 16, "deepstack_visual_indexes": [0, 1, 2]},
}
for _name in ("LevitForImageClassification", "LevitForImageClassificationWithTeacher"):
    OVERRIDES[_name] = {
        **{"image_size": 64, "hidden_sizes": [16, 16, 32], "num_attention_heads": [2, 2, 2], "depths": [2, 2, 2]},
        **{"key_dim": [4, 4, 4], "_drop": ["patch_size"]},
    }
for _name, _width in (("Learned", 512), ("Fourier", 261), ("ConvProcessing", 322)):
    OVERRIDES[f"PerceiverForImageClassification{_name}"] = {
        **{"num_latents": 8, "d_latents": 16, "d_model": _width, "num_self_attends_per_block": 4},
        **{"num_self_attention_heads": 2, "num_cross_attention_heads": 1, "image_size": 16 if _width == 512 else 224},
    }

_DOWNSAMPLED = {"output_channels": 8, "window_size": 2, "global_attn_indexes": [1, 3], "downsample_channels": [8, 16]}
_SAM = {"output_channels": 8, "window_size": 2, "global_attn_indexes": [1, 3], "num_pos_feats": 4}
_HIERA_DET = {
    **{"hidden_size": 8, "num_attention_heads": 1, "image_size": [64, 64], "blocks_per_stage": [1, 2, 2, 1]},
    **{"embed_dim_per_stage": [8, 16, 32, 64], "num_attention_heads_per_stage": [1, 2, 4, 8]},
    **{"window_size_per_stage": [8, 4, 4, 2], "global_attention_blocks": [4]},
    **{"window_positional_embedding_background_size": [4, 4]},
}
_RESNET = transformers.ResNetConfig(
    embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], out_features=["stage2", "stage3", "stage4"]
)
_DETR = {
    **{"backbone_config": _RESNET, "d_model": 16, "num_queries": 4, "encoder_layers": 3},
    **{"decoder_layers": 3, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16},
    **{"decoder_ffn_dim": 16},
}
OVERRIDES |= {
    **{"SamVisionModel": _SAM, "SamHQVisionModel": _SAM, "Sam2HieraDetModel": _HIERA_DET},
    "PPFormulaNetVisionModel": {
        **{**_SAM, "post_conv_in_channels": 8, "post_conv_mid_channels": 8, "post_conv_out_channels": 8},
        **{"decoder_hidden_size": 8},
    },
    "Sam2VisionModel": {
        **{"backbone_config": _HIERA_DET, "backbone_channel_list": [64, 32, 16, 8], "fpn_hidden_size": 16},
        **{"backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]},
    },
    "Sam3VisionModel": {
        **{"backbone_config": {"window_size": 2, "global_attn_indexes": [1, 3]}, "fpn_hidden_size": 16},
        **{"backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]},
    },
    "DeepseekOcr2VisionModel": {"sam_config": {**_DOWNSAMPLED, "image_size": 64, "patch_size": 8}},
    "UnlimitedOcrVisionModel": {
        "sam_config": {**_DOWNSAMPLED, "image_size": 64, "patch_size": 8},
        "encoder_config": {"image_size": 2, "patch_size": 1},
    },
    **dict.fromkeys(("ConditionalDetrModel", "DabDetrModel", "DetrModel", "TableTransformerModel"), _DETR),
    "DeformableDetrModel": {**_DETR, "d_model": 32, "num_feature_levels": 3},
}

#: Further inputs of single classes, or other images: (shape of ``pixel_values``, name -> constant input of each row).
INPUTS: dict[str, tuple[tuple[int, ...] | None, dict[str, Any]]] = {
    "CvtForImageClassification": ((3, 64, 64), {}),
    "ImageGPTForImageClassification": (None, {"input_ids": [1, 2, 3, 4] * 4}),
    "Siglip2ForImageClassification": ((16, 48), {"pixel_attention_mask": [1] * 16, "spatial_shapes": [4, 4]}),
    "PerceiverForImageClassificationFourier": ((3, 16, 16), {}),
    "PerceiverForImageClassificationConvProcessing": ((3, 32, 32), {}),
    **{name: ((4, 3, 16, 16), {}) for name in ("TimesformerModel", "VideoMAEModel", "VivitModel")},
    "MllamaVisionModel": ((1, 1, 3, 16, 16), {"aspect_ratio_ids": [1], "aspect_ratio_mask": [[1]]}),
    **{
        name: ((3, 64, 64), {})
        for name in ("Sam2VisionModel", "UnlimitedOcrVisionModel", "DeepseekOcr2VisionModel", "DepthProModel")
    },
    "Sam3VisionModel": ((3, 16, 16), {}),
    "Molmo2VisionModel": ((16, 48), {}),
}

#: Classes that cannot be tried here, with the reason.
NOT_TRIED = {
    "TimmWrapperForImageClassification": "needs the package timm",
    "TimmBackbone": "needs the package timm",
    "EdgeTamVisionModel": "needs the package timm",
    "DinatForImageClassification": "needs the package natten",
    "ShieldGemma2ForImageClassification": "a language model that reads text as well",
    "PPLCNetForImageClassification": "returns no loss",
    "VideoPrismVisionModel": "its forward takes pixel_values_videos",
    "Pix2StructVisionModel": "its forward takes flattened_patches",
    "InklingVisionModel": "its forward takes single patches",
    **dict.fromkeys(
        ("MiniCPMOcrVisionModel", "MiniCPMV4_7VisionModel", "PaddleOCRVisionModel"),
        "its forward takes images of all sizes in one sequence, with a list of their sizes",
    ),
}


def _fit(value: Any, default: Any) -> Any:
    if isinstance(default, list | tuple):
        return list(value)[: len(default)] if isinstance(value, list) else [value] * len(default)
    return value


def shrunk(defaults: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return what to give a configuration's class in place of its defaults, for it and for configurations within it."""
    stages = isinstance(defaults.get("depths"), list | tuple)
    small = {**SMALL, **SMALL_STAGES} if stages else SMALL
    kept = {*overrides.get("_drop", ()), *(["out_features", "out_indices"] if stages else ["out_features"])}
    given: dict[str, Any] = {name: value for name, value in defaults.items() if name == "model_type"}
    for name, default in defaults.items():
        if name in overrides:
            nested = isinstance(default, dict) and isinstance(overrides[name], dict)
            given[name] = shrunk(default, overrides[name]) if nested else overrides[name]
        elif name in kept or default is None:
            continue
        elif isinstance(default, dict) and name.endswith("_config"):
            given[name] = shrunk(default, {})
        elif name in small and not isinstance(default, dict):
            given[name] = _fit(small[name], default)
    given.update({name: value for name, value in overrides.items() if name != "_drop" and name not in defaults})
    return given


def tiny_config(cls: type[PreTrainedModel]) -> Any:
    """Return a configuration of a model class, with few and narrow blocks."""
    overrides = OVERRIDES.get(cls.__name__, {})
    given = shrunk(cls.config_class().to_dict(), overrides)
    given.pop("model_type", None)
    config = cls.config_class(**given)
    config.num_labels = NUM_LABELS
    return config


# ---- Models and data ----


class WithHead(nn.Module):
    """A vision encoder with a linear head on the mean of its last hidden states."""

    def __init__(self, encoder: PreTrainedModel, config: Any, images: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.encoder, self.config = encoder, config
        encoder.eval()
        with torch.no_grad():
            width = self.features(images).shape[-1]
        encoder.train()
        self.classifier = nn.Linear(width, NUM_LABELS)

    def features(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return (images, width): the mean over tokens, or over height and width."""
        outputs = self.encoder(**inputs)
        states = getattr(outputs, "last_hidden_state", None)
        if states is None and hasattr(outputs, "feature_maps"):
            states = outputs.feature_maps[-1]
        if states is None:
            states = outputs if isinstance(outputs, Tensor) else outputs[0]
        # Some encoders join the tokens of all images.
        states = states.reshape(len(inputs["pixel_values"]), -1, *states.shape[1:]) if states.dim() == 2 else states
        if len(states) == 1 < len(inputs["pixel_values"]):
            states = states.reshape(len(inputs["pixel_values"]), -1, states.shape[-1])
        if states.dim() == 4:
            return states.mean((1, 2) if states.shape[-1] > states.shape[1] else (2, 3))
        return states.flatten(1, -2).mean(1)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **inputs: Any) -> dict[str, Tensor]:
        """Return logits (images, classes), and their cross-entropy if there are labels."""
        logits = self.classifier(self.features({"pixel_values": pixel_values, **inputs}))
        return (
            {"logits": logits}
            if labels is None
            else {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}
        )


class Images(torch.utils.data.Dataset):
    """Random images with random labels."""

    def __init__(self, shape: tuple[int, ...] | None, constants: Mapping[str, Any]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = None if shape is None else torch.randn(ROWS, *shape, generator=generator)
        self.labels = torch.randint(NUM_LABELS, (ROWS,), generator=generator)
        self.constants = {name: torch.tensor(value) for name, value in constants.items()}

    def __len__(self) -> int:  # noqa: D105
        return ROWS

    def __getitem__(self, row: int) -> dict[str, Tensor]:  # noqa: D105
        images = {} if self.images is None else {"pixel_values": self.images[row]}
        return {**images, "labels": self.labels[row], **self.constants}


def image_shape(config: Any) -> tuple[int, ...]:
    """Return (channels, height, width) of images that a configuration fits."""
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None) or getattr(vision, "input_size", None) or 64
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return getattr(vision, "num_channels", 3), height, width


def make(cls: type[PreTrainedModel]) -> tuple[nn.Module, Images]:
    """Return a tiny model that classifies images, and images for it."""
    config = tiny_config(cls)
    rows = Images(*INPUTS.get(cls.__name__, (image_shape(config), {})))
    set_seed(0)
    model = cls(config)
    with torch.no_grad():
        for parameter in model.parameters():  # zeros and ones of an initialisation would hide differences
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    if "ForImageClassification" in cls.__name__:
        return model, rows
    first = {name: value[None] for name, value in rows[0].items() if name != "labels"}
    return WithHead(model, config, first), rows


# ---- Trying ----


@dataclass
class Result:
    """Losses and parameters of a run."""

    losses: list[float]
    parameters: dict[str, Tensor]

    def difference(self, other: Result) -> str | None:
        """Say how another result differs; ``None`` if it is the same to the bit."""
        if self.losses != other.losses:
            return f"the losses are {self.losses} from the cache and {other.losses} on images"
        names = [name for name, value in self.parameters.items() if not torch.equal(value, other.parameters[name])]
        return f"{len(names)} parameters differ, {names[0]} first" if names else None


def train(model: nn.Module, rows: Images, mode: str | None, split_point: int, folder: Path) -> Result:
    """Train a copy of a model for three steps: with plain Trainer if ``mode`` is ``None``."""
    model = copy.deepcopy(model)
    arguments = TrainingArguments(
        **{"output_dir": str(folder / "out"), "use_cpu": True, "num_train_epochs": 1, "learning_rate": 1e-3, "seed": 0},
        **{"per_device_train_batch_size": BATCH_SIZE, "report_to": "none", "remove_unused_columns": False},
        **{"save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True},
    )
    common: dict[str, Any] = {"model": model, "args": arguments, "train_dataset": rows}
    if type(model).__name__.endswith("WithTeacher"):  # it has no loss of its own
        common["compute_loss_func"] = lambda outputs, labels, **_: nn.functional.cross_entropy(
            outputs["logits"], labels
        )
    base = Trainer if mode is None else FreezeCacheTrainer

    class Recorder(base):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            loss = super().training_step(*args, **kwargs)
            self.losses = [*getattr(self, "losses", []), loss.item()]  # steps of a rehearsal are those of a copy
            return loss

    if mode is not None:
        common["freeze_config"] = FreezeConfig(schedule=f"0:{split_point}")
        common["cache_config"] = CacheConfig(
            cache_dir=str(folder / "caches"), mode=mode, chunk_size=BATCH_SIZE, dataset_id="random", transform_id="none"
        )
    trainer = Recorder(**common)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return Result(trainer.losses, {name: value.detach().clone() for name, value in model.state_dict().items()})


@dataclass
class Row:
    """What was found of one class. ``kind`` is one of ``KINDS``."""

    name: str
    kind: str
    blocks: str
    text: str


KINDS = {
    "wrong": "Wrong",
    "exact": "Exact",
    "partly": "Exact up to some number of frozen blocks",
    "refused": "Refused",
    "not tried": "Not tried",
}


def reason(error: BaseException, model: nn.Module | None = None) -> str:
    """Return the first sentence of what an error says, without what it says of the model and the number of blocks."""
    text = re.sub(r"\s+", " ", str(error)) or type(error).__name__
    if "of one class that contain attention" in text:
        has_attention = model is not None and any("attention" in type(m).__name__.lower() for m in model.modules())
        return "no blocks of one class that all have attention" if has_attention else "no blocks with attention"
    if "random numbers are drawn before the split" in text:
        return "random numbers are drawn before the split (by a dropout, say), so hidden states are new in each step"
    if "depends on the images or on outputs of the first" in text:
        return "the loss depends on the images, or on outputs of frozen blocks before the last"
    text = re.sub(r"^\w+ cannot be (split|trained from a cache)[^:]*: ", "", text)
    text = re.split(r"(?<=[^.])\. (?=[A-Z])|; expected ", text)[0].removesuffix(".")
    return text if len(text) <= 200 else text[:197] + "..."


def attempt(model: nn.Module, rows: Images, split_point: int, folder: Path) -> tuple[str, str]:
    """Return how training with so many frozen blocks fares: ``exact``, ``refused`` or ``wrong``, and why."""
    results = []
    for mode in ("always", "never"):
        run = folder / f"{split_point}-{mode}"
        try:
            results.append(train(model, rows, mode, split_point, run))
        except FreezeCacheError as error:
            if any(run.rglob("*.safetensors")):
                return "wrong", f"{split_point} frozen blocks: refused after a cache was built: {reason(error, model)}"
            return "refused", reason(error, model)
        except Exception as error:
            return (
                "wrong",
                f"{split_point} frozen blocks, mode={mode!r}: {type(error).__name__}: {reason(error, model)}",
            )
    cached, live = results
    difference = cached.difference(live)
    if difference is None and not any(folder.rglob(f"{split_point}-always/caches/**/index.json")):
        difference = "no cache was written"
    if difference is None and live.difference(Result(live.losses, model.state_dict())) is None:
        difference = "nothing was trained"
    return ("exact", "") if difference is None else ("wrong", f"{split_point} frozen blocks: {difference}")


def numbers(found: list[int]) -> str:
    """Write numbers in few characters: ``1 to 3``, or ``2, 4``."""
    if found == list(range(found[0], found[-1] + 1)) and len(found) > 1:
        return f"{found[0]} to {found[-1]}"
    return ", ".join(map(str, found))


def try_class(cls: type[PreTrainedModel], folder: Path) -> Row:
    """Try all split points of a tiny model of a class."""
    gc.collect()
    gc.freeze()  # Trainer asks for collections, which would spend most of the time on what imports made
    name = cls.__name__
    if name in NOT_TRIED:
        return Row(name, "not tried", "", NOT_TRIED[name])
    required = [
        p.name
        for p in list(inspect.signature(cls.forward).parameters.values())[1:]
        if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    constants = INPUTS.get(name, ((), {}))[1]
    others = [p for p in required if p not in ("pixel_values", *constants)]
    if others:
        return Row(name, "not tried", "", f"its forward takes {', '.join(required)}")
    try:
        model, rows = make(cls)
        plain = train(model, rows, None, 0, folder / "plain")
        if not all(map(torch.isfinite, map(torch.tensor, plain.losses))):
            raise ValueError(f"the losses of plain Trainer are {plain.losses}")
    except Exception as error:
        return Row(name, "not tried", "", f"{type(error).__name__}: {reason(error)}")
    try:
        first = {key: value[None] for key, value in rows[0].items() if key != "labels"}
        blocks_name, blocks = find_blocks(model, first)
        if isinstance(model, WithHead):
            blocks_name = blocks_name.removeprefix("encoder.")
        where, total = f"`{blocks_name}`, {len(blocks)}", len(blocks)
    except FreezeCacheError:
        where, total = "", 1
    tried = list(range(1, total + 1)) if total <= EVERY else sorted({1, total // 2, total})
    outcomes = {split_point: attempt(model, rows, split_point, folder) for split_point in tried}
    by_kind = {kind: [k for k in tried if outcomes[k][0] == kind] for kind in ("wrong", "exact", "refused")}
    if by_kind["wrong"]:
        return Row(name, "wrong", where, "WRONG: " + "; ".join(outcomes[k][1] for k in by_kind["wrong"]))
    if not by_kind["refused"]:
        return Row(name, "exact", where, "exact for every k")
    why: dict[str, str] = {}  # reasons that differ in numbers alone are one
    for k in by_kind["refused"]:
        why.setdefault(re.sub(r"\d+", "", outcomes[k][1]), outcomes[k][1])
    reasons = "; ".join(why.values())
    if not by_kind["exact"]:
        return Row(name, "refused", where, f"refused: {reasons}")
    exact = by_kind["exact"]
    upto = f"up to {exact[-1]} of {total}" if exact == tried[: len(exact)] else f"for k = {numbers(exact)} of {total}"
    return Row(name, "partly", where, f"exact {upto}; k = {numbers(by_kind['refused'])} refused: {reasons}")


# ---- Which classes ----


def _names(mapping: Mapping[str, Any]) -> Iterator[str]:
    for names in mapping.values():
        yield from [names] if isinstance(names, str) else names


def classes() -> list[type[PreTrainedModel]]:
    """Return the classes for image classification, and encoders of images of which there is no such class."""
    found = {
        name: getattr(transformers, name) for name in _names(modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES)
    }
    modules = {cls.__module__ for cls in found.values()}
    encoders = [
        *_names(modeling_auto.MODEL_FOR_IMAGE_MAPPING_NAMES),
        *_names(modeling_auto.MODEL_FOR_BACKBONE_MAPPING_NAMES),
        *(
            name
            for name in dir(transformers)
            if re.search(r"(VisionModel|VisionTransformer|ImageModel|HieraDetModel)$", name)
        ),
    ]
    configs: set[Any] = set()
    for name in encoders:
        cls = getattr(transformers, name, None)
        config = getattr(cls, "config_class", None)
        if config is None or config in configs or cls.__module__ in modules:
            continue
        if "input_ids" in inspect.signature(cls.forward).parameters:
            continue  # of text as well
        configs.add(config)
        found[name] = cls
    return list(found.values())


# ---- The page ----

HEADER = """# Which architectures train from a cache

Written by `python .ci/architectures.py docs/architectures.md`, with transformers {transformers} and torch {torch}. The
[README](../README.md) says what a cache is.

Each class was made with random weights and a few narrow blocks, and trained for three steps on random images, with its first `k`
blocks frozen: once on images and once from a cache. *Exact* means that all losses and all parameters of the two runs are equal
to the bit, on a CPU. *Refused* means that `FreezeCacheTrainer` stops before it builds a cache, and says why. A class whose
name does not end in `ForImageClassification` had a linear head on the mean of its last hidden states. The second column names
the list of blocks and their number in the tiny model; an encoder may have stages for blocks. Models with more than {every} blocks were
tried with 1, half and all of them frozen. A model with other settings may fare otherwise: every run tries its own first steps.

The table has the classes of `AutoModelForImageClassification`, and the encoders of images for which there is no such class.
"""


def page(rows: list[Row]) -> str:
    """Return the page in Markdown."""
    lines = [HEADER.format(transformers=transformers.__version__, torch=torch.__version__, every=EVERY)]
    for kind, title in KINDS.items():
        members = sorted((row for row in rows if row.kind == kind), key=lambda row: row.name.lower())
        if members:
            lines += [f"## {title}: {len(members)}", "", "| class | blocks | cached training |", "|---|---|---|"]
            lines += [f"| `{row.name}` | {row.blocks} | {row.text.replace('|', '/')} |" for row in members]
            lines.append("")
    return "\n".join(lines)


def main(path: Path, pattern: str) -> int:
    """Write the page; return the exit status."""
    rows = []
    for cls in classes():
        if not re.search(pattern, cls.__name__):
            continue
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            rows.append(try_class(cls, Path(folder)))
        print(f"{time.monotonic() - began:5.1f} s  {rows[-1].name}  {rows[-1].blocks}  {rows[-1].text}", flush=True)
    path.write_text(page(rows), encoding="utf-8")
    wrong = sum(row.kind == "wrong" for row in rows)
    print(f"{path}: {len(rows)} classes, {wrong} of them wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    logging.getLogger("hf_freezecache").setLevel(logging.ERROR)
    sys.exit(main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) == 3 else ""))
