"""A transform whose state changes while training: live stages see it, cached ones say that they do not."""

from __future__ import annotations

import logging

import pytest
import torch
from support.tiny import TinyTransform, make_trainer, tiny_vit
from transformers import TrainerCallback


class ByEpoch(TinyTransform):
    """Renders by an epoch that a callback sets. It holds what cannot be copied."""

    def __init__(self) -> None:
        super().__init__(augment=True)
        self.epoch = 0
        self.seen: list[int] = []

    def __deepcopy__(self, memo):
        raise AssertionError("the user's transform was copied")

    def __call__(self, batch):
        self.seen.append(self.epoch)
        batch = super().__call__(batch)
        return {**batch, "pixel_values": [pixels * (1 + self.epoch) for pixels in batch["pixel_values"]]}


class SetsEpoch(TrainerCallback):
    def __init__(self, transform) -> None:
        self.transform = transform

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.transform.epoch = round(state.epoch or 0)


def run(images, schedule, transform=None, **settings):
    transform = transform or ByEpoch()
    images = images.select(range(len(images)))  # the fixture is shared
    images.set_transform(transform)
    trainer = make_trainer(
        tiny_vit(),
        images,
        schedule=schedule,
        trainer={"callbacks": [SetsEpoch(transform)]},
        **{"num_train_epochs": 3, **settings},
    )
    trainer.train()
    return trainer, transform


@pytest.mark.by_default(1)
@pytest.mark.parametrize(("schedule", "mode"), [("0:0", "always"), ("0:2", "never")])
def test_live_stages_see_what_a_callback_changes(images, schedule, mode, caplog) -> None:
    _, transform = run(images, schedule, cache={"mode": mode})
    assert set(transform.seen) == {0, 1, 2}
    assert transform.seen[-5:] == [2] * 5
    assert "no longer what it was" not in caplog.text


def test_cached_stages_say_once_that_they_do_not(images, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        run(images, "0:2")
    (message,) = [message for message in caplog.messages if "no longer what it was" in message]
    assert "From epoch 1 on" in message
    assert "mode='never'" in message


@pytest.mark.slow
def test_a_later_stage_shows_the_transform_as_it_is_then(images) -> None:
    """Its states come from the images again: those of the stage before are of another transform."""
    trainer, transform = run(images, "0:1,2:2", num_train_epochs=2 + 1)
    assert transform.epoch == 2
    assert [decision.built_from for decision in trainer._record.decisions] == [0, 0]
    current, split = trainer._run.cache.current, trainer._run.current.split
    pixels = torch.stack([trainer._run.data.views[row, 0]["pixel_values"] for row in (0, 1, 2)])
    exact = trainer._run.runtime.run_frozen(split.prefix, pixel_values=pixels)
    chunk = current.layout.position[:3] // current.layout.chunk_size
    place = current.layout.position[:3] % current.layout.chunk_size
    stored = [current.read_chunk(0, int(c)).hidden_states[int(p)] for c, p in zip(chunk, place, strict=True)]
    torch.testing.assert_close(torch.stack(stored), exact, atol=1e-5, rtol=1e-5)
    # The next run finds both.
    again, _ = run(images, "0:1,2:2", num_train_epochs=2 + 1)
    assert [decision.cache for decision in again._record.decisions] == ["found", "found"]


BRIGHTNESS = {"factor": 1.0}


def by_a_variable(batch):
    batch = TinyTransform(augment=True)(batch)
    return {**batch, "pixel_values": [pixels * BRIGHTNESS["factor"] for pixels in batch["pixel_values"]]}


@pytest.mark.by_default(1)
@pytest.mark.parametrize("named", [False, True], ids=["hashed", "transform_id"])
def test_changes_of_what_a_transform_reads_or_renders_are_noticed(images, named, caplog, monkeypatch) -> None:
    class Changes(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            monkeypatch.setitem(BRIGHTNESS, "factor", 0.5)

    trainer = make_trainer(
        tiny_vit(),
        images.with_transform(by_a_variable),
        schedule="0:2",
        cache={"transform_id": "mine" if named else None},
        trainer={"callbacks": [Changes()]},
        num_train_epochs=2,
    )
    trainer.train()
    assert caplog.text.count("no longer what it was") == 1
