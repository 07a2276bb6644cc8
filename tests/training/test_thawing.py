"""Schedules that fall: blocks thaw, train with states of their own, and caches of lower split points come from the same pass."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.parity import assert_same, parameters_of
from support.tiny import Recorder, TinyTransform, make_trainer, tiny_vit
from transformers import TrainerCallback

from hf_freezecache.model.probe import find_blocks
from hf_freezecache.report.cost import passes_spent
from hf_freezecache.report.figures import figures_of
from hf_freezecache.report.page import render_page
from hf_freezecache.report.text import stage_account
from hf_freezecache.training.stage import StageRunner

FALLING = "0:4,1:1,2:0,3:2"


class Watching(Recorder):
    """Keeps, for each step, what the optimizer holds, and how many steps each of these has taken before."""

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self._run, StageRunner):  # a rehearsal
            return super().training_step(*args, **kwargs)
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        state = self.optimizer.state
        held = [names[p] for group in self.optimizer.param_groups for p in group["params"]]
        ages = {name: int(state[p]["step"]) if p in state else 0 for p, name in names.items() if name in held}
        self.held = [*getattr(self, "held", []), ages]
        assert len(held) == len(ages)  # none twice
        assert {names[p] for p in names if p.requires_grad} == set(held)
        return super().training_step(*args, **kwargs)


def trained(rows: Any, mode: str = "always", model: Any = None, resume: Any = None, **settings: Any) -> Any:
    cache = {"mode": mode, "num_views": 2, **settings.pop("cache", {})}
    settings = {"schedule": FALLING, "cls": Watching, **settings}
    trainer = make_trainer(tiny_vit() if model is None else model, rows, cache=cache, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def blocks_in(names: Any) -> set[int]:
    """Return the blocks that these parameters belong to, and -1 for what runs before."""
    found = {int(match[1]) for name in names if (match := re.search(r"\.layers?\.(\d+)\.", name))}
    return found | ({-1} if any("embeddings" in name for name in names) else set())


def test_thawed_blocks_train_and_cached_equals_live(train_dataset) -> None:
    live, cached = (trained(train_dataset, mode) for mode in ("never", "always"))
    assert live.losses == cached.losses
    assert_same(parameters_of(live.model), parameters_of(cached.model))
    steps = len(cached.losses) // 4
    held = [blocks_in(cached.held[epoch * steps]) for epoch in range(4)]
    assert held == [set(), {1, 2, 3}, {-1, 0, 1, 2, 3}, {2, 3}]
    # Optimizer states of thawed blocks begin anew, those of the others go on.
    second = cached.held[steps]
    assert {age for name, age in second.items() if blocks_in([name])} == {0}
    assert {age for name, age in second.items() if "classifier" in name} == {steps}
    third = cached.held[2 * steps]
    assert {age for name, age in third.items() if blocks_in([name]) & {1, 2, 3}} == {steps}
    start, end = parameters_of(tiny_vit()), parameters_of(cached.model)
    assert all(not torch.equal(start[name], end[name]) for name in end)
    assert all(parameter.requires_grad for parameter in cached.model.parameters())


def test_a_stage_trains_like_plain_torch(train_dataset) -> None:
    """Behind a head that was trained first, the blocks train as if they had never been frozen, with fresh states."""
    cached = trained(train_dataset, schedule="0:4,1:2", num_train_epochs=2, lr_scheduler_type="constant")
    steps = len(cached.losses) // 2
    head = trained(train_dataset, schedule="0:4", num_train_epochs=1, lr_scheduler_type="constant")
    model, blocks = head.model, find_blocks(head.model)[1]
    state = {n: head.optimizer.state[p] for n, p in model.named_parameters() if p in head.optimizer.state}
    names = dict(model.named_parameters())
    behind = {*blocks[2].parameters(), *blocks[3].parameters()}
    for parameter in names.values():
        parameter.requires_grad_(parameter in behind or any(parameter is names[name] for name in state))
    optimizer = torch.optim.AdamW([p for p in names.values() if p.requires_grad], lr=3e-3, weight_decay=0.0)
    for name, kept in state.items():
        optimizer.state[names[name]] = kept
    run = cached._run
    run.sampler.set_epoch(1)
    rows = [run.data.views[key] for key in run.sampler]
    model.train()
    losses = []
    for begin in range(0, len(rows), 10):
        optimizer.zero_grad()
        loss = model(**run.data.collate(rows[begin : begin + 10])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in names.values() if p.requires_grad], 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx(cached.losses[steps:], rel=1e-4)
    for name, value in parameters_of(model).items():
        torch.testing.assert_close(value, parameters_of(cached.model)[name], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("own", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "freeze",
    [pytest.param({}, marks=pytest.mark.slow), {"layer_decay": 0.8, "lr_scale": "1:2,4:3", "token_keep": 0.5}],
    ids=["", "all"],
)
def test_resume_at_every_checkpoint(train_dataset, own, freeze) -> None:
    """Also with an optimizer of the user's own, which holds all parameters from the start."""

    def run(**settings: Any) -> Any:
        model = tiny_vit()
        optimizers = (torch.optim.AdamW(model.parameters(), lr=3e-3), None)
        given = {"optimizers": optimizers} if own else {}
        return trained(train_dataset, model=model, freeze=freeze, trainer=given, **settings)

    whole = run(save_strategy="epoch", output_dir="saved")
    for checkpoint in sorted(Path("saved").glob("checkpoint-*")):
        again = run(resume=str(checkpoint), output_dir="again")
        assert_same(parameters_of(again.model), parameters_of(whole.model))
        assert not again._record.decisions[-1].built_shards or checkpoint.name == "checkpoint-20"
    plain = trained(train_dataset, mode="never", freeze=freeze)
    if not own:
        assert_same(parameters_of(plain.model), parameters_of(whole.model))


class Counting(TinyTransform):
    rendered = 0

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        Counting.rendered += len(batch["image"])
        return super().__call__(batch)


def test_one_pass_over_the_images_gives_the_caches_of_all_stages(images) -> None:
    counts = {}
    for schedule in ("0:4", "0:4,1:3,2:1"):
        Counting.rendered = 0
        rows = images.with_transform(Counting(True))
        trainer = trained(rows, schedule=schedule, num_train_epochs=3, cache={"cache_dir": schedule.replace(":", "-")})
        counts[schedule] = Counting.rendered
    first, second, third = trainer._record.decisions
    assert (first.cache, first.built_from, first.built_ahead, first.built_blocks) == ("built", 3, [1, 3], 4)
    assert [one.cache for one in (second, third)] == ["found", "found"]
    # Preflight renders a few rows for each split point; a pass of its own would render every row twice.
    assert counts["0:4,1:3,2:1"] - counts["0:4"] < len(rows)
    built = [passes_spent(trainer._record, one) - 3 * (4 - one.split_point) for one in trainer._record.decisions]
    assert built == pytest.approx([2 * 4, 0, 0], abs=0.01)
    predicted = [one.predicted["cached_passes"] - 3 * (4 - one.split_point) for one in trainer._record.decisions]
    assert predicted == [2 * 4, 0, 0]


@pytest.mark.slow
def test_a_later_stage_does_not_take_a_cache_of_blocks_that_have_trained_since(train_dataset) -> None:
    """0:1 caches block 0; the epoch without frozen blocks trains it; the cache at 3 must not be computed from that one."""
    live, cached = (
        trained(train_dataset, mode, schedule="0:1,1:0,2:3", num_train_epochs=3) for mode in ("never", "always")
    )
    assert live.losses == cached.losses
    assert [one.built_from for one in cached._record.decisions] == [0, None, 0]


@pytest.mark.parametrize(
    "cache",
    [
        pytest.param({"consume_previous_cache": True}, marks=pytest.mark.slow),
        pytest.param({"build_from": "images"}, marks=pytest.mark.slow),
        pytest.param({"mode": "auto"}, marks=pytest.mark.slow),
        pytest.param({"codec": "auto"}, marks=pytest.mark.slow),
        pytest.param({"codec": "auto", "copies": "residual", "num_views": 3}, marks=pytest.mark.slow),
        pytest.param({"codec": "int8", "build_from": "previous_cache"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_settings_of_caches(train_dataset, cache) -> None:
    cached = trained(train_dataset, schedule="0:4,1:2,2:3", num_train_epochs=3, cache=cache)
    again = trained(train_dataset, schedule="0:4,1:2,2:3", num_train_epochs=3, cache=cache)
    assert cached.losses == again.losses
    if cache.get("codec") is None:
        live = trained(train_dataset, "never", schedule="0:4,1:2,2:3", num_train_epochs=3)
        assert live.losses == cached.losses
        assert_same(parameters_of(live.model), parameters_of(cached.model))


@pytest.mark.slow
def test_what_the_user_has_frozen_stays_frozen(train_dataset) -> None:
    model = tiny_vit()
    mine = find_blocks(model)[1][3].parameters()
    for parameter in mine:
        parameter.requires_grad_(False)
    before = [parameter.clone() for parameter in find_blocks(model)[1][3].parameters()]
    trainer = trained(train_dataset, model=model, cls=Recorder)
    assert all(torch.equal(a, b) for a, b in zip(before, find_blocks(trainer.model)[1][3].parameters(), strict=True))
    assert not any(parameter.requires_grad for parameter in find_blocks(trainer.model)[1][3].parameters())


@pytest.mark.slow
def test_going_on_under_another_schedule_that_thaws_says_so(train_dataset) -> None:
    trained(train_dataset, schedule="0:3", num_train_epochs=2, save_strategy="epoch", output_dir="saved")
    with pytest.raises(ValueError, match=r"saved with 3 frozen blocks.*asks for 1"):
        trained(train_dataset, schedule="0:1", resume="saved/checkpoint-5")


@pytest.mark.slow
def test_the_report_tells_of_thawed_blocks(train_dataset, caplog) -> None:
    with caplog.at_level(logging.INFO):
        trainer = trained(train_dataset)
    figures = figures_of(trainer._record)
    assert [stage["split_point"] for stage in figures["stages"]] == [4, 1, 0, 2]
    assert "from the images, by way of the cache of later stages at split point 1." in stage_account(
        figures["stages"][0]
    )
    page = render_page(figures)
    assert "nan" not in page.lower().replace("nanosecond", "")


def rates_of(trainer: Any) -> list[float]:
    return [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]


@pytest.mark.parametrize(
    "kind", ["cosine", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("linear", "constant_with_warmup"))]
)
def test_the_schedule_of_learning_rates_begins_when_blocks_thaw(train_dataset, kind) -> None:
    """Until then the head has a constant rate. Afterwards the rates are those of a run that begins there."""
    settings = {"lr_scheduler_type": kind, "warmup_steps": 2}
    head_first = trained(train_dataset, schedule="0:4,2:1", num_train_epochs=5, freeze={"lr_scale": "4:5"}, **settings)
    alone = trained(train_dataset, schedule="0:1", num_train_epochs=3, **settings)
    steps = len(alone.losses) // 3
    assert rates_of(head_first)[: 2 * steps] == pytest.approx([5 * 3e-3] * 2 * steps)
    assert rates_of(head_first)[2 * steps :] == pytest.approx(rates_of(alone))


@pytest.mark.slow
def test_other_schedulers_run_over_the_whole_training(train_dataset) -> None:
    optimizer = torch.optim.AdamW((model := tiny_vit()).parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=10)
    trainer = trained(
        train_dataset,
        model=model,
        schedule="0:4,1:1",
        num_train_epochs=2,
        trainer={"optimizers": (optimizer, scheduler)},
    )
    assert rates_of(trainer) == pytest.approx([3e-3 * (1 - 0.09 * step) for step in range(10)], rel=1e-3)


@pytest.mark.slow
def test_build_cache_builds_what_one_pass_can_give(train_dataset) -> None:
    settings = {"schedule": "0:4,1:3,2:1,3:2", "cache": {"num_views": 2, "codec": "int8"}}
    built = make_trainer(tiny_vit(), train_dataset, **settings).build_cache()
    assert built.reader.index.split_point == 4
    trainer = trained(train_dataset, **settings)
    assert [one.cache for one in trainer._record.decisions] == ["found", "found", "found", "built"]


def test_stages_that_are_never_reached_change_nothing(train_dataset) -> None:
    """Neither the schedule of learning rates, nor what is built."""
    settings = {"num_train_epochs": 2, "warmup_steps": 2, "lr_scheduler_type": "linear"}
    whole = trained(train_dataset, schedule="0:4", **settings)
    unreached = trained(train_dataset, schedule="0:4,4:2", **settings)
    assert rates_of(unreached) == rates_of(whole)
    assert unreached._record.decisions[0].built_ahead == []
    assert_same(parameters_of(unreached.model), parameters_of(whole.model))


@pytest.mark.slow
def test_equal_stages_of_the_head_count_as_one(train_dataset) -> None:
    runs = [trained(train_dataset, schedule=schedule, num_train_epochs=3) for schedule in ("0:4,2:2", "0:4,1:4,2:2")]
    assert rates_of(runs[0]) == rates_of(runs[1])


class FreezesLastBlock(TrainerCallback):
    def on_epoch_begin(self, args, state, control, model, **kwargs):
        if state.epoch >= 1:
            find_blocks(model)[1][3].requires_grad_(False)


def test_what_a_callback_freezes_when_blocks_thaw_stays_frozen(train_dataset) -> None:
    for mode in ("always", "never"):
        given = {"callbacks": [FreezesLastBlock()]}
        trainer = trained(train_dataset, mode, cls=Recorder, schedule="0:4,1:2", num_train_epochs=2, trainer=given)
        before, after = parameters_of(tiny_vit()), parameters_of(trainer.model)
        moved = {number for name in after if not torch.equal(before[name], after[name]) for number in blocks_in([name])}
        assert moved == {2}


@pytest.mark.slow
def test_a_cache_that_a_later_stage_needs_is_not_consumed(train_dataset) -> None:
    cache = {"consume_previous_cache": True}
    trained(train_dataset, schedule="0:2", num_train_epochs=1, cache=cache)
    trainer = trained(train_dataset, schedule="0:4,1:2", num_train_epochs=2, cache=cache)
    assert [(one.cache, one.built_from) for one in trainer._record.decisions] == [("built", 2), ("found", None)]


@pytest.mark.slow
@pytest.mark.parametrize("build_from", ["images", "auto"])
def test_what_was_built_is_counted_as_it_was(train_dataset, build_from) -> None:
    """A lossy cache that may not be computed from another one takes all blocks once more."""
    cache = {"build_from": build_from, "codec": "int8"}
    trainer = trained(train_dataset, schedule="0:4,1:3,2:1", num_train_epochs=3, cache=cache)
    decisions = trainer._record.decisions
    built = [passes_spent(trainer._record, one) - 3 * (4 - one.split_point) for one in decisions]
    sources = {"images": [8, 6, 2], "auto": [2 * sum(one.built_blocks for one in decisions[:1]), 0, 0]}
    assert built == pytest.approx(sources[build_from], abs=0.01)


def test_build_cache_of_a_stage_that_this_run_does_not_reach(train_dataset) -> None:
    trainer = make_trainer(tiny_vit(), train_dataset, schedule="0:0,5:2", num_train_epochs=2)
    assert trainer.build_cache().reader.index.split_point == 2
