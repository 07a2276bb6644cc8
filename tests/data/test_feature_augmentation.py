"""Augmentation of hidden states: what each changes and keeps, and training on what it makes."""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.parity import assert_same, parameters_of
from support.tiny import Recorder, TinyTransform, make_trainer, tiny_model, tiny_vit
from transformers import HfArgumentParser
from transformers.loss.loss_utils import fixed_cross_entropy

from hf_freezecache import (
    CacheConfig,
    FreezeCacheTrainer,
)
from hf_freezecache.data.feature_augmentation import (
    FEATURE_AUGMENTATIONS,
    Brightness,
    CutMix,
    FeatureAugmentation,
    FeatureBatch,
    Mixup,
    TokenDropout,
    TokenFlip,
    parse_feature_augmentation,
    step_generator,
)
from hf_freezecache.data.feature_augmenter import FeatureAugmenter
from hf_freezecache.data.soft_labels import class_targets
from hf_freezecache.errors import (
    DataError,
    UnsupportedSetupError,
)
from hf_freezecache.model.split import find_blocks


@pytest.fixture(autouse=True, scope="module")
def _quick_collections() -> Iterator[None]:
    """``train()`` collects garbage, which takes longer than training here where all that was imported is looked at."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


EACH = {"token_flip": 0.5, "brightness": 0.2, "token_dropout": 0.3, "mixup": 0.4, "cutmix": 1.0}


def states_of(size=5, prefix=2, grid=(3, 4), hidden=6, dtype=torch.float32, seed=0) -> FeatureBatch:
    """Random states; sample ``i`` is of class ``i``, so that targets tell who was mixed in."""
    tokens = prefix + grid[0] * grid[1]
    states = torch.randn(size, tokens, hidden, generator=torch.Generator().manual_seed(seed)) * 3 + 1
    return FeatureBatch(states.to(dtype), torch.eye(size), prefix, grid)


def partners_of(targets: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Who was mixed into each sample, and the share that samples kept."""
    share = targets.diag().min().item()  # a sample that is its own partner keeps all
    others = targets.clone().fill_diagonal_(0)
    alone = others.sum(1) == 0
    return torch.where(alone, torch.arange(len(targets)), others.argmax(1)), share


batches = st.builds(
    states_of,
    size=st.integers(1, 9),
    prefix=st.integers(0, 5),
    grid=st.tuples(st.integers(2, 6), st.integers(1, 7)),
    hidden=st.integers(1, 5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
steps = st.integers(0, 10**6)


# ---- What holds of each ----


@given(st.sampled_from(sorted(EACH)), batches, steps)
def test_each_is_a_pure_function_of_batch_seed_and_step(name, batch, step) -> None:
    augmentation = FEATURE_AUGMENTATIONS[name](EACH[name])
    states, targets = batch.hidden_states.clone(), batch.targets.clone()
    torch.manual_seed(step)
    random_state = torch.get_rng_state()
    first = augmentation(batch, step_generator(3, step))
    assert torch.equal(torch.get_rng_state(), random_state)
    torch.manual_seed(step + 1)
    second = augmentation(batch, step_generator(3, step))
    assert torch.equal(first.hidden_states, second.hidden_states)
    assert torch.equal(first.targets, second.targets)
    assert torch.equal(batch.hidden_states, states)
    assert torch.equal(batch.targets, targets)
    assert first.hidden_states.dtype == states.dtype
    assert first.hidden_states.shape == states.shape
    assert first.targets.dtype == torch.float32
    torch.testing.assert_close(first.targets.sum(1), torch.ones(len(targets)))
    # What is mixed of values lies between them: no channel of the batch leaves its range.
    room = states.float().abs().max() * 2e-2
    low, high = states.float().amin((0, 1)) - room, states.float().amax((0, 1)) + room
    assert ((first.hidden_states >= low) & (first.hidden_states <= high)).all()
    if not augmentation.mixes:
        assert torch.equal(first.hidden_states[:, : batch.prefix_tokens], states[:, : batch.prefix_tokens])
        assert torch.equal(first.targets, targets)


@pytest.mark.parametrize("name", EACH)
def test_another_step_micro_step_or_seed_draws_other_numbers(name) -> None:
    augmentation, batch = FEATURE_AUGMENTATIONS[name](EACH[name]), states_of(size=12)
    drawn = [
        augmentation(batch, step_generator(*key)).hidden_states
        for key in ((1, 0, 0), (1, 1, 0), (1, 0, 1), (2, 0, 0), (-1, 0, 0))
    ]
    for position, states in enumerate(drawn):
        assert not torch.equal(states, batch.hidden_states)
        assert not any(torch.equal(states, other) for other in drawn[:position])


def test_the_table_names_all_classes() -> None:
    assert set(EACH) == set(FEATURE_AUGMENTATIONS)
    assert set(FEATURE_AUGMENTATIONS.values()) == set(FeatureAugmentation.__subclasses__()) - {Unchanged, Doubled}


# ---- Each by itself ----


def test_token_flip_mirrors_a_numbered_grid() -> None:
    states = torch.tensor([-1.0, 0, 1, 2, 10, 11, 12]).view(1, 7, 1)
    flipped = TokenFlip(1.0)(FeatureBatch(states, None, 1, (2, 3)), step_generator(0, 0))
    assert flipped.hidden_states.flatten().tolist() == [-1, 2, 1, 0, 12, 11, 10]


@given(batches)
def test_token_flip_twice_is_the_identity(batch) -> None:
    flip = TokenFlip(1.0)
    twice = flip(flip(batch, step_generator(0, 0)), step_generator(0, 1))
    assert torch.equal(twice.hidden_states, batch.hidden_states)


def test_token_flip_takes_whole_samples_with_its_probability() -> None:
    batch = states_of(size=2000, hidden=1)
    batch = FeatureBatch(batch.hidden_states, None, 2, (3, 4))
    flipped, all_flipped = (TokenFlip(p)(batch, step_generator(0, 0)).hidden_states for p in (0.3, 1.0))
    changed = (flipped != batch.hidden_states).flatten(1).any(1)
    assert torch.equal(flipped[changed], all_flipped[changed])
    assert 0.26 < changed.float().mean() < 0.34


@given(batches, st.floats(0.01, 1.0), steps)
def test_brightness_keeps_each_channel_of_each_sample_in_its_range(batch, strength, step) -> None:
    out = Brightness(strength)(batch, step_generator(0, step))
    before, after = batch.patches, out.patches
    assert (after.amin(1) >= before.amin(1)).all()
    assert (after.amax(1) <= before.amax(1)).all()


def test_brightness_is_the_shift_of_features_mapped_to_0_1() -> None:
    batch, strength = states_of(size=64), 0.2
    before, after = batch.patches, Brightness(strength)(batch, step_generator(0, 0)).patches
    low, span = before.amin(1, keepdim=True), before.amax(1, keepdim=True) - before.amin(1, keepdim=True)
    unit, shifted = (before - low) / span, (after - low) / span
    free = (shifted > 1e-4) & (shifted < 1 - 1e-4)
    offset = torch.where(free, shifted - unit, torch.nan).nanmedian(1, keepdim=True).values
    torch.testing.assert_close(shifted, (unit + offset).clamp(0, 1), rtol=0, atol=1e-5)
    assert 0.95 * strength < offset.abs().max() <= strength * 1.001
    assert abs(offset.mean()) < 0.03
    assert offset.squeeze(1).std(0).min() > 0.08  # one of its own for each sample
    assert offset.squeeze(1).std(1).min() > 0.01  # ... and channel


def test_brightness_leaves_a_constant_channel() -> None:
    states = states_of().hidden_states
    states[..., 1] = 3.7
    out = Brightness(1.0)(FeatureBatch(states, None, 2, (3, 4)), step_generator(0, 0)).hidden_states
    assert torch.equal(out[..., 1], states[..., 1])
    assert not torch.equal(out[..., 2], states[..., 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_dropout_puts_the_mean_patch_in_place_of_a_share_of_patches(dtype) -> None:
    batch = states_of(size=200, dtype=dtype)
    before, after = batch.patches, TokenDropout(0.3)(batch, step_generator(0, 0)).patches
    dropped = (after != before).any(2)
    assert 0.26 < dropped.float().mean() < 0.34
    assert len({tuple(row.tolist()) for row in dropped}) > 150
    mean = before.float().mean(1, keepdim=True).to(dtype).expand_as(before)
    assert torch.equal(after[dropped], mean[dropped])


@given(batches, st.floats(0.05, 20), steps)
def test_mixup_mixes_states_and_labels_by_one_share(batch, alpha, step) -> None:
    out = Mixup(alpha)(batch, step_generator(0, step))
    partner, share = partners_of(out.targets)
    states = batch.hidden_states.float()
    expected = share * states + (1 - share) * states[partner]
    torch.testing.assert_close(out.hidden_states.float(), expected, rtol=1e-2, atol=2e-2)
    assert sorted(partner.tolist()) == list(range(len(partner)))


@pytest.mark.slow
def test_mixup_draws_shares_from_the_beta_distribution() -> None:
    batch = states_of(size=2, grid=(1, 1), hidden=1)
    for alpha in (0.2, 1.0, 8.0):
        mixed = [Mixup(alpha)(batch, step_generator(0, step)).targets for step in range(1000)]
        shares = torch.stack([targets[0, 0] for targets in mixed if targets[0, 1] > 0])
        assert 400 < len(shares) < 600
        # One of the two samples is its own partner in half of the draws.
        assert abs(shares.mean() - 0.5) < 0.06
        assert abs(shares.var() / (0.25 / (2 * alpha + 1)) - 1) < 0.15


@given(batches, st.floats(0.2, 5), steps)
def test_cutmix_pastes_one_rectangle_and_labels_by_its_exact_share(batch, alpha, step) -> None:
    height, width = batch.grid
    # Patches that tell sample and place apart, in bf16 too.
    places = torch.arange(height * width).view(1, -1, 1).expand(len(batch.targets), -1, 1)
    owner = torch.arange(len(batch.targets)).view(-1, 1, 1).expand_as(places)
    named = torch.cat([owner, places], dim=2).to(batch.hidden_states.dtype)
    prefix = batch.hidden_states[:, : batch.prefix_tokens, :1].expand(-1, -1, 2)
    given_batch = FeatureBatch(torch.cat([prefix, named], dim=1), batch.targets, batch.prefix_tokens, batch.grid)
    out = CutMix(alpha)(given_batch, step_generator(0, step))
    assert torch.equal(out.patches[..., 1], named[..., 1])  # what is pasted comes from the same place
    partner, share = partners_of(out.targets)
    for sample, other in enumerate(partner.tolist()):
        owners = out.patches[sample, :, 0].view(height, width)
        assert set(owners.flatten().tolist()) <= {sample, other}
        if other == sample:
            continue
        pasted = owners == other
        assert share == pytest.approx(1 - pasted.sum().item() / (height * width), abs=1e-6)
        rows, columns = pasted.any(1), pasted.any(0)
        assert torch.equal(pasted, rows[:, None] & columns[None])
        for line in (rows, columns):
            assert (line.int().diff() == 1).sum() + int(line[0]) <= 1
    own = prefix.float()
    mixed = out.hidden_states[:, : batch.prefix_tokens].float()
    torch.testing.assert_close(mixed, share * own + (1 - share) * own[partner], rtol=1e-2, atol=2e-2)


def test_cutmix_reaches_every_token_and_every_size() -> None:
    batch = states_of(size=2, prefix=0, hidden=1)
    pasted = torch.stack(
        [
            (CutMix(1.0)(batch, step_generator(0, step)).patches[0, :, 0] == batch.patches[1, :, 0])
            for step in range(600)
        ]
    )
    sizes = pasted.sum(1)
    assert (pasted.float().mean(0) > 0.12).all()
    assert {0, 12} <= set(sizes.tolist())
    assert len(sizes.unique()) >= 6


def test_an_unlabelled_sample_adds_nothing_to_the_labels_it_is_mixed_into() -> None:
    targets = class_targets(torch.tensor([2, -100, 0]), 4)
    assert targets.tolist() == [[0, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    for step in range(20):
        batch = FeatureBatch(torch.zeros(3, 5, 1), targets, 1, (2, 2))
        mixed = Mixup(1.0)(batch, step_generator(0, step)).targets
        assert mixed.sum() == pytest.approx(2)
        assert (mixed[:, [1, 3]] == 0).all()


# ---- What is refused ----


def test_parsing() -> None:
    assert parse_feature_augmentation(" mixup:0.2, brightness : 0.1") == (Mixup(0.2), Brightness(0.1))
    (config,) = HfArgumentParser(CacheConfig).parse_args_into_dataclasses(["--feature_augmentation", "cutmix:1"])
    assert parse_feature_augmentation(config.feature_augmentation) == (CutMix(1.0),)
    assert CacheConfig().feature_augmentation is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cutmixx:1", r"'cutmixx' is unknown; known are \['brightness', 'cutmix', .*'token_flip'\]"),
        ("brightness", "'brightness' is no name:number pair.*None turns it off"),
        ("brightness:0.1,", "'' is no name:number pair"),
        ("", "'' is no name:number pair"),
        ("mixup:many", "'mixup:many' is no name:number pair"),
        ("mixup:nan", "'mixup:nan' is no name:number pair"),
        ("mixup:inf", "no name:number pair"),
        ("mixup:0", "Mixup: alpha must be a number above 0 and at most 1e\\+06, got 0.0"),
        ("cutmix:-1", "alpha must be a number above 0"),
        ("token_flip:1.5", "TokenFlip: probability must be a number above 0 and at most 1, got 1.5"),
        ("token_dropout:0", "TokenDropout: probability must be"),
        ("brightness:2", "Brightness: strength must be .* leave this augmentation out"),
        ("token_flip:0.5,token_flip:0.5", "'token_flip' is given twice"),
        ("mixup:0.2,brightness:0.1,cutmix:1", "mixup and cutmix both mix samples.*Keep one"),
    ],
)
def test_what_cannot_be_parsed_is_refused(text, message) -> None:
    with pytest.raises(UnsupportedSetupError, match=message):
        parse_feature_augmentation(text)


def test_batches_of_other_shapes_are_refused() -> None:
    with pytest.raises(DataError, match=r"1 prefix tokens and 2 x 3 patches, found shape \(2, 8, 4\)"):
        FeatureBatch(torch.zeros(2, 8, 4), None, 1, (2, 3))
    with pytest.raises(DataError, match=r"\(2, classes\), found \(3, 4\)"):
        FeatureBatch(torch.zeros(2, 7, 4), torch.zeros(3, 4), 1, (2, 3))
    with pytest.raises(DataError, match="no targets"):
        Mixup(1.0)(FeatureBatch(torch.zeros(2, 7, 4), None, 1, (2, 3)), step_generator(0, 0))


def test_without_a_grid_only_mixup_works() -> None:
    arguments = (torch.randn(2, 17, 3), torch.tensor([0, 1]), (0, (1, 17)), step_generator(0, 0))
    FeatureAugmenter((Mixup(1.0),), 4).augment(*arguments)
    with pytest.raises(UnsupportedSetupError, match=r"Brightness must know which tokens are patches.*17 tokens"):
        FeatureAugmenter((Brightness(0.1), Mixup(1.0)), 4).augment(*arguments)


class OwnLoss(FreezeCacheTrainer):
    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs)


def test_setups_that_cannot_mix_are_refused_at_construction(train_dataset) -> None:
    def make(text="mixup:0.2", mode="always", model=None, **settings):
        return make_trainer(
            model or tiny_vit(), train_dataset, cache={"feature_augmentation": text, "mode": mode}, **settings
        )

    regression = tiny_vit()
    regression.config.problem_type = "regression"
    with pytest.raises(UnsupportedSetupError, match=r"'mixup:0.2' acts in cached stages, but mode='never'"):
        make(mode="never")
    with pytest.raises(UnsupportedSetupError, match="'blur' is unknown"):
        make("blur:1")
    with pytest.raises(UnsupportedSetupError, match="labels are no classes"):
        make(model=regression)
    with pytest.raises(UnsupportedSetupError, match=r"the loss that OwnLoss.compute_loss computes"):
        make(cls=OwnLoss)
    with pytest.raises(UnsupportedSetupError, match="the loss that compute_loss_func computes"):
        make(trainer={"compute_loss_func": lambda *args, **kwargs: None})
    make("brightness:0.1", cls=OwnLoss, trainer={"compute_loss_func": lambda *args, **kwargs: None})
    make("brightness:0.1", model=regression)


def test_a_model_with_a_loss_of_its_own_is_refused_before_a_cache_is_built(train_dataset) -> None:
    model = tiny_vit()
    model.loss_function = lambda labels, logits, config, **kwargs: 1.1 * fixed_cross_entropy(logits, labels)
    trainer = make_trainer(model, train_dataset, cache={"feature_augmentation": "mixup:0.2"})
    with pytest.raises(UnsupportedSetupError, match="the model's own is another"):
        trainer.train()
    assert not Path("caches").exists()


@pytest.mark.parametrize("schedule", [None, "0:0"])
def test_a_warning_says_that_it_never_acts(images, schedule, caplog) -> None:
    plain = images.with_transform(TinyTransform(augment=False))
    make_trainer(tiny_vit(), plain, schedule=schedule, cache={"feature_augmentation": "mixup:0.2"})
    assert "feature_augmentation acts on cached stages only" in caplog.text


@pytest.mark.slow
def test_a_warning_names_what_changes_nothing(train_dataset, caplog) -> None:
    """A ViT adds positions before block 0, and reads CLS."""
    text = "token_flip:0.1,token_dropout:0.01,brightness:0.01"
    run(train_dataset, text, num_train_epochs=1, bf16=True)
    assert "TokenFlip changes nothing that ViTForImageClassification computes behind 1 frozen blocks" in caplog.text
    assert caplog.text.count("changes nothing") == 1
    caplog.clear()
    run(train_dataset, text, num_train_epochs=1, schedule="0:4")
    assert caplog.text.count("changes nothing") == 3
    caplog.clear()
    beit_run(train_dataset, text)
    assert "changes nothing" not in caplog.text


# ---- Training ----


@dataclass(frozen=True)
class Unchanged(FeatureAugmentation):
    """Says that it mixes, and does not."""

    mixes: ClassVar[bool] = True
    number: float

    def __call__(self, batch, generator):
        return batch


@dataclass(frozen=True)
class Doubled(FeatureAugmentation):
    number: float

    def __call__(self, batch, generator):
        return batch.with_patches(batch.patches * 2)


def run(train_dataset, text=None, model=None, resume=None, **settings):
    cache = {"feature_augmentation": text, **settings.pop("cache", {})}
    settings = {"schedule": "0:1", "num_train_epochs": 2, **settings}
    trainer = make_trainer(model or tiny_vit(), train_dataset, cache=cache, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def beit_run(train_dataset, text):
    model = tiny_model("beit", use_relative_position_bias=True)
    return run(train_dataset, text, model, num_train_epochs=1, schedule="0:2")


class PartlyLabelled(TinyTransform):
    def __call__(self, batch):
        return {**super().__call__(batch), "labels": [-100 if label == 3 else label for label in batch["label"]]}


def deaf_vit():
    """A model to whose loss ``num_items_in_batch`` is not passed."""
    model = tiny_vit()
    model.accepts_loss_kwargs = False
    return model


@pytest.mark.by_default(1)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 2, "model": deaf_vit},
        {"gradient_accumulation_steps": 3, "transform": PartlyLabelled, "per_device_train_batch_size": 7},
        {"gradient_accumulation_steps": 2, "label_smoothing_factor": 0.1, "bf16": True},
    ],
    ids=["plain", "no-loss-kwargs", "ragged-unlabelled", "smoothing-bf16"],
)
@pytest.mark.slow
def test_training_on_unmixed_soft_labels_is_training_on_hard_ones(images, settings, monkeypatch) -> None:
    """Losses, and parameters after plain gradient steps; 5 or 8 batches leave the last accumulation incomplete."""
    monkeypatch.setitem(FEATURE_AUGMENTATIONS, "unchanged", Unchanged)
    settings = {"optim": "sgd", "learning_rate": 0.1, "num_train_epochs": 1, **settings}
    make, transform = settings.pop("model", tiny_vit), settings.pop("transform", TinyTransform)
    dataset = images.with_transform(transform(augment=True))
    hard = run(dataset, None, make(), **settings)
    soft = run(dataset, "unchanged:1", make(), **settings)
    assert len(hard.losses) in (5, 8)
    torch.testing.assert_close(torch.tensor(soft.losses), torch.tensor(hard.losses), rtol=1e-5, atol=1e-6)
    after = parameters_of(soft.model)
    for name, expected in parameters_of(hard.model).items():
        torch.testing.assert_close(after[name], expected, rtol=1e-4, atol=1e-6, msg=name)
    logged = [[e["grad_norm"] for e in t.state.log_history if "grad_norm" in e] for t in (soft, hard)]
    torch.testing.assert_close(*map(torch.tensor, logged), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_training_with_each_is_repeatable_and_differs(train_dataset) -> None:
    # Relative positions in each block: a plain ViT takes patches in any order.
    run_once = functools.partial(beit_run, train_dataset)
    runs = {text: run_once(text) for text in (None, *(f"{name}:{EACH[name]}" for name in EACH))}
    both = run_once("brightness:0.2,mixup:0.4")
    losses = [tuple(trainer.losses) for trainer in (*runs.values(), both)]
    assert all(len(values) == 5 and torch.tensor(values).isfinite().all() for values in losses)
    assert len(set(losses)) == len(losses)
    # One cache serves them all.
    assert len(list(Path("caches").glob("k*"))) == 1
    again = run_once("brightness:0.2,mixup:0.4")
    assert again.losses == both.losses
    assert_same(parameters_of(again.model), parameters_of(both.model))


def test_states_reach_the_suffix_changed(train_dataset, monkeypatch) -> None:
    """The tokens that block 1 sees: CLS as it was stored, patches doubled, in training only."""
    monkeypatch.setitem(FEATURE_AUGMENTATIONS, "doubled", Doubled)
    seen: dict[str | None, list[torch.Tensor]] = {None: [], "doubled:1": []}
    for text, states in seen.items():
        model = tiny_vit()

        def look(block, args, states=states):
            if block.training and len(args[0]) > 2:  # two rows are rehearsed
                states.append(args[0].detach().clone())

        find_blocks(model)[1][1].register_forward_pre_hook(look)
        run(train_dataset, text, model, num_train_epochs=1)
    plain, doubled = (torch.cat(states) for states in seen.values())
    assert plain.shape == (50, 17, 16)
    assert torch.equal(doubled[:, :1], plain[:, :1])
    assert torch.equal(doubled[:, 1:], plain[:, 1:] * 2)


@pytest.mark.slow
def test_resume_is_bit_identical(train_dataset) -> None:
    """Five batches an epoch, two a step: every checkpoint, also behind an incomplete step."""
    make = functools.partial(
        run, train_dataset, "token_dropout:0.2,mixup:1", gradient_accumulation_steps=2, save_steps=1
    )
    whole = make(save_strategy="steps")
    assert whole.state.global_step == 6
    for step in (3, 5):
        torch.manual_seed(99)
        again = make(model=tiny_vit(initializer_range=0.5), resume=f"out/checkpoint-{step}", output_dir="again")
        assert again.losses == whole.losses[len(whole.losses) - len(again.losses) :], step
        assert_same(parameters_of(again.model), parameters_of(whole.model))


def test_batches_of_one_optimizer_step_are_told_apart() -> None:
    states, labels = torch.randn(4, 5, 2), torch.arange(4)
    augmenter = FeatureAugmenter((Mixup(1.0),), 4, seed=1)
    drawn = [augmenter.step(states, labels, (1, (2, 2)), step) for step in (0, 0, 1, 1)]
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])
    resumed = FeatureAugmenter((Mixup(1.0),), 4, seed=1)
    assert torch.equal(resumed.step(states, labels, (1, (2, 2)), 1), drawn[2])


@pytest.mark.slow
def test_live_stages_and_evaluation_see_no_augmentation(train_dataset, eval_dataset) -> None:
    settings = {"schedule": "0:0,1:1", "eval_dataset": eval_dataset, "eval_strategy": "epoch"}
    plain, mixed = run(train_dataset, **settings), run(train_dataset, "mixup:1", **settings)
    assert mixed.losses[:5] == plain.losses[:5]
    assert mixed.losses[5] != plain.losses[5]
    evaluated = [[e["eval_loss"] for e in t.state.log_history if "eval_loss" in e] for t in (plain, mixed)]
    assert evaluated[0][0] == evaluated[1][0]
    model = mixed.model.eval()
    with torch.no_grad():
        logits = model(pixel_values=torch.stack([row["pixel_values"] for row in eval_dataset])).logits
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([row["labels"] for row in eval_dataset]))
    assert evaluated[1][1] == pytest.approx(expected.item(), rel=1e-5)
    assert model.config.problem_type == "single_label_classification"
    assert mixed.compute_loss_func is None


def test_a_step_that_fails_leaves_no_soft_labels_behind(train_dataset, eval_dataset) -> None:
    class Failing(Recorder):
        def log(self, logs, *args, **kwargs):
            super().log(logs, *args, **kwargs)
            if "loss" in logs:
                self.model.classifier.forward = None  # the next step fails inside the model

    trainer = make_trainer(
        tiny_vit(), train_dataset, eval_dataset, cache={"feature_augmentation": "cutmix:1"}, cls=Failing
    )
    with pytest.raises(TypeError):
        trainer.train()
    del trainer.model.classifier.forward
    assert trainer.compute_loss_func is None
    assert trainer.evaluate()["eval_loss"] > 0
