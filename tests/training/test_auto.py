"""``schedule="auto"`` and ``num_views="auto"``: what the trainer makes of the choice, and what the user may fix."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from support.auto import QKV, SHARE, SeesEarlierBlocks, auto_trainer, scales_of
from support.parity import assert_same, parameters_of
from support.tiny import PAIR, TinyTransform, make_trainer, tiny_model, tiny_vit

from hf_freezecache import CacheConfig, FreezeCacheTrainer
from hf_freezecache.auto_schedule import choose
from hf_freezecache.errors import UnsupportedSetupError
from hf_freezecache.model.probe import find_blocks
from hf_freezecache.report.figures import figures_of
from hf_freezecache.report.text import describe_schedule
from hf_freezecache.training.auto_rates import QKV_SCALE
from hf_freezecache.training.lr_rule import lr_scale


def test_where_steps_are_counted_the_head_takes_none_on_top(train_dataset) -> None:
    trainer = auto_trainer(train_dataset, max_steps=15)  # three epochs
    assert trainer.args.max_steps == 15
    assert trainer.freeze_config.schedule == "0:4,1:1"


def test_a_budget_chooses_epochs_views_tokens_and_rates(train_dataset, caplog) -> None:
    trainer = auto_trainer(train_dataset, freeze={"budget": 0.5, "block_weights": "all"}, num_train_epochs=3)
    freezing, caching = trainer.freeze_config, trainer.cache_config
    choice = choose(4, 3, 0.5)
    assert freezing.schedule == f"0:4,{choice.head_epochs}:{choice.split_point}"
    assert (freezing.token_keep, caching.num_views) == (choice.token_keep, choice.num_views)
    # The user's rate is for twice the cost.
    rates = {point: 0.5**-0.4 * lr_scale(point, 4) for point in (choice.split_point, 4)}
    rates[choice.split_point] /= 2  # behind a trained head
    assert freezing.layer_decay is None
    assert freezing.lr_scale == ",".join(f"{point}:{scale:.3g}" for point, scale in rates.items())
    assert trainer.args.num_train_epochs == choice.num_epochs
    lines = [record.getMessage() for record in caplog.records if "auto" in record.name]
    assert len(lines) == 2
    assert lines[0] == "schedule='auto' may spend 1.5 epochs of full fine-tuning (budget=0.5 of 3)"
    trainer.train()
    assert trainer.state.epoch == choice.num_epochs
    figures = figures_of(trainer._record)
    words = f"{choice.head_epochs} epochs of the head alone, then {choice.num_epochs - choice.head_epochs:g} behind"
    assert f"{words} one frozen block" in figures["freezing"]["chosen"]
    assert choice.split_point == 1
    assert "chosen by schedule='auto'" in describe_schedule(figures)
    assert [stage["token_keep"] for stage in figures["stages"]] == [1, choice.token_keep]


def test_a_budget_of_some_epochs_trains_queries_keys_and_values_and_ends_with_plain_images(images, caplog) -> None:
    settings = {"num_train_epochs": 9, "trainer": PAIR, "learning_rate": 1e-3}
    trainer = auto_trainer(images, freeze=QKV, **settings)
    freezing = trainer.freeze_config
    choice = choose(4, 9, 0.5, qkv_share=SHARE, epoch_steps=5)
    assert freezing.schedule == "0:4,2:0"
    assert (freezing.block_weights, freezing.token_keep, freezing.unfrozen_token_keep) == ("qkv", None, None)
    assert (freezing.plain_epochs, freezing.layer_decay) == (choice.plain_epochs, None)
    assert trainer.cache_config.num_views == 1
    assert trainer.args.num_train_epochs == choice.num_epochs
    # The rate of all blocks, raised for the shorter run and for what trains, halved behind a trained head.
    assert scales_of(trainer) == pytest.approx([QKV_SCALE * 0.5**-0.4 / 2, 4 * 0.5**-0.4], rel=0.01)
    assert scales_of(auto_trainer(images, freeze=QKV, **{**settings, "learning_rate": 1e-4}))[0] == 6.0
    assert "block_weights=qkv, plain_epochs=3, lr_scale=" in caplog.text
    trainer.train()
    figures = figures_of(trainer._record)
    assert f"then {choice.num_epochs - 2:g} without frozen blocks" in figures["freezing"]["chosen"]
    assert [stage["token_keep"] for stage in figures["stages"]] == [1, 1]
    assert choice.cost <= 4.5
    spent = sum(stage["passes_spent"] for stage in figures["stages"])
    assert spent / 12 == pytest.approx(choice.cost, rel=0.005)
    # By hand, ten rows in a step, and ten steps of the head.
    assert spent == pytest.approx(4 + 4 * (2 + SHARE) * (trainer.state.global_step - 10) / 5, rel=0.005)
    # What is settled stays, and what speaks against it is heard.
    kept = auto_trainer(images, freeze={**QKV, "unfrozen_token_keep": 0.3, "plain_epochs": 0}, **settings)
    assert (kept.freeze_config.unfrozen_token_keep, kept.freeze_config.plain_epochs) == (0.3, 0)
    assert kept.args.num_train_epochs > trainer.args.num_train_epochs
    for settled in (
        {"cache": {"num_views": 2}},
        {"freeze": {**QKV, "token_keep": 0.5}},
        {"freeze": {"budget": 0.5, "block_weights": "all"}},
    ):
        frozen = auto_trainer(images, **{"freeze": QKV, **settled}, **settings).freeze_config
        assert frozen.schedule == "0:4,2:1"


def test_where_blocks_are_frozen_the_users_choice_of_weights_is_counted(images) -> None:
    settings = {"num_train_epochs": 9, "trainer": PAIR, "cache": {"num_views": 2}}
    trainer = auto_trainer(images, freeze={"budget": 0.5, "block_weights": "qkv"}, **settings)
    choice = choose(4, 9, 0.5, num_views=2, trained_share=SHARE)
    assert (trainer.args.num_train_epochs, trainer.freeze_config.token_keep) == (choice.num_epochs, choice.token_keep)
    trainer.train()
    spent = sum(stage["passes_spent"] for stage in figures_of(trainer._record)["stages"])
    assert spent / 12 == pytest.approx(choice.cost, rel=0.01)


def test_the_head_needs_some_rows_of_each_class_before_queries_keys_and_values_train(images) -> None:
    """Ten of each class, in whole chunks; what the others would take trains blocks."""
    settings = {"num_train_epochs": 1, "trainer": PAIR, "cache": {"chunk_size": 4}, "learning_rate": 1e-4}
    trainer = auto_trainer(images, freeze=QKV, **settings)
    rows = len(images)
    assert (trainer.freeze_config.head_rows, trainer.freeze_config.schedule) == (10 * 4 / rows, "0:4,4:0")
    trainer.train()
    # By hand: the part once through four blocks, however often the head sees it, and the steps that the rest of six passes pays for.
    part, steps = 4 * math.ceil(10 * 4 / rows * math.ceil(rows / 4)) / rows, trainer.state.global_step - 4 * 5
    spent = sum(stage["passes_spent"] for stage in figures_of(trainer._record)["stages"])
    assert spent == pytest.approx(4 * part + 4 * (2 + SHARE) * steps / 5, rel=0.005)
    assert 6 - 4 * (2 + SHARE) / 5 < spent <= 6
    # A fifth of an epoch, half of those that bear the least rate, whatever the user's is.
    for rate, least, head in ((1e-4, 6.0, 4), (1e-2, 0.06, 2)):
        chosen = auto_trainer(images, freeze=QKV, **{**settings, "learning_rate": rate})
        epochs = chosen.args.num_train_epochs - head
        assert scales_of(chosen)[0] == pytest.approx(least * epochs / 0.4, rel=0.01)
    # Not where all rows pass through the blocks all the same, where the user says so, or where its epochs cost passes.
    needy = SeesEarlierBlocks(tiny_vit().config)
    longer = {**settings, "num_train_epochs": 3}
    for other in (
        auto_trainer(images, freeze={"budget": 0.5, "block_weights": "all"}, **longer),
        auto_trainer(images, freeze=QKV, **{**longer, "cache": {"mode": "never"}}),
        auto_trainer(images, needy, freeze=QKV, **longer),
        auto_trainer(images, freeze=QKV, **longer),
        auto_trainer(images.select(range(40)), freeze=QKV, **longer),
    ):
        assert other.freeze_config.head_rows is None
    kept = auto_trainer(images, freeze={**QKV, "head_rows": 0.3}, **settings)
    assert kept.freeze_config.head_rows == 0.3
    assert kept.args.num_train_epochs > trainer.args.num_train_epochs


def test_a_head_of_a_short_run_trains_for_steps_that_suit_its_rate(images) -> None:
    """A hundred at the least rate: two epochs at any rate, four at most. Of another optimizer, or at a rate of the user's, nothing is known."""

    def head_epochs(rate: float = 1e-4, model: Any = None, **settings: Any) -> int:
        batches = {"num_train_epochs": 1, "per_device_train_batch_size": 2, "trainer": PAIR, "learning_rate": rate}
        freeze = {**QKV, **settings.pop("freeze", {})}
        schedule = auto_trainer(images, model, freeze, **batches, **settings).freeze_config.schedule
        return int(schedule.removeprefix("0:4,").removesuffix(":0"))

    # 25 steps in an epoch; the rule gives the head 4 / 0.5**0.4 times the user's rate.
    assert head_epochs() == 4
    assert head_epochs(1.2e-3 * 100 / 75 / 5.278) == 3
    assert head_epochs(1.2e-3 * 2 / 5.278) == head_epochs(1e-2) == 2
    assert head_epochs(optim="sgd") == head_epochs(freeze={"lr_scale": "2"}) == head_epochs(0.0) == 2
    assert head_epochs(model=tiny_vit(hidden_size=384), freeze={"block_weights": "qkv"}) == 4  # half the rate


class Enlarged(TinyTransform):
    """Shows images of another size."""

    def __init__(self, size: int) -> None:
        super().__init__(augment=False)
        self.size = size

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        shown = super().__call__(batch)
        images = torch.nn.functional.interpolate(torch.stack(shown["pixel_values"]), size=self.size)
        return {**shown, "pixel_values": list(images)}


def test_of_many_tokens_or_few_channels_blocks_are_frozen_unless_the_user_asks_for_it(images) -> None:
    def chosen(pixels: int = 36, width: int = 192, freeze: Any = None, change: Any = None) -> tuple[str, Any]:
        model = tiny_model("dinov2", hidden_size=width)  # it takes images of any size, whatever it is configured for
        if change is not None:
            change(model)
        rows = images.with_transform(Enlarged(pixels))
        freezing = auto_trainer(rows, model, freeze={"budget": 0.5, **(freeze or {})}, num_train_epochs=9).freeze_config
        return freezing.schedule, freezing.block_weights

    def hide_queries(model: Any) -> None:
        for block in find_blocks(model)[1]:
            for name, layer in list(block.named_modules()):
                if name.endswith("query") or name.endswith("q_proj"):
                    layer.requires_grad_(False)

    assert chosen() == ("0:4,2:0", "qkv")  # 81 patches and CLS
    assert chosen(pixels=40) == chosen(width=128) == ("0:4,2:1", None)
    assert chosen(pixels=40, width=128, freeze=QKV) == ("0:4,2:0", "qkv")
    assert chosen(change=hide_queries) == ("0:4,2:1", None)
    assert chosen(freeze={"budget": None}) == ("0:4,2:0", "qkv")


def test_without_an_eval_transform_nothing_is_plain(train_dataset) -> None:
    freezing = auto_trainer(train_dataset, freeze=QKV, num_train_epochs=9).freeze_config
    assert (freezing.schedule, freezing.plain_epochs) == ("0:4,2:0", None)


def test_what_the_user_sets_stays(train_dataset) -> None:
    fixed = {"token_keep": 0.75, "layer_decay": 0.9, "lr_scale": "2"}
    trainer = auto_trainer(train_dataset, freeze=fixed, cache={"num_views": 1}, num_train_epochs=3)
    freezing = trainer.freeze_config
    assert (freezing.token_keep, freezing.layer_decay, freezing.lr_scale) == (0.75, 0.9, "2")
    assert trainer.cache_config.num_views == 1
    assert trainer.args.num_train_epochs == 5  # those of the head come on top
    assert freezing.lr_scale == "2"


def test_where_no_head_trains_first_rates_decay(train_dataset) -> None:
    """Then the user's rate, found without a decay, is raised. One that was found with a decay stays."""
    settings = {"max_steps": 5, "num_train_epochs": 1}
    chosen, kept = (
        auto_trainer(train_dataset, freeze=freezing, **settings).freeze_config
        for freezing in ({}, {"layer_decay": 0.75})
    )
    assert chosen.schedule == kept.schedule == "0:1"
    assert chosen.layer_decay == kept.layer_decay == 0.75
    scales = [{k: float(v) for k, v in (pair.split(":") for pair in one.lr_scale.split(","))} for one in (chosen, kept)]
    assert scales[0] == pytest.approx({point: 3 * scale for point, scale in scales[1].items()}, rel=0.01)


def test_low_rates_are_raised_for_a_head_alone_and_behind_one_that_was_trained(train_dataset) -> None:
    """Low rates are for blocks that follow a new head. One that is very low stays low."""

    def scales(rate: float, **settings: Any) -> list[float]:
        return scales_of(auto_trainer(train_dataset, learning_rate=rate, **settings))

    by_rule = [0.625, 4.0]
    assert [scales(rate) for rate in (1e-2, 5e-4, 1e-4, 1e-6)] == [by_rule, by_rule, [1.5, 12.0], [2.5, 32.0]]
    assert scales(1e-4, model=tiny_vit(hidden_size=384), freeze={"block_weights": "all"}) == [0.75, 6.0]
    assert scales(1e-4, model=tiny_model("clip")) == [
        1.5,
        12.0,
    ]  # the width stands in a configuration of the vision part
    assert scales(1e-4, optim="sgd") == scales(0.0) == by_rule
    assert scales(1e-4, freeze={"budget": 0.5, "block_weights": "all"}) == [1.5, 12.0]
    assert scales(1e-6, freeze=QKV, num_train_epochs=3) == [32.0, 32.0]
    decayed = scales(1e-2, freeze={**QKV, "layer_decay": 0.75}, num_train_epochs=9)
    assert decayed == pytest.approx(
        [4 / 3 * 0.5**-0.4 / 2, 4 * 0.5**-0.4], rel=0.01
    )  # a rate found with a decay is higher
    model = tiny_vit()
    own = torch.optim.AdamW(model.parameters(), lr=1e-4)
    assert scales(1e-4, model=model, trainer={"optimizers": (own, None)}) == by_rule

    class OwnGroups(FreezeCacheTrainer):
        def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            return super().create_optimizer(*args, **kwargs)

    class OwnOptimizer(FreezeCacheTrainer):
        def create_optimizer_and_scheduler(self, *args: Any, **kwargs: Any) -> Any:
            return super().create_optimizer_and_scheduler(*args, **kwargs)

    class OwnClass(FreezeCacheTrainer):
        @staticmethod
        def get_optimizer_cls_and_kwargs(*args: Any, **kwargs: Any) -> Any:
            return torch.optim.SGD, {"lr": 1e-4}

    assert [scales(1e-4, cls=cls) for cls in (OwnGroups, OwnOptimizer, OwnClass)] == [by_rule] * 3


def test_features_are_augmented_where_blocks_train(images, caplog) -> None:
    mixed = {"feature_augmentation": "mixup:0.2"}
    wide = {
        "model": tiny_vit(hidden_size=192, intermediate_size=768),
        "num_train_epochs": 3,
        "trainer": PAIR,
        "cache": mixed,
    }
    assert auto_trainer(images, **wide).freeze_config.schedule == "0:4,2:1"
    assert "feature_augmentation acts" not in caplog.text
    asked = auto_trainer(images, freeze={"block_weights": "qkv"}, **wide)
    assert asked.freeze_config.schedule == "0:4,2:0"
    assert "feature_augmentation acts on cached stages only" in caplog.text


def test_one_view_where_views_are_alike(images) -> None:
    flat = auto_trainer(images.with_transform(TinyTransform(augment=False)), num_train_epochs=12)
    drawn = auto_trainer(images.with_transform(TinyTransform(augment=True)), num_train_epochs=12)
    assert (flat.cache_config.num_views, drawn.cache_config.num_views) == (1, choose(4, 12).num_views)
    assert drawn.cache_config.num_views > 1
    kept = auto_trainer(
        images.with_transform(TinyTransform(augment=False)), cache={"num_views": 3}, num_train_epochs=12
    )
    assert kept.cache_config.num_views == 3


def views_of(rows: Any, schedule: str, epochs: int, mode: str = "always", **settings: Any) -> Any:
    caching = {"num_views": "auto", "mode": mode}
    trainer = make_trainer(tiny_vit(), rows, schedule=schedule, num_train_epochs=epochs, cache=caching, **settings)
    return trainer.cache_config.num_views


def test_the_epochs_with_frozen_blocks_choose_the_number_of_views(train_dataset, images, caplog) -> None:
    caplog.set_level(logging.INFO, "hf_freezecache")
    assert views_of(train_dataset, "0:1,2:3", 12) == 4
    assert [record.getMessage() for record in caplog.records] == [
        "num_views='auto': 4 views of each image, since blocks are frozen for 12 epochs in a row."
    ]
    assert views_of(train_dataset, "0:1,2:3", 6) == 2
    assert views_of(train_dataset, "0:1,3:0,6:3", 9) == 1  # twice three epochs: the second cache is built anew
    assert views_of(train_dataset, "0:1,5:0", 12) == 2  # epochs without frozen blocks store nothing
    assert views_of(train_dataset, "0:1,3:2,6:3", 9) == 4  # each cache is computed from the one before
    assert views_of(train_dataset, "linear(0.0,0.5,0.5)", 12) == 4
    assert views_of(train_dataset, "0:0", 12) == 1
    assert views_of(train_dataset, "0:2", 12, "never") == 4  # as with a cache: the same views are seen
    assert views_of(train_dataset, "0:2", 12, max_steps=20) == 2  # four epochs
    assert views_of(images.with_transform(TinyTransform(augment=False)), "0:2", 12) == 1
    assert (
        caplog.records[-1]
        .getMessage()
        .endswith("one view of each image, since the transform gives the same image in every view.")
    )
    for mode in ("always", "never"):
        trainer = auto_trainer(train_dataset, num_train_epochs=12, cache={"num_views": "auto", "mode": mode})
        assert trainer.cache_config.num_views == choose(4, 12).num_views


@pytest.mark.slow
def test_a_head_that_does_not_train_is_not_trained_first(train_dataset) -> None:
    model = tiny_vit()
    model.requires_grad_(False)
    for block in find_blocks(model)[1]:
        block.requires_grad_(True)
    trainer = auto_trainer(train_dataset, model, num_train_epochs=3)
    assert trainer.freeze_config.schedule == f"0:{choose(4, 3, head_first=False).split_point}"
    trainer.train()


@pytest.mark.slow
def test_a_head_that_cannot_be_cached_trains_from_images(train_dataset, caplog) -> None:
    def run(mode: str) -> Any:
        model = SeesEarlierBlocks(tiny_vit().config)
        model.load_state_dict(tiny_vit().state_dict())
        trainer = auto_trainer(train_dataset, model, cache={"mode": mode, "num_views": 2}, num_train_epochs=3)
        trainer.train()
        return trainer

    trainer = run("always")
    assert [one.trained_from for one in trainer._record.decisions] == ["images", "cache"]
    assert "trains the head from images" in caplog.text
    assert_same(parameters_of(trainer.model), parameters_of(run("never").model))


@pytest.mark.slow
def test_a_model_that_needs_all_tokens_gets_them(train_dataset, caplog) -> None:
    trainer = auto_trainer(
        train_dataset, tiny_model("beit", use_relative_position_bias=True), freeze={"budget": 0.5}, num_train_epochs=3
    )
    trainer.train()
    assert [one.token_keep for one in trainer._record.decisions] == [1, 1]
    assert "schedule='auto' trains on all tokens" in caplog.text


def test_views_of_a_written_schedule_stay_one() -> None:
    assert CacheConfig().num_views == 1
    assert CacheConfig() == CacheConfig(num_views=1)


@pytest.mark.slow
def test_build_cache_passes_over_a_head_that_cannot_be_cached(train_dataset) -> None:
    model = SeesEarlierBlocks(tiny_vit().config)
    trainer = auto_trainer(train_dataset, model, num_train_epochs=3)
    assert trainer.build_cache().reader.index.split_point == choose(4, 3).split_point


def test_what_runs_in_front_of_the_blocks_is_no_head(train_dataset) -> None:
    model = tiny_vit()
    model.classifier.requires_grad_(False)
    model.vit.layernorm.requires_grad_(False)
    trainer = auto_trainer(train_dataset, model, num_train_epochs=3)
    assert not trainer.freeze_config.schedule.startswith("0:4")


def test_a_head_that_does_not_train_is_refused_in_those_words(train_dataset) -> None:
    model = tiny_vit()
    model.requires_grad_(False)
    find_blocks(model)[1].requires_grad_(True)
    trainer = make_trainer(model, train_dataset, schedule="0:4,2:2", freeze={"lr_scale": "auto", "layer_decay": 0.8})
    with pytest.raises(UnsupportedSetupError, match="Nothing is left to train"):
        trainer.train()
