"""What of a model's configuration its prefix depends on."""

from __future__ import annotations

import pytest
from transformers import BeitConfig, CLIPConfig, ViTConfig

from hf_freezecache.model.hashing import hash_config

NO_MATTER = {
    "hidden_dropout_prob": 0.5,
    "attention_probs_dropout_prob": 0.5,
    "classifier_dropout": 0.5,
    "output_hidden_states": True,
    "output_attentions": True,
    "return_dict": False,
    "num_labels": 7,
    "initializer_range": 1.0,
}


@pytest.mark.parametrize("name", NO_MATTER)
def test_what_acts_in_train_mode_or_behind_the_blocks_does_not_matter(name) -> None:
    assert hash_config(ViTConfig(**{name: NO_MATTER[name]})) == hash_config(ViTConfig())


@pytest.mark.parametrize("change", [{"layer_norm_eps": 1e-3}, {"hidden_act": "relu"}, {"image_size": 32}])
def test_what_the_blocks_compute_with_matters(change) -> None:
    assert hash_config(ViTConfig(**change)) != hash_config(ViTConfig())


def test_configurations_inside_a_configuration_are_looked_into() -> None:
    plain = hash_config(CLIPConfig(vision_config={}, text_config={}))
    assert hash_config(CLIPConfig(vision_config={"attention_dropout": 0.3}, text_config={})) == plain
    assert hash_config(CLIPConfig(vision_config={"layer_norm_eps": 0.3}, text_config={})) != plain
    assert hash_config(BeitConfig(drop_path_rate=0.9)) == hash_config(BeitConfig(drop_path_rate=0.0))
    assert hash_config(None) == "none"
