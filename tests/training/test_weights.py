"""Weights of a checkpoint go back into the live model to the bit, however the user has changed it."""

from __future__ import annotations

import json
import logging
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.parity import assert_same, parameters_of
from support.tiny import FAMILIES, make_trainer, tiny_model, tiny_vit
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedModel,
    TrainerCallback,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.core_model_loading import WeightRenaming

from hf_freezecache.errors import UnsupportedSetupError
from hf_freezecache.training.weights import check_saving, restore_weights


def head_of(model: PreTrainedModel) -> nn.Module:
    return model.get_submodule("classifier")


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 1)


def sequential_head(model: PreTrainedModel) -> PreTrainedModel:
    width = head_of(model).in_features
    model.classifier = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 8), nn.GELU(), nn.Linear(8, 4))
    return model


def head_named_like_blocks(model: PreTrainedModel) -> PreTrainedModel:
    """Saving renames its parts as it renames those of blocks."""
    width = head_of(model).in_features
    mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(width, 8), fc2=nn.Linear(8, 4)))
    model.classifier = nn.Sequential(OrderedDict(mlp=mlp))
    return model


def fewer_blocks(model: PreTrainedModel) -> PreTrainedModel:
    del blocks_of(model)[-1]
    return model


def added_parameters(model: PreTrainedModel) -> PreTrainedModel:
    model.temperature = nn.Parameter(torch.tensor([2.0]))
    model.register_buffer("seen", torch.arange(3))
    blocks_of(model)[0].gate = nn.Parameter(torch.ones(2))
    model.layers = nn.ModuleList([nn.BatchNorm1d(3)])
    return model


def lora_inside(model: PreTrainedModel) -> PreTrainedModel:
    peft = pytest.importorskip("peft")
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False), model)
    return model


CHANGES = [lambda model: model, sequential_head, head_named_like_blocks, fewer_blocks, added_parameters, lora_inside]
CHANGE_IDS = [
    "as-it-is",
    "sequential-head",
    "head-named-like-blocks",
    "fewer-blocks",
    "added-parameters",
    "lora-inside",
]


def values_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def scramble(model: nn.Module) -> None:
    with torch.no_grad():
        for value in model.state_dict().values():
            value.copy_(torch.rand(value.shape) * 9 + 3)


def check_restored(model: nn.Module, folder: Path) -> None:
    """Scramble a model that was saved: its weights come back to the bit, and it still is the same object."""
    before, identities = values_of(model), [id(parameter) for parameter in model.parameters()]
    check_saving(model)
    scramble(model)
    assert restore_weights(folder, model, strict=True)
    assert_same(values_of(model), before)
    assert [id(parameter) for parameter in model.parameters()] == identities


def swin() -> PreTrainedModel:
    config = AutoConfig.for_model("swin", image_size=16, patch_size=2, embed_dim=8, depths=[1, 2], num_heads=[1, 2])
    config.num_labels, config.window_size = 4, 4
    return AutoModelForImageClassification.from_config(config)


def gated_dinov2() -> PreTrainedModel:
    """Its two projections are one in the file."""
    return tiny_model("dinov2", use_swiglu_ffn=True)


MODELS = {**{family: (lambda family=family: tiny_model(family)) for family in FAMILIES}}
MODELS |= {"swin": swin, "dinov2-gated": gated_dinov2}


@pytest.mark.by_default(8)
@pytest.mark.parametrize("change", CHANGES, ids=CHANGE_IDS)
@pytest.mark.parametrize("name", MODELS)
def test_a_changed_model_of_each_family_is_restored(name, change, tmp_path: Path, caplog) -> None:
    model = change(MODELS[name]())
    model.save_pretrained(tmp_path)
    check_restored(model, tmp_path)
    assert "lacks" not in caplog.text
    assert "belong to no weight" not in caplog.text


@pytest.mark.parametrize("change", [sequential_head, lora_inside], ids=["sequential-head", "lora-inside"])
def test_projections_that_are_one_in_the_file_are_taken_apart(change, tmp_path: Path) -> None:
    model = change(gated_dinov2()) if change is sequential_head else gated_dinov2()
    model.save_pretrained(tmp_path)
    assert any("weights_in" in name for name in load_file(tmp_path / "model.safetensors"))
    check_restored(model, tmp_path)


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("sharded", [False, True], ids=["one-file", "shards"])
def test_all_kinds_of_files_are_read(sharded, pickled, tmp_path: Path) -> None:
    model = sequential_head(tiny_vit())
    model.save_pretrained(tmp_path, **({"max_shard_size": "20KB"} if sharded else {}))
    files = sorted(tmp_path.glob("model*.safetensors"))
    assert (len(files) > 1) == sharded
    if pickled:
        for path in files:
            torch.save(load_file(path), tmp_path / f"pytorch_{path.name}".replace(".safetensors", ".bin"))
            path.unlink()
        if sharded:
            index = tmp_path / "model.safetensors.index.json"
            (tmp_path / "pytorch_model.bin.index.json").write_text(
                index.read_text().replace('"model', '"pytorch_model').replace(".safetensors", ".bin")
            )
            index.unlink()
    check_restored(model, tmp_path)


class Own(ViTForImageClassification):
    """A class of the user's, with arguments of its own."""

    def __init__(self, config: ViTConfig, width: int) -> None:
        super().__init__(config)
        self.neck = nn.Linear(config.hidden_size, width)
        self.classifier = nn.Linear(width, config.num_labels)


class Nested(PreTrainedModel):
    """A model inside another, under another prefix, with a head that is tied to a projection."""

    config_class = ViTConfig
    base_model_prefix = "body"
    _tied_weights_keys = {"head.weight": "projection.weight"}  # noqa: RUF012

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(config)
        self.backbone = tiny_vit()
        self.projection = nn.Linear(3, 5, bias=False)
        self.head = nn.Linear(3, 5)
        self.head.weight = self.projection.weight
        self.post_init()


@pytest.mark.parametrize(
    "make",
    [lambda: Own(tiny_vit().config, 7), lambda: Nested(ViTConfig()), lambda: tiny_vit().half()],
    ids=["own-arguments", "nested-and-tied", "half"],
)
def test_models_of_the_users_own_are_restored(make, tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    check_restored(model, tmp_path)


def test_a_loaded_model_and_a_new_one_restore_each_others_checkpoints(tmp_path: Path) -> None:
    """What ``save_pretrained`` renames depends on the names of the file that a model was loaded from."""
    new = sequential_head(tiny_vit())
    new.save_pretrained(tmp_path / "legacy")
    today = values_of(tiny_vit())
    save_file(today, tmp_path / "today.safetensors", metadata={"format": "pt"})
    loaded = ViTForImageClassification.from_pretrained(None, config=new.config, state_dict=today)
    sequential_head(loaded)
    loaded.save_pretrained(tmp_path / "names-of-today")
    names = [load_file(tmp_path / folder / "model.safetensors").keys() for folder in ("legacy", "names-of-today")]
    assert (names[0] != names[1]) == (names[0] != new.state_dict().keys())  # transformers 5.4 knows one kind of names
    for model, folder in ((new, "names-of-today"), (loaded, "legacy")):
        other = loaded if model is new else new
        expected = values_of(other)
        scramble(model)
        assert restore_weights(tmp_path / folder, model, strict=True)
        assert_same(values_of(model), expected)


def test_a_file_without_the_base_models_prefix_is_read(tmp_path: Path) -> None:
    model = tiny_vit()
    expected = values_of(model)
    tensors = {name.removeprefix("vit."): value for name, value in expected.items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    scramble(model)
    assert restore_weights(tmp_path, model, strict=True)
    assert_same(values_of(model), expected)


def test_an_adapter_that_was_added_is_restored(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_vit()
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    before = values_of(model)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if "lora" in name:
                value.mul_(3)
    assert restore_weights(tmp_path, model)
    assert_same(values_of(model), before)


@pytest.mark.parametrize("strict", [False, True])
def test_weights_that_a_checkpoint_lacks_are_named(strict, tmp_path: Path, caplog) -> None:
    model = tiny_vit()
    model._weight_conversions = [WeightRenaming("older.embeddings", "vit.embeddings")]  # Trainer's way restores less
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["vit.layernorm.bias"]
    save_file({**tensors, "left.over": torch.ones(1)}, path, metadata={"format": "pt"})
    expected = values_of(model)
    scramble(model)
    if strict:
        with pytest.raises(
            UnsupportedSetupError, match=r"does not hold the weights of this ViTForImageC.*vit\.layernorm\.bias"
        ):
            restore_weights(tmp_path, model, strict=True)
        return
    expected["vit.layernorm.bias"] = model.vit.layernorm.bias.clone()
    assert restore_weights(tmp_path, model)
    assert (
        "lacks 1 weights of this ViTForImageClassification, which keep their values: vit.layernorm.bias" in caplog.text
    )
    assert "1 tensors of checkpoint" in caplog.text
    assert_same(values_of(model), expected)


def test_what_trainer_restores_as_well_is_left_to_it(tmp_path: Path) -> None:
    assert not restore_weights(tmp_path, nn.Linear(2, 2))
    assert not restore_weights(tmp_path, tiny_vit())
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    assert not restore_weights(tmp_path, tiny_vit())
    save_file({"other": torch.ones(2)}, tmp_path / "model.safetensors")
    assert not restore_weights(tmp_path, tiny_vit())


class _Colliding(nn.Module):
    """Two of its weights get one name when they are saved."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.fc1 = nn.Linear(2, 2)
        self.intermediate = nn.Module()
        self.intermediate.dense = nn.Linear(2, 2)


def test_weights_that_would_be_lost_in_a_checkpoint_are_named_before(caplog) -> None:
    model = tiny_vit()
    check_saving(model)
    assert not caplog.records
    model._weight_conversions = [WeightRenaming("intermediate.dense", "mlp.fc1")]
    model.vit.extra = _Colliding()
    check_saving(model)
    assert "will lack 2 of its weights" in caplog.text
    assert "vit.extra." in caplog.text


def test_a_model_that_cannot_be_saved_is_refused_before_training(train_dataset) -> None:
    model = tiny_vit()
    first, second, *_ = blocks_of(model)
    second.layernorm_before.weight = first.layernorm_before.weight  # tied, and not declared
    with pytest.raises(UnsupportedSetupError, match=r"cannot be named as in a checkpoint: RuntimeError.*shared"):
        make_trainer(model, train_dataset, save_strategy="epoch").train()
    assert not list(Path("caches").glob("k*"))
    check_saving(nn.Linear(2, 2))


class ScaleHead(TrainerCallback):
    """Makes the second epoch the best, and the weights behind it others."""

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        metrics["eval_score"] = {1: 0.2, 2: 0.9}.get(round(state.epoch), 0.1)


@pytest.mark.by_default(1)
@pytest.mark.parametrize("schedule", ["0:1,2:3", None], ids=["freezing", "plain"])
def test_the_best_model_and_a_resume_of_a_changed_model(schedule, train_dataset, eval_dataset) -> None:
    def make(**settings):
        callbacks = {"callbacks": [ScaleHead()]}
        settings = {"save_strategy": "epoch", "eval_strategy": "epoch", "num_train_epochs": 3, **settings}
        return make_trainer(
            sequential_head(tiny_vit()), train_dataset, eval_dataset, schedule=schedule, trainer=callbacks, **settings
        )

    whole = make(load_best_model_at_end=True, metric_for_best_model="score")
    whole.train()
    assert whole.state.best_model_checkpoint.endswith("checkpoint-10")
    best = parameters_of(whole.model)
    saved = sequential_head(tiny_vit())
    assert restore_weights(Path("out/checkpoint-10"), saved, strict=True)
    assert_same(best, parameters_of(saved))
    assert restore_weights(Path("out/checkpoint-15"), saved, strict=True)
    last = parameters_of(saved)
    assert not torch.equal(last["classifier.1.weight"], best["classifier.1.weight"])
    resumed = make(output_dir="again")
    scramble(resumed.model)
    resumed.train(resume_from_checkpoint="out/checkpoint-10")
    assert_same(parameters_of(resumed.model), last)


@pytest.mark.by_default(2)
@pytest.mark.parametrize(
    ("saved", "opened", "expected"),
    [
        (
            "0:2",
            None,
            "saved by a run with freeze_config, in its stage 0, which began with epoch 0 and freezes 2 blocks",
        ),
        ("0:0", None, "in its stage 0, which began with epoch 0 and freezes 0 blocks"),
        (None, "0:0", "taking it for a checkpoint of plain training"),
    ],
)
@pytest.mark.by_default(1)
def test_a_checkpoint_of_the_other_kind_says_so_once(saved, opened, expected, train_dataset, caplog) -> None:
    settings = {"save_strategy": "epoch", "num_train_epochs": 2}
    make_trainer(tiny_vit(), train_dataset, schedule=saved, **settings).train()
    caplog.clear()
    caplog.set_level(logging.WARNING)
    other = make_trainer(tiny_vit(), train_dataset, schedule=opened, **settings)
    if saved == "0:2":  # Trainer's own error follows
        with pytest.raises(ValueError, match="parameter group"):
            other.train(resume_from_checkpoint="out/checkpoint-5")
    else:
        other.train(resume_from_checkpoint="out/checkpoint-5")
    said = [record.getMessage() for record in caplog.records if expected in record.getMessage()]
    assert len(said) == 1
    assert ("The saved optimizer has no frozen blocks" in said[0]) == (saved == "0:2")


@pytest.mark.slow
def test_a_stage_that_cannot_be_read_stops_only_a_run_that_freezes(train_dataset, caplog) -> None:
    settings = {"save_strategy": "epoch", "num_train_epochs": 2, "schedule": "0:0"}
    make_trainer(tiny_vit(), train_dataset, **settings).train()
    path = Path("out/checkpoint-5/freezecache_state.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 99}))
    with pytest.raises(UnsupportedSetupError, match="format version 99"):
        make_trainer(tiny_vit(), train_dataset, **settings).train(resume_from_checkpoint="out/checkpoint-5")
    plain = make_trainer(tiny_vit(), train_dataset, **{**settings, "schedule": None})
    plain.train(resume_from_checkpoint="out/checkpoint-5")
    assert "and this run has none" in caplog.text
