"""Settings: what may be given, in Python and on a command line beside Hugging Face's, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional

import pytest
from transformers import HfArgumentParser, TrainingArguments

from hf_freezecache import CacheConfig, FreezeConfig
from hf_freezecache.codecs import make_codec
from hf_freezecache.config import ADVANCED
from hf_freezecache.errors import UnsupportedSetupError

# `HfArgumentParser` takes `Optional[X]` only, on Python 3.10.
# ruff: noqa: UP045

VISIBLE = [
    *("freezecache_dir", "mode", "num_views", "codec", "max_distortion", "bits_per_element", "copies"),
    *("build_from", "feature_augmentation", "cache_eval"),
]


# ---- The folder ----


def test_the_folder_has_two_names_in_python() -> None:
    assert CacheConfig().freezecache_dir == "caches"
    for config in (CacheConfig(cache_dir="a/b"), CacheConfig(freezecache_dir="a/b"), CacheConfig("a/b")):
        assert config.freezecache_dir == config.cache_dir == "a/b"
        assert repr(config).startswith("CacheConfig(freezecache_dir='a/b', mode=")
    assert CacheConfig(cache_dir="a", freezecache_dir="a") == CacheConfig("a")
    assert CacheConfig(cache_dir=Path("a") / "b").freezecache_dir == "a/b"


def test_two_folders_are_refused() -> None:
    for settings in ({"cache_dir": "a", "freezecache_dir": "b"}, {"cache_dir": "caches", "freezecache_dir": "b"}):
        with pytest.raises(
            UnsupportedSetupError, match=r"cache_dir='.*' and freezecache_dir='b' name the same setting"
        ):
            CacheConfig(**settings)


@pytest.mark.parametrize("name", ["cache_dir", "freezecache_dir"])
def test_the_home_folder_is_expanded_and_addresses_are_refused(name) -> None:
    assert CacheConfig(**{name: "~/caches"}).cache_dir == str(Path.home() / "caches")
    with pytest.raises(UnsupportedSetupError, match="'s3://bucket/caches' is an address"):
        CacheConfig(**{name: "s3://bucket/caches"})
    with pytest.raises(UnsupportedSetupError, match="freezecache_dir=3: expected the path of a folder"):
        CacheConfig(**{name: 3})


def test_a_config_can_be_changed_and_copied() -> None:
    config = CacheConfig(cache_dir="~/a", codec="auto")
    folder = str(Path.home() / "a")
    more = dataclasses.replace(config, num_views=2)
    assert (more.cache_dir, more.codec, more.num_views) == (folder, "auto", 2)
    for name in ("cache_dir", "freezecache_dir"):
        other = dataclasses.replace(config, **{name: "b"})
        assert (other.cache_dir, other.freezecache_dir, other.codec) == ("b", "b", "auto")
        assert CacheConfig(**{name: config.cache_dir}).cache_dir == folder
        assert dataclasses.replace(CacheConfig(), **{name: "b"}).cache_dir == "b"
    with pytest.raises(UnsupportedSetupError, match="name the same setting"):
        dataclasses.replace(config, freezecache_dir=CacheConfig("b").cache_dir)
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    assert CacheConfig(**dataclasses.asdict(config)) == config


# ---- Values ----


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"mode": "sometimes"}, "one of ('always', 'auto', 'never')"),
        ({"cache_placement": "nodes"}, "one of ('shared', 'node')"),
        ({"build_from": "never"}, "one of ('auto', 'images', 'previous_cache')"),
        ({"copies": "some"}, "one of ('auto', 'full', 'residual', 'sensitive')"),
        ({"num_views": -1}, "of at least 0"),
        ({"num_views": True}, "expected int"),
        ({"num_views": 2.0}, "expected int"),
        ({"num_views": "2"}, "expected int"),
        ({"num_views": "some"}, "auto"),
        ({"chunk_size": 0}, "of at least 1"),
        ({"shard_chunks": 0}, "of at least 1"),
        ({"shuffle_window": 0}, "of at least 1"),
        ({"memory_gb": -1}, "of at least 0"),
        ({"calibration_samples": 3}, "of at least 4"),
        ({"build_batch_size": 0}, "of at least 1"),
        ({"build_num_workers": -1}, "of at least 0"),
        ({"build_num_workers": "2"}, "expected int"),
        ({"max_distortion": 0.0}, "above 0"),
        ({"max_distortion": float("inf")}, "above 0"),
        ({"max_distortion": float("nan")}, "above 0"),
        ({"max_distortion": "0.1"}, "expected float"),
        ({"lock_timeout": -1}, "of at least 0"),
        ({"lock_timeout": float("inf")}, "of at least 0"),
        ({"gradient_weight": 2}, "of at least 0 and at most 1"),
        ({"gradient_weight": -0.5}, "of at least 0 and at most 1"),
        ({"bits_per_element": [2.5]}, "expected str"),
        ({"view_seed": "a"}, "expected int"),
        ({"transform_id": 5}, "expected str"),
        ({"consume_previous_cache": "yes"}, "expected bool"),
        ({"feature_augmentation": 1}, "expected str"),
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(settings, expected) -> None:
    with pytest.raises(UnsupportedSetupError) as caught:
        CacheConfig(**settings)
    ((name, value),) = settings.items()
    for word in (f"'{name}'", str(float(value) if expected == "of at least 0 and at most 1" else value), expected):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_views": 0}, "num_views=0 draws a new view in every epoch, which no cache can hold: set mode='never'"),
        ({"num_views": 0, "mode": "auto"}, "num_views=0"),
        ({"mode": "never", "feature_augmentation": "mixup:0.2"}, "feature_augmentation='mixup:0.2' acts in cached"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, words) -> None:
    with pytest.raises(UnsupportedSetupError, match=words):
        CacheConfig(**settings)


def test_values_are_taken_as_a_user_writes_them() -> None:
    config = CacheConfig(
        max_distortion=1, lock_timeout=0, gradient_weight=1, bits_per_element=2.5, num_views=0, mode="never"
    )
    assert (config.max_distortion, config.lock_timeout, config.gradient_weight) == (1.0, 0.0, 1.0)
    assert config.bits_per_element == "2.5"
    assert CacheConfig(bits_per_element=3).bits_per_element == "3"
    assert CacheConfig(build_batch_size=1, build_num_workers=0, view_seed=-3).view_seed == -3
    for codec in ("auto", ["transform", "pack", "zstd"], make_codec("int8"), None):
        assert CacheConfig(codec=codec).codec is codec


def test_when_views_are_stored_apart() -> None:
    def apart(**settings: Any) -> bool:
        return CacheConfig(**{"num_views": 3, **settings}).copies_apart

    assert apart(codec="auto")
    assert apart(codec="lossless", copies="residual")
    assert apart(codec="int8", copies="sensitive")
    assert not apart(codec="auto", copies="full")
    assert not apart(codec="auto", num_views=1)
    assert apart(codec="auto", num_views="auto")
    assert not apart(codec="transform")
    assert not apart(codec="lossless")


# ---- Help ----


def test_every_field_has_help_and_few_are_shown_first() -> None:
    named = {setting.name: str(setting.metadata["help"]) for setting in dataclasses.fields(CacheConfig)}
    advanced = [name for name, words in named.items() if words.startswith(ADVANCED)]
    assert list(named) == VISIBLE + advanced
    assert len(advanced) == 15
    document = CacheConfig.__doc__ or ""
    for name, words in named.items():
        assert f"    {name}: {words}" in document
        assert words.endswith(".")


# ---- The command line ----


@dataclass
class ImageModelArguments:
    """Fields of ``run_image_classification.py``."""

    model_name_or_path: str = field(default="google/vit-base-patch16-224-in21k")
    model_type: Optional[str] = None
    config_name: Optional[str] = None
    cache_dir: Optional[str] = None
    model_revision: str = "main"
    image_processor_name: Optional[str] = None
    token: Optional[str] = None
    trust_remote_code: bool = False
    ignore_mismatched_sizes: bool = False


@dataclass
class ImageDataArguments:
    """Fields of ``run_image_classification.py``."""

    dataset_name: Optional[str] = None
    dataset_config_name: Optional[str] = None
    train_dir: Optional[str] = None
    validation_dir: Optional[str] = None
    train_val_split: Optional[float] = 0.15
    max_train_samples: Optional[int] = None
    max_eval_samples: Optional[int] = None
    image_column_name: str = "image"
    label_column_name: str = "label"


@dataclass
class MimModelArguments:
    """Fields of ``run_mim.py`` and ``run_mim_no_trainer.py``."""

    model_name_or_path: Optional[str] = None
    model_type: Optional[str] = None
    config_name_or_path: Optional[str] = None
    config_overrides: Optional[str] = None
    cache_dir: Optional[str] = None
    model_revision: str = "main"
    image_processor_name: Optional[str] = None
    token: Optional[str] = None
    trust_remote_code: bool = False
    image_size: Optional[int] = None
    patch_size: Optional[int] = None
    encoder_stride: Optional[int] = None


@dataclass
class MimDataArguments:
    """Fields of ``run_mim.py``."""

    dataset_name: Optional[str] = None
    dataset_config_name: Optional[str] = None
    image_column_name: Optional[str] = None
    train_dir: Optional[str] = None
    validation_dir: Optional[str] = None
    train_val_split: Optional[float] = 0.15
    mask_patch_size: int = 32
    mask_ratio: float = 0.6
    max_train_samples: Optional[int] = None
    max_eval_samples: Optional[int] = None


@dataclass
class MaeModelArguments:
    """Fields of ``run_mae.py``."""

    model_name_or_path: Optional[str] = None
    config_name: Optional[str] = None
    config_overrides: Optional[str] = None
    cache_dir: Optional[str] = None
    model_revision: str = "main"
    image_processor_name: Optional[str] = None
    token: Optional[str] = None
    trust_remote_code: bool = False
    mask_ratio: float = 0.75
    norm_pix_loss: bool = True


@dataclass
class MaeTrainingArguments(TrainingArguments):
    """Fields of ``run_mae.py``."""

    base_learning_rate: float = 1e-3


@dataclass
class TextModelArguments:
    """Fields of ``run_glue.py`` and ``run_clm.py``."""

    model_name_or_path: Optional[str] = None
    model_type: Optional[str] = None
    config_overrides: Optional[str] = None
    config_name: Optional[str] = None
    tokenizer_name: Optional[str] = None
    cache_dir: Optional[str] = None
    use_fast_tokenizer: bool = True
    model_revision: str = "main"
    token: Optional[str] = None
    trust_remote_code: bool = False
    ignore_mismatched_sizes: bool = False
    torch_dtype: Optional[str] = None
    dtype: Optional[Literal["auto", "bfloat16", "float16", "float32"]] = None
    low_cpu_mem_usage: bool = False


@dataclass
class TextDataArguments:
    """Fields of ``run_glue.py`` and ``run_clm.py``."""

    task_name: Optional[str] = None
    dataset_name: Optional[str] = None
    dataset_config_name: Optional[str] = None
    train_file: Optional[str] = None
    validation_file: Optional[str] = None
    test_file: Optional[str] = None
    max_seq_length: int = 128
    pad_to_max_length: bool = True
    max_train_samples: Optional[int] = None
    max_eval_samples: Optional[int] = None
    max_predict_samples: Optional[int] = None
    streaming: bool = False
    block_size: Optional[int] = None
    overwrite_cache: bool = False
    validation_split_percentage: Optional[int] = 5
    preprocessing_num_workers: Optional[int] = None
    keep_linebreaks: bool = True


SCRIPTS = {
    "image_classification": (ImageModelArguments, ImageDataArguments, TrainingArguments),
    "mim": (MimModelArguments, MimDataArguments, TrainingArguments),
    "mae": (MaeModelArguments, ImageDataArguments, MaeTrainingArguments),
    "text": (TextModelArguments, TextDataArguments, TrainingArguments),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_stand_beside_those_of_example_scripts(script) -> None:
    parser = HfArgumentParser((*SCRIPTS[script], FreezeConfig, CacheConfig))
    arguments = ["--output_dir", "out", "--cache_dir", "downloads", "--freezecache_dir", "states", "--do_train"]
    arguments += ["--schedule", "linear(0.0,0.5,0.75)", "--num_views", "4", "--max_train_samples", "10"]
    model, data, training, freezing, caching = parser.parse_args_into_dataclasses(arguments)
    assert model.cache_dir == "downloads"
    assert data.max_train_samples == 10
    assert (training.output_dir, training.do_train) == ("out", True)
    assert freezing.schedule == "linear(0.0,0.5,0.75)"
    assert (caching.freezecache_dir, caching.cache_dir, caching.num_views) == ("states", "states", 4)
    *_, freezing, caching = parser.parse_args_into_dataclasses(["--output_dir", "out", "--freeze_schedule", "0:6"])
    assert (freezing, caching) == (FreezeConfig(schedule="0:6"), CacheConfig())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"layer_decay": 0}, "expected a number above 0 and at most 1, got 0.0"),
        ({"layer_decay": 1.5}, "expected a number above 0 and at most 1, got 1.5"),
        ({"layer_decay": float("nan")}, "expected a number above 0 and at most 1, got nan"),
        ({"layer_decay": "0.5"}, "'layer_decay'.* expected float, got str"),
        ({"layer_decay": True}, "'layer_decay'.* expected float, got bool"),
        ({"lr_scale": 0}, "lr_scale='0' has the entry '0'; expected 'auto', one number above 0"),
        ({"lr_scale": "fast"}, "expected 'auto'"),
        ({"lr_scale": "6:1.5,9"}, "has the entry '9'"),
        ({"lr_scale": "9:2,6:1"}, "must name rising split points"),
        ({"lr_scale": [2.0]}, "'lr_scale'.* expected str, got list"),
    ],
    ids=str,
)
def test_learning_rates_out_of_range_are_refused(settings, expected) -> None:
    with pytest.raises(UnsupportedSetupError, match=expected):
        FreezeConfig(**settings)


def test_learning_rates_are_flags() -> None:
    (config,) = HfArgumentParser(FreezeConfig).parse_args_into_dataclasses(["--layer_decay", "0.75", "--lr_scale", "2"])
    assert config == FreezeConfig(layer_decay=0.75, lr_scale=2)
    (config,) = HfArgumentParser(FreezeConfig).parse_args_into_dataclasses(["--lr_scale", "6:1.5,9:2"])
    assert config == FreezeConfig(lr_scale="6:1.5,9:2")
    assert dataclasses.replace(config, layer_decay=1).layer_decay == 1.0


def test_every_field_is_a_flag() -> None:
    arguments = {
        "freezecache_dir": "states",
        "mode": "auto",
        "num_views": 3,
        "codec": "transform",
        "max_distortion": 0.5,
        "bits_per_element": "0:4.0,6:2.5",
        "copies": "residual",
        "build_from": "images",
        "feature_augmentation": "mixup:0.2",
        "cache_eval": True,
        "cache_placement": "node",
        "consume_previous_cache": True,
        "offload_prefix": True,
        "gradient_weight": 0.5,
        "calibration_samples": 8,
        "chunk_size": 4,
        "shard_chunks": 5,
        "shuffle_window": 6,
        "memory_gb": 0.5,
        "build_batch_size": 7,
        "build_num_workers": 1,
        "view_seed": 9,
        "transform_id": "t",
        "dataset_id": "d",
        "lock_timeout": 10.0,
    }
    flags = [text for name, value in arguments.items() for text in (f"--{name}", str(value))]
    (parsed,) = HfArgumentParser(CacheConfig).parse_args_into_dataclasses(flags)
    assert dataclasses.asdict(parsed) == arguments
    (parsed,) = HfArgumentParser(CacheConfig).parse_args_into_dataclasses(["--num_views", "auto"])
    assert parsed == CacheConfig(num_views="auto") != CacheConfig()
    assert parsed.chooses_views
    # A parser rewrites the types that it finds in a dataclass; values are checked as before.
    assert CacheConfig(build_batch_size=None, bits_per_element=2.5, build_num_workers=None).bits_per_element == "2.5"
    with pytest.raises(UnsupportedSetupError, match="build_batch_size"):
        CacheConfig(build_batch_size="7")


@pytest.mark.parametrize("flags", [["--mode", "x"], ["--copies", "x"], ["--build_from", "never"], ["--num_views", "x"]])
def test_a_flag_that_cannot_be_read_is_wrong_usage(flags, capsys) -> None:
    with pytest.raises(SystemExit):
        HfArgumentParser(CacheConfig).parse_args_into_dataclasses(flags)
    assert flags[0] in capsys.readouterr().err


# ---- FreezeConfig ----


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "above 0 and at most 1, got 0.0"),
        (1.5, "above 0 and at most 1, got 1.5"),
        (float("nan"), "above 0 and at most 1, got nan"),
        ("0.5", "expected float"),
        (True, "expected float"),
    ],
    ids=str,
)
def test_token_keep_out_of_range_is_refused(value, expected) -> None:
    with pytest.raises(UnsupportedSetupError, match=rf"FreezeConfig: .*'token_keep'.*{expected}"):
        FreezeConfig(token_keep=value)


def test_token_keep_is_off_by_default_and_can_be_parsed() -> None:
    assert (FreezeConfig().token_keep, FreezeConfig(token_keep=1).token_keep) == (None, 1.0)
    (parsed,) = HfArgumentParser(FreezeConfig).parse_args_into_dataclasses(["--token_keep", "0.5"])
    assert parsed == FreezeConfig(token_keep=0.5)
    assert FreezeConfig(schedule={0: 3}) == FreezeConfig(schedule="0:3")
