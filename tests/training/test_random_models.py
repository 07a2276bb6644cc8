"""Property: whatever the model and the loss do, a cached run equals the uncached one, or is refused before it builds."""

from __future__ import annotations

import copy
import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from support.parity import assert_same, parameters_of
from support.tiny import Recorder, make_trainer
from torch import nn

from hf_freezecache.errors import FreezeCacheError

WIDTH, TOKENS, CLASSES, ROWS = 8, 4, 3, 8


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(TOKENS, TOKENS)

    def forward(self, hidden_states):
        return self.mix(hidden_states.transpose(1, 2)).transpose(1, 2)


class Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.attention, self.dropout, self.norm = SelfAttention(), nn.Dropout(dropout), nn.LayerNorm(WIDTH)

    def forward(self, hidden_states, scale=None):
        change = self.dropout(self.attention(self.norm(hidden_states)))
        return hidden_states + (change if scale is None else change * scale[:, None, None])


@dataclass(frozen=True)
class Design:
    """What a model and its loss do; each field is one thing that users do."""

    blocks: int
    dropout: float
    front: str  # what happens to the images: nothing, a norm, or an augmentation in training
    skip: tuple[int, int] | None  # the output of one block enters another again
    gate: float  # strength of skips and side paths at the start
    side: str  # what the head reads beside the last hidden states
    mask: int | None  # a block that sees the tokens of which the head thinks most
    extra: str  # where a further input goes
    hidden_extra: bool  # whether it is passed by **kwargs only
    auxiliary: int | None  # a block whose output has a loss of its own
    zero_head: bool
    loss: str


def mostly(usual, *others):
    """Draw the usual thing in two of three cases: a design with one oddity tells more than one with five."""
    return st.one_of(st.just(usual), st.just(usual), st.sampled_from(others))


DESIGNS = st.builds(
    Design,
    blocks=st.integers(3, 4),
    dropout=st.sampled_from([0.0, 0.3]),
    front=mostly("nothing", "norm", "mirror", "jitter", "noise"),
    skip=mostly(None, (0, 2), (0, 1), (1, 2)),
    gate=st.sampled_from([0.0, 0.5]),
    side=mostly("nothing", "image", "first", "labels", "image when labelled"),
    mask=mostly(None, 1, 2),
    extra=st.sampled_from(["nothing", "front", "blocks", "head"]),
    hidden_extra=st.booleans(),
    auxiliary=mostly(None, 0, 2),
    zero_head=st.booleans(),
    loss=mostly("model", "own", "smoothed", "twice", "late states", "mixup", "halves", "pixels", "states", "rendered"),
)


class RandomModel(nn.Module):
    def __init__(self, design: Design) -> None:
        super().__init__()
        self.design = design
        self.image_shape = (3, 4, 4)
        self.norm = nn.BatchNorm2d(3)
        self.embeddings = nn.Conv2d(3, WIDTH, 2, stride=2)
        self.blocks = nn.ModuleList(Block(design.dropout) for _ in range(design.blocks))
        self.gate = nn.Parameter(torch.tensor(design.gate))
        self.head, self.auxiliary = nn.Linear(WIDTH, CLASSES), nn.Linear(WIDTH, CLASSES)
        if design.zero_head:
            nn.init.zeros_(self.head.weight)

    def encode(self, images, extra):
        front, training = self.design.front, self.training
        if front == "norm":
            images = self.norm(images)
        elif front == "mirror" and training:
            images = images.flip(-1)
        elif front == "jitter" and training:
            images = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(-1), images)
        elif front == "noise" and training:
            images = images + 0.1 * torch.randn_like(images)
        hidden_states = self.embeddings(images).flatten(2).transpose(1, 2)
        if self.design.extra == "front" and extra is not None:
            hidden_states = hidden_states * extra[:, None, None]
        states = []
        for number, block in enumerate(self.blocks):
            if self.design.skip is not None and self.design.skip[1] == number:
                hidden_states = hidden_states + self.gate * states[self.design.skip[0]]
            if self.design.mask == number:
                hidden_states = hidden_states * (self.head(hidden_states).amax(-1, keepdim=True) > 0.3)
            scale = extra if self.design.extra == "blocks" else None
            hidden_states = block(hidden_states, scale)
            states.append(hidden_states)
        return states

    def compute(self, images, labels, extra):
        states = self.encode(images, extra)
        features = states[-1].mean(1)
        if self.design.extra == "head" and extra is not None:
            features = features * extra[:, None]
        side = self.design.side
        if side == "image" or (side == "image when labelled" and labels is not None):
            features = features + self.gate * images.mean((1, 2, 3))[:, None]
        elif side == "first":
            features = features + self.gate * states[0].mean(1)
        elif side == "labels" and labels is not None:
            features = features + self.gate * labels[:, None]
        logits = self.head(features)
        outputs = {"logits": logits, "hidden_states": tuple(states)}
        if labels is None:
            return outputs
        loss = nn.functional.cross_entropy(logits, labels)
        if self.design.auxiliary is not None:
            loss = loss + nn.functional.cross_entropy(self.auxiliary(states[self.design.auxiliary].mean(1)), labels)
        return {"loss": loss, **outputs}


class Named(RandomModel):
    def forward(self, pixel_values, labels=None, extra=None):
        return self.compute(pixel_values, labels, extra)


class Hidden(RandomModel):
    def forward(self, pixel_values, labels=None, **kwargs):
        return self.compute(pixel_values, labels, kwargs.get("extra"))


class Trainer(Recorder):
    """Computes the loss that the design of its model names."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        kind = model.design.loss
        if kind == "model":
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        inputs = dict(inputs)
        labels, images = inputs["labels"], inputs["pixel_values"]
        rest = {name: value for name, value in inputs.items() if name not in ("labels", "pixel_values")}
        cross_entropy = nn.functional.cross_entropy
        if kind == "mixup":
            order, weight = torch.randperm(len(labels)), torch.rand(())
            outputs = model(pixel_values=torch.lerp(images, images[order], weight), **rest)
            loss = torch.lerp(
                cross_entropy(outputs["logits"], labels), cross_entropy(outputs["logits"], labels[order]), weight
            )
        elif kind == "halves" and len(labels) % 2 == 0:
            middle = len(labels) // 2
            halves = [slice(None, middle), slice(middle, None)]
            every = [model(**{name: value[half] for name, value in inputs.items()}) for half in halves]
            outputs, loss = every[0], sum(each["loss"] for each in every) / 2
        elif kind == "rendered":
            torch.manual_seed(int(labels.sum()))
            outputs = model(pixel_values=torch.randn(images.shape), labels=labels, **rest)
            loss = outputs["loss"]
        else:
            outputs = model(**inputs)
            loss = outputs["loss"]
            if kind == "own":
                loss = cross_entropy(outputs["logits"], labels)
            elif kind == "smoothed":
                loss = cross_entropy(outputs["logits"], labels, label_smoothing=0.1)
            elif kind == "twice":
                loss = loss + (outputs["logits"] - model(**inputs)["logits"]).square().mean()
            elif kind == "pixels":
                loss = loss + 1e-9 * images.square().mean()
            elif kind == "states":
                loss = loss + 1e-3 * outputs["hidden_states"][0].square().mean()
            elif kind == "late states":
                loss = loss + outputs["hidden_states"][-1].square().mean()
        return (loss, outputs) if return_outputs else loss


class Rows(torch.utils.data.Dataset):
    def __init__(self, with_extra: bool) -> None:
        generator = torch.Generator().manual_seed(3)
        self.images = torch.randn(ROWS, 3, 4, 4, generator=generator)
        self.extra = torch.rand(ROWS, generator=generator) + 0.5
        self.with_extra = with_extra

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, row):
        example = {"pixel_values": self.images[row], "labels": row % CLASSES}
        return {**example, "extra": self.extra[row]} if self.with_extra else example


def run(design: Design, mode: str, caches: Path):
    torch.manual_seed(0)
    model = (Hidden if design.hidden_extra else Named)(design)
    trainer = make_trainer(
        copy.deepcopy(model),
        Rows(design.extra != "nothing"),
        schedule="0:1,1:2",
        cls=Trainer,
        cache={
            "mode": mode,
            "cache_dir": str(caches),
            "chunk_size": 4,
            "dataset_id": "rows",
            "transform_id": "none",
        },
        num_train_epochs=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
    )
    trainer.train()
    return trainer.losses, parameters_of(trainer.model)


@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(design=DESIGNS)
def test_a_cached_run_is_the_uncached_one_or_is_refused_before_it_builds(design: Design) -> None:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        caches, refused = Path(folder) / "caches", None
        try:
            losses, parameters = run(design, "always", caches)
        except FreezeCacheError as error:
            refused = error
        event("cached" if refused is None else "refused")
        if refused is not None:
            assert not caches.exists()
            assert not is_plain(design), str(refused)
            return
        live_losses, live_parameters = run(design, "never", caches)
    assert losses == live_losses
    assert_same(parameters, live_parameters)


def is_plain(design: Design) -> bool:
    """Say whether nothing of a design reads what a cached step does not have."""
    return (
        design.front in ("nothing", "norm")
        and (design.skip is None or design.skip[0] >= 1)
        and design.side in ("nothing", "labels")
        and design.mask != 1
        and design.auxiliary in (None, 2)
        and design.loss in ("model", "own", "smoothed", "twice", "late states")
    )


@pytest.mark.parametrize(
    "design", [Design(3, 0.0, "nothing", None, 0.5, "nothing", None, "blocks", True, None, False, "twice")]
)
def test_a_plain_design_is_cached(design, tmp_path) -> None:
    assert run(design, "always", tmp_path / "a")[0] == run(design, "never", tmp_path / "a")[0]
