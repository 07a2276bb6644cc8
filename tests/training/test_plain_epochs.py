"""Epochs at the end that show plain images, and stages without frozen blocks that train on some of the patch tokens."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.parity import assert_resumes_everywhere, assert_same, parameters_of
from support.tiny import PAIR, Recorder, TinyTransform, make_trainer, tiny_model, tiny_vit

from hf_freezecache import FreezeConfig
from hf_freezecache.errors import UnsupportedModelError, UnsupportedSetupError
from hf_freezecache.model.probe import find_blocks
from hf_freezecache.report.figures import figures_of
from hf_freezecache.report.text import describe_schedule, stage_account

BOTH = {"plain_epochs": 2, "unfrozen_token_keep": 0.5}


def trainer_on(images: Any, mode: str = "always", model: Any = None, cls: type = Recorder, **settings: Any) -> Any:
    settings = {"schedule": "0:0,2:2", "num_train_epochs": 4, "freeze": BOTH, "trainer": PAIR, **settings}
    cache = {"mode": mode, "num_views": 3, **settings.pop("cache", {})}
    return make_trainer(tiny_vit() if model is None else model, images, cls=cls, cache=cache, **settings)


def trained(*args: Any, resume: Any = None, **settings: Any) -> Any:
    trainer = trainer_on(*args, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class Watching(Recorder):
    """Keeps the images that a loss sees, and how many tokens reach the first two blocks and the last."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        epoch = int(self.state.epoch or 0)
        self.__dict__.setdefault("images", {}).setdefault(epoch, []).append(inputs["pixel_values"].clone())
        blocks, tokens = find_blocks(self.model)[1], self.__dict__.setdefault("tokens", {}).setdefault(epoch, set())
        seen: list[int] = []
        handles = [
            block.register_forward_pre_hook(lambda block, args: seen.append(args[0].shape[1]))
            for block in (*blocks[:2], blocks[-1])
        ]
        try:
            return super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            tokens.add(tuple(seen))
            for handle in handles:
                handle.remove()


def rows_of(batches: list[torch.Tensor]) -> torch.Tensor:
    """Return the images in an order that does not depend on that of the epoch."""
    images = torch.cat(batches).flatten(1)
    return images[images.double().mul(torch.arange(images.shape[1])).sum(1).argsort()]


def test_the_last_epochs_show_each_image_as_it_is_evaluated(images) -> None:
    run = trained(images, "never", cls=Watching, schedule="0:0")
    plain = [example["pixel_values"] for example in images.with_transform(TinyTransform(augment=False))]
    expected = rows_of([torch.stack(plain)])
    shown = [rows_of(batches) for _, batches in sorted(run.images.items())]
    assert [torch.equal(one, expected) for one in shown] == [False, False, True, True]
    assert not torch.equal(shown[0], shown[1])
    assert describe_schedule(figures_of(run._record)).endswith("; plain images in the end, for 2 epochs")


def test_cached_equals_live_to_the_bit(images) -> None:
    live, cached = (trained(images, mode, schedule="0:0,1:2,3:0") for mode in ("never", "always"))
    assert live.losses == cached.losses
    assert_same(parameters_of(live.model), parameters_of(cached.model))


def test_without_frozen_blocks_the_first_block_sees_all_tokens_and_the_others_some(images) -> None:
    run = trained(images, cls=Watching, freeze={"unfrozen_token_keep": 0.5}, num_train_epochs=2, schedule="0:0,1:2")
    assert run.tokens[0] == {(17, 9, 9)}
    assert {after[-1] for after in run.tokens[1]} == {17}  # that is for token_keep to say
    assert [decision.token_keep for decision in run._record.decisions] == [0.5, 1.0]
    assert run._record.decisions[0].predicted == {"cached_passes": 3 * (1 + 3 * 0.5), "live_passes": 3 * (1 + 3 * 0.5)}
    accounts = [stage_account(stage) for stage in figures_of(run._record)["stages"]]
    assert "a random 50% of the patch tokens behind the first block" in accounts[0]
    assert "patch tokens" not in accounts[1]
    run.evaluate(images.select(range(8)).with_transform(TinyTransform(augment=False)))
    assert run.tokens[2] == {(17, 17, 17)}


def test_all_that_comes_before_the_tokens_are_drawn_trains(images) -> None:
    before = parameters_of(tiny_vit())
    run = trained(images, freeze={"unfrozen_token_keep": 0.5}, num_train_epochs=1, schedule="0:0")
    assert all(not torch.equal(value, before[name]) for name, value in parameters_of(run.model).items())
    # 6 operations per parameter and token that it sees.
    step = run._run.current.step
    first = sum(p.numel() for p in step.split.prefix_parameters().values())
    rest = sum(p.numel() for p in run.model.parameters()) - first
    assert step.floating_point_ops(next(iter(run._run.current.loader))) == 6 * 10 * (17 * first + 9 * rest)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["always", "never"])
def test_resuming_at_every_checkpoint(images, mode) -> None:
    settings = {"schedule": "0:4,1:0,3:1", "num_train_epochs": 5}
    assert_resumes_everywhere(partial(trained, images, mode, **settings))


def test_what_cannot_be_is_refused_before_anything_is_built(images, train_dataset) -> None:
    with pytest.raises(UnsupportedSetupError, match=r"plain_epochs=2 needs a schedule.*'0:0'"):
        FreezeConfig(plain_epochs=2)
    with pytest.raises(UnsupportedSetupError, match="plain_epochs=1 needs a schedule"):
        FreezeConfig(plain_epochs=1)
    with pytest.raises(UnsupportedSetupError, match=r"unfrozen_token_keep=0\.5 needs a schedule"):
        FreezeConfig(unfrozen_token_keep=0.5)
    FreezeConfig(plain_epochs=0, unfrozen_token_keep=1.0)
    with pytest.raises(UnsupportedSetupError, match="plain_epochs"):
        FreezeConfig(schedule="0:0", plain_epochs=-1)
    with pytest.raises(
        UnsupportedSetupError, match=r"plain_epochs=2 .*Give the trainer train_transform and eval_transform"
    ):
        trained(train_dataset, trainer={})
    biased = tiny_model("beit", use_relative_position_bias=True)
    with pytest.raises(
        UnsupportedModelError, match=r"unfrozen_token_keep=0\.5 behind its first block: .*unfrozen_token_keep=1"
    ):
        trained(images, model=biased)
    assert not Path("caches").exists()
