"""Learning rates by layer and by stage: with optimizers and schedulers of anybody's, to the bit over a resume."""

from __future__ import annotations

import math
import re
from functools import partial
from typing import Any

import pytest
import torch
from support.parity import assert_same, parameters_of
from support.tiny import NUM_CLASSES, Recorder, make_trainer, tiny_model, tiny_vit
from torch.optim import SGD, AdamW
from torch.optim import lr_scheduler as torch_schedulers
from transformers import get_scheduler
from transformers.optimization import Adafactor, get_wsd_schedule
from transformers.trainer_utils import SchedulerType

from hf_freezecache import FreezeConfig
from hf_freezecache.errors import UnsupportedModelError, UnsupportedSetupError
from hf_freezecache.model.split import Splits, find_blocks
from hf_freezecache.training import lr_rule
from hf_freezecache.training.freezer import Freezer
from hf_freezecache.training.learning_rates import LearningRates, layers_of

#: The layers of a model of 4 blocks are 0 to 5.
HEAD = 5


def expected_layer(name: str) -> int:
    """The layer of a parameter by its name, as the recipes of BEiT and MAE have it."""
    block = re.search(r"\blayers?\.(\d+)\.", name)
    if block is not None:
        return int(block[1]) + 1
    return 0 if "embeddings" in name or "pre_layrnorm" in name else HEAD


def rates_of(model: Any, optimizer: Any) -> dict[str, float]:
    """The rate of each parameter."""
    rates = {p: float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
    return {name: rates[p] for name, p in model.named_parameters() if p in rates}


def prepare(model: Any, optimizer: Any, scheduler: Any = None, decay: float | None = 0.5, **settings: Any) -> None:
    LearningRates(decay, **settings).prepare(Splits(model), optimizer, scheduler, Freezer())


def trainer_of(dataset: Any, freeze: dict[str, Any], model: Any = None, cls: Any = Recorder, **settings: Any) -> Any:
    """A trainer with more settings of freezing than a schedule."""

    def make(**arguments: Any) -> Any:
        return cls(**{**arguments, "freeze_config": FreezeConfig(**freeze)})

    model = None if "model_init" in settings.get("trainer", {}) else model or tiny_vit()
    return make_trainer(model, dataset, cls=make, **{"num_train_epochs": 1, **settings})


def two_groups(model: Any, **settings: Any) -> Any:
    """An optimizer with one rate for the backbone and another for the head, the backbone first."""
    head = list(model.classifier.parameters())
    backbone = [p for p in model.parameters() if all(p is not other for other in head)]
    groups = [{"params": backbone, "lr": 1e-3, "weight_decay": 0.1}, {"params": head, "lr": 1e-2, "betas": (0.8, 0.9)}]
    return AdamW(groups, **{"weight_decay": 0.0, **settings})


# ---- Layers ----


@pytest.mark.parametrize(
    "family", ["vit", "beit", "clip", "dinov2_with_registers", "siglip", "deit", "data2vec-vision"]
)
@pytest.mark.by_default(4)
def test_each_layer_has_its_rate(family) -> None:
    model = tiny_model(family)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    prepare(model, optimizer)
    rates = rates_of(model, optimizer)
    assert len(rates) == len(list(model.parameters()))
    seen = {expected_layer(name) for name in rates if "text" not in name}
    assert seen == set(range(HEAD + 1))
    for name, rate in rates.items():
        if not name.startswith("text_model"):
            assert rate == 1e-2 * 0.5 ** (HEAD - expected_layer(name)), name


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_weights_of_an_adapter_have_the_rates_of_their_blocks() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "query", "value"], modules_to_save=["classifier"])
    model = peft.get_peft_model(tiny_vit(), config)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    prepare(model, optimizer)
    rates = rates_of(model, optimizer)
    assert len(rates) == 4 * 2 * 2 + 2
    for name, rate in rates.items():
        assert rate == 1e-2 * 0.5 ** (HEAD - expected_layer(name)), name


def test_groups_keep_their_options_and_that_of_the_head_comes_first() -> None:
    model = tiny_vit()
    extra = torch.nn.Parameter(torch.zeros(2))  # of a loss, say
    optimizer = two_groups(model)
    optimizer.add_param_group({"params": [extra], "lr": 5.0})
    before = {
        p: {name: value for name, value in group.items() if name not in ("params", "lr")}
        for group in optimizer.param_groups
        for p in group["params"]
    }
    prepare(model, optimizer)
    after = {p: group for group in optimizer.param_groups for p in group["params"]}
    assert before.keys() == after.keys()
    for p, options in before.items():
        assert options.items() <= after[p].items()
    assert (after[extra]["lr"], after[model.classifier.weight]["lr"]) == (5.0, 1e-2)
    assert after[model.vit.layernorm.weight]["lr"] == 1e-3
    layers = [group["freezecache_layer"] for group in optimizer.param_groups]
    assert layers == sorted(layers, reverse=True)
    assert optimizer.param_groups[0]["lr"] == 1e-3  # the first of the user's groups, of the layer of the head
    groups = [list(group["params"]) for group in optimizer.param_groups]
    prepare(model, optimizer)
    assert [list(group["params"]) for group in optimizer.param_groups] == groups  # not again


def test_rates_that_are_tensors_are_those_of_one_layer_each() -> None:
    model = tiny_vit()
    named = torch.__version__ >= "2.6"
    parameters = model.named_parameters() if named else model.parameters()
    optimizer = AdamW(parameters, lr=torch.tensor(0.5), foreach=False)
    prepare(model, optimizer)
    first = optimizer.param_groups[0]["lr"]
    assert rates_of(model, optimizer)["vit.embeddings.cls_token"] == 0.5**HEAD * 0.5
    LearningRates(lr_scale="2").enter(2.0, optimizer, None)
    assert optimizer.param_groups[0]["lr"] is first
    assert float(first) == 1.0
    for group in optimizer.param_groups if named else ():
        assert len(group["param_names"]) == len(group["params"])
        assert all(
            model.get_parameter(name) is p for name, p in zip(group["param_names"], group["params"], strict=True)
        )


def test_optimizers_whose_groups_rule_no_rates_are_refused() -> None:
    model = tiny_vit()
    with pytest.raises(UnsupportedSetupError, match="a group of Adafactor has lr=None"):
        prepare(model, Adafactor(model.parameters()))
    with pytest.raises(UnsupportedSetupError, match="no group of SGD holds a parameter of the model"):
        prepare(model, SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1))

    class Several(SGD):
        @property
        def param_groups(self):
            return [*self.__dict__.get("kept", [])]

        @param_groups.setter
        def param_groups(self, groups):
            self.__dict__["kept"] = groups

        def add_param_group(self, group):
            self.__dict__["kept"].append({**self.defaults, **group})

    with pytest.raises(UnsupportedSetupError, match="made anew when they are read"):
        prepare(model, Several([{"params": list(model.parameters())}], lr=0.1))


def test_a_model_without_blocks_is_refused(train_dataset) -> None:
    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.classifier = torch.nn.Linear(3 * 16 * 16, NUM_CLASSES)

        def forward(self, pixel_values, labels=None):
            return self.classifier(pixel_values.flatten(1))

    with pytest.raises(UnsupportedModelError, match="Plain cannot be split"):
        trainer_of(train_dataset, {"layer_decay": 0.75}, model=Plain())


# ---- Schedulers ----


def two_lambdas(optimizer: Any) -> Any:
    return torch_schedulers.LambdaLR(optimizer, [lambda step: 0.9**step, lambda step: 1 / (1 + step)])


SCHEDULERS: dict[str, Any] = {
    **{
        name: partial(get_scheduler, name, num_warmup_steps=3, num_training_steps=12)
        for name in ("linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt", "polynomial")
    },
    "cosine_with_min_lr": lambda o: get_scheduler(
        "cosine_with_min_lr", o, 2, 12, scheduler_specific_kwargs={"min_lr_rate": 0.1}
    ),
    "wsd": partial(get_wsd_schedule, num_warmup_steps=2, num_decay_steps=5, num_training_steps=12),
    "lambda for each group": two_lambdas,
    "multiplicative": lambda o: torch_schedulers.MultiplicativeLR(o, [lambda step: 0.9, lambda step: 0.8]),
    "step": partial(torch_schedulers.StepLR, step_size=3),
    "multistep": partial(torch_schedulers.MultiStepLR, milestones=[2, 9]),
    "exponential": partial(torch_schedulers.ExponentialLR, gamma=0.9),
    "annealing": partial(torch_schedulers.CosineAnnealingLR, T_max=8),
    "restarts": partial(torch_schedulers.CosineAnnealingWarmRestarts, T_0=4),
    "one cycle": partial(torch_schedulers.OneCycleLR, max_lr=[1.0, 2.0], total_steps=20),
    "cyclic": partial(
        torch_schedulers.CyclicLR, base_lr=[0.1, 0.2], max_lr=[1.0, 2.0], step_size_up=3, cycle_momentum=False
    ),
    "sequential": lambda o: torch_schedulers.SequentialLR(
        o, [torch_schedulers.LinearLR(o, 0.1, total_iters=4), torch_schedulers.ExponentialLR(o, 0.8)], milestones=[4]
    ),
    "chained": lambda o: torch_schedulers.ChainedScheduler([torch_schedulers.LinearLR(o, 0.1), two_lambdas(o)], o),
    "plateau": partial(torch_schedulers.ReduceLROnPlateau, patience=1, min_lr=[0.2, 0.1]),
}
GREEDY = "greedy" in [kind.value for kind in SchedulerType]  # not in the oldest versions
if GREEDY:
    SCHEDULERS["greedy"] = partial(
        get_scheduler, "greedy", num_warmup_steps=0, scheduler_specific_kwargs={"patience": 1, "min_lr": 0.5}
    )


@pytest.mark.parametrize(
    ("name", "wrapped"), [*((name, False) for name in SCHEDULERS), ("cosine", True), ("lambda for each group", True)]
)
@pytest.mark.by_default(8)
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.filterwarnings("ignore:To get the last learning rate")
def test_a_schedule_keeps_its_form(name, wrapped, vit) -> None:
    """Every group has its share of what it would have, in each step, and twice as much once a stage says so."""
    model, splits = vit

    def make() -> tuple[Any, Any]:
        head = list(model.classifier.parameters())
        rest = [p for p in model.parameters() if all(p is not other for other in head)]
        optimizer = SGD([{"params": rest, "lr": 0.5}, {"params": head, "lr": 1.0}], momentum=0.9)
        return optimizer, SCHEDULERS[name](optimizer)

    def step(scheduler: Any, number: int) -> None:
        scheduler.step(*((1.0 - (number % 4 == 1),) if name in ("plateau", "greedy") else ()))

    reference, plain = make()
    optimizer, scheduler = make()
    rates = LearningRates(0.5, "2")
    outer = (_Wrapper(optimizer=optimizer), _Wrapper(scheduler=scheduler)) if wrapped else (optimizer, scheduler)
    rates.prepare(splits, *outer, Freezer())
    layers = layers_of(splits)
    for number in range(11):
        scale = 1.0 if number < 6 else 2.0
        rates.enter(scale, *outer)
        found, expected = rates_of(model, optimizer), rates_of(model, reference)
        for parameter, rate in found.items():
            share = 0.5 ** (HEAD - layers.get(model.get_parameter(parameter), HEAD))
            assert rate == pytest.approx(scale * share * expected[parameter], rel=1e-12, abs=1e-30), (number, parameter)
        assert [float(rate) for rate in scheduler.get_last_lr()] == [group["lr"] for group in optimizer.param_groups]
        step(plain, number)
        step(scheduler, number)


class _Wrapper:
    """As accelerate's wrappers, which have the wrapped object as an attribute."""

    def __init__(self, **held: Any) -> None:
        vars(self).update(held)


@pytest.fixture(scope="module")
def vit() -> tuple[Any, Splits]:
    model = tiny_vit()
    return model, Splits(model)


class Halving(torch_schedulers.LRScheduler):
    def get_lr(self):
        return [base * 0.5**self.last_epoch for base in self.base_lrs]


class Fixed(torch_schedulers.LRScheduler):
    def get_lr(self):
        return [0.1] * len(self.optimizer.param_groups)


class Shares(Halving):
    def __init__(self, optimizer, shares):
        self.shares = shares
        super().__init__(optimizer)

    def get_lr(self):
        return [rate * share for rate, share in zip(super().get_lr(), self.shares, strict=True)]


def test_a_scheduler_of_the_users_own_is_tried() -> None:
    model = tiny_vit()
    optimizer = two_groups(model)
    scheduler = Halving(optimizer)
    prepare(model, optimizer, scheduler)
    expected = rates_of(model, optimizer)
    assert scheduler.last_epoch == 0  # trying it left nothing behind
    optimizer.step()
    scheduler.step()
    assert rates_of(model, optimizer) == {name: rate / 2 for name, rate in expected.items()}
    for make, reason in ((Fixed, "it sets rates of its own"), (partial(Shares, shares=[1.0, 2.0]), "failed with")):
        optimizer = two_groups(model)
        with pytest.raises(UnsupportedSetupError, match=f"cannot be combined with the scheduler .*: .*{reason}"):
            prepare(model, optimizer, make(optimizer))
    optimizer = two_groups(model)
    prepare(model, optimizer, Shares(optimizer, [1.0, 2.0]), decay=None, lr_scale="2")  # the groups stay


# ---- Scales ----


def test_the_rule_rises_with_the_share_of_frozen_blocks() -> None:
    assert [lr_rule.lr_scale(k, 12) for k in (0, 3, 6, 9, 11, 12)] == pytest.approx([1, 1.25, 1.5, 2, 3, 4])
    scales = [lr_rule.lr_scale(k, 24) for k in range(25)]
    assert scales == sorted(scales)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (None, [1, 1, 1, 1]),
        ("2.5", [1, 2.5, 2.5, 2.5]),
        (2, [1, 2, 2, 2]),
        ("6:1.5,9:2.5", [1, 1, 1.5, 2.5]),
        ("0:0.5, 9:3", [0.5, 0.5, 0.5, 3]),
        ("auto", [1, 1 + 0.5 / 6, 1.5, 2]),
    ],
)
def test_scales_by_split_point(asked, expected) -> None:
    rates = LearningRates.of(FreezeConfig(lr_scale=asked))
    assert [rates.scale_at(k, 12) for k in (0, 1, 6, 9)] == pytest.approx(expected)


# ---- Training ----


def logged(trainer: Any) -> list[float]:
    return [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]


def test_layer_decay_alone_is_plain_training_with_an_optimizer_written_by_hand(train_dataset) -> None:
    settings = {"weight_decay": 0.1, "lr_scheduler_type": "cosine", "warmup_steps": 2, "optim": "adamw_torch"}
    trainer = trainer_of(train_dataset, {"layer_decay": 0.6}, **settings)
    trainer.train()
    model = tiny_vit()
    decayed = trainer.get_decay_parameter_names(model)
    groups = [
        {"params": [p], "lr": 3e-3 * 0.6 ** (HEAD - expected_layer(name)), "weight_decay": 0.1 * (name in decayed)}
        for name, p in model.named_parameters()
    ]
    by_hand = trainer_of(train_dataset, {}, model=model, trainer={"optimizers": (AdamW(groups), None)}, **settings)
    by_hand.train()
    assert trainer.losses == by_hand.losses
    assert_same(parameters_of(trainer.model), parameters_of(model))
    assert len(trainer.losses) == 5
    assert logged(trainer)[2] == pytest.approx(3e-3)  # that of the head


STAGES = {"schedule": "0:0,1:1,2:3", "layer_decay": 0.6, "lr_scale": "1:2,3:5"}


def test_stages_scale_the_rates_and_a_resume_is_the_same_to_the_bit(train_dataset) -> None:
    settings = {"num_train_epochs": 3, "save_steps": 2, "save_strategy": "steps", "lr_scheduler_type": "constant"}
    trainer = trainer_of(train_dataset, STAGES, **settings)
    trainer.train()
    assert logged(trainer) == pytest.approx([3e-3] * 5 + [6e-3] * 5 + [15e-3] * 5)
    assert [decision.lr_scale for decision in trainer._record.decisions] == [1, 2, 5]
    scales = [entry["freezecache/lr_scale"] for entry in trainer.state.log_history if "freezecache/lr_scale" in entry]
    assert scales == [1, 2, 5]
    rates = rates_of(trainer.model, trainer.optimizer)
    assert set(map(expected_layer, rates)) == {4, 5}
    blocks = find_blocks(tiny_vit())[0]
    of_block = [rate for name, rate in rates.items() if name.startswith(f"{blocks}.3.")]
    assert of_block == pytest.approx([15e-3 * 0.6] * len(of_block))
    assert of_block
    for step in (12,):  # others in slow tests
        resumed = trainer_of(train_dataset, STAGES, **settings)
        resumed.train(resume_from_checkpoint=f"out/checkpoint-{step}")
        assert resumed.losses == trainer.losses[step:], step
        assert_same(parameters_of(trainer.model), parameters_of(resumed.model))
        assert rates_of(resumed.model, resumed.optimizer) == rates


@pytest.mark.slow
def test_a_checkpoint_of_another_layer_decay_is_told(train_dataset, caplog) -> None:
    settings = {"num_train_epochs": 2, "save_strategy": "epoch"}
    trainer_of(train_dataset, {"schedule": "0:0,1:2", "layer_decay": 0.5}, **settings).train()
    for decay in (None, 0.6):
        trainer = trainer_of(train_dataset, {"schedule": "0:0,1:2", "layer_decay": decay}, **settings)
        if decay is None:
            with pytest.raises(UnsupportedSetupError, match=r"other groups .* with layer_decay=None: .*Resume with"):
                trainer.train(resume_from_checkpoint="out/checkpoint-5")
        else:
            trainer.train(resume_from_checkpoint="out/checkpoint-5")
            assert "were made with layer_decay=0.5" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cosine", "linear", "reduce_lr_on_plateau", "greedy", "warmup_stable_decay"])
def test_resuming_at_checkpoints_is_the_same_to_the_bit(kind, train_dataset, eval_dataset) -> None:
    settings = {"num_train_epochs": 3, "save_steps": 1, "save_strategy": "steps", "lr_scheduler_type": kind}
    settings |= {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "metric_for_best_model": "loss",
        "eval_dataset": eval_dataset,
    }
    if kind == "warmup_stable_decay":
        settings |= {"warmup_steps": 2, "lr_scheduler_kwargs": {"num_decay_steps": 5}}
    if kind == "greedy":
        if not GREEDY:
            pytest.skip("This version of transformers has no such scheduler.")
        settings["lr_scheduler_kwargs"] = {"patience": 1, "min_lr": 1e-4}
    freeze = {"schedule": "0:0,1:1,2:3", "lr_scale": "auto", "layer_decay": 0.7}
    trainer = trainer_of(train_dataset, freeze, **settings)
    trainer.train()
    for step in (1, 4, 5, 7, 10, 12, 14):
        resumed = trainer_of(train_dataset, freeze, **settings)
        resumed.train(resume_from_checkpoint=f"out/checkpoint-{step}")
        assert resumed.losses == trainer.losses[step:], step
        assert_same(parameters_of(trainer.model), parameters_of(resumed.model))


@pytest.mark.parametrize("scheduled", [False, True], ids=["optimizer", "optimizer-and-scheduler"])
@pytest.mark.slow
def test_a_second_training_with_the_users_own_optimizer(scheduled, train_dataset) -> None:
    def make(freeze: dict[str, Any]) -> Any:
        model = tiny_vit()
        optimizer = two_groups(model)
        scheduler = Halving(optimizer) if scheduled else None
        return trainer_of(
            train_dataset, freeze, model, trainer={"optimizers": (optimizer, scheduler)}, num_train_epochs=2
        )

    freeze = {"schedule": "0:0,1:2", "layer_decay": 0.5, "lr_scale": "3"}
    trainer = make(freeze)
    everything = {id(p) for p in trainer.model.parameters()}
    for training in range(2):
        trainer.train()
        assert set(map(expected_layer, rates_of(trainer.model, trainer.optimizer))) == {3, 4, 5}
        held = [p for group in trainer._freezer._groups for p in group]
        assert {id(p) for p in held} == everything
        assert len(held) == len(everything)
        names = {p: name for name, p in trainer.model.named_parameters()}
        for group in trainer.optimizer.param_groups:
            assert {expected_layer(names[p]) for p in group["params"]} <= {group["freezecache_layer"]}, training
            initial, layer = group["initial_lr"], group["freezecache_layer"]
            assert initial in (pytest.approx(3 * 0.5 ** (HEAD - layer) * base) for base in (1e-3, 1e-2)), training
    steps = 20 if scheduled else 10
    assert trainer.lr_scheduler.last_epoch == steps


def _new_model() -> Any:  # Trainer calls functions with parameters with the trial
    return tiny_vit()


class OwnOptimizer(Recorder):
    """Makes optimizer and scheduler without asking ``Trainer``."""

    def create_optimizer(self, model=None):
        self.optimizer = SGD([p for p in self.model.parameters() if p.requires_grad], lr=0.1)
        return self.optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        self.lr_scheduler = torch_schedulers.LambdaLR(self.optimizer, [lambda step: 1 - step / 100])
        return self.lr_scheduler


@pytest.mark.parametrize("kind", ["own", "class", "model_init"])
@pytest.mark.by_default(1)
def test_whoever_makes_the_optimizer(kind, train_dataset) -> None:
    settings: dict[str, Any] = {"cls": OwnOptimizer} if kind == "own" else {"learning_rate": 0.1, "optim": "sgd"}
    if kind == "class":
        settings = {"trainer": {"optimizer_cls_and_kwargs": (SGD, {"lr": 0.1})}}
    if kind == "model_init":
        settings["trainer"] = {"model_init": _new_model}
    freeze = {"schedule": "0:2", "layer_decay": 0.5, "lr_scale": "3"}
    trainer = trainer_of(train_dataset, freeze, max_grad_norm=0.5, **settings)
    trainer.train()
    group = trainer.optimizer.param_groups[0]
    assert group["initial_lr"] == pytest.approx(0.3)
    rates = rates_of(trainer.model, trainer.optimizer)
    head = rates["classifier.weight"]
    assert rates == {name: pytest.approx(head * 0.5 ** (HEAD - expected_layer(name))) for name in rates}
    assert {expected_layer(name) for name in rates} == {3, 4, 5}


@pytest.mark.slow
def test_nothing_is_touched_unless_it_is_asked_for(train_dataset) -> None:
    trainer = trainer_of(train_dataset, {"schedule": "0:2"})
    trainer.train()
    other = trainer_of(train_dataset, {"schedule": "0:2", "layer_decay": 1.0, "lr_scale": "1"})
    other.train()
    assert len(trainer.optimizer.param_groups) == 2
    assert not any(name.startswith("freezecache") for group in trainer.optimizer.param_groups for name in group)
    assert trainer.losses == other.losses
    assert math.isfinite(trainer.losses[-1])
