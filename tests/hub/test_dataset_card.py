"""Cards of cached data sets: they state what they were told, warn, pass the Hub's checks, and hold no placeholder."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
from huggingface_hub import DatasetCard
from support import tiny_cache
from support.hub_client import connect, needs_validation
from support.hub_server import HubServer
from support.tiny import TinyTransform, make_trainer, tiny_vit

from hf_freezecache import CachedDataset
from hf_freezecache.cache.index import load_index
from hf_freezecache.hub.dataset_card import cache_card
from hf_freezecache.hub.provenance import (
    Provenance,
    provenance_of_dataset,
    provenance_of_model,
)

FULL = Provenance(
    "somebody/pictures", "a" * 40, "cc-by-4.0", "somebody/vit", "b" * 40, label_names=("zero", "one", "two")
)
PLACEHOLDER = re.compile(
    r"unknown|(?-i:\bNone\b)|more information needed|\[more|todo|tbd|placeholder|lorem|\.\.\.|\{\w*\}", re.I
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_cache.build(tmp_path_factory.mktemp("plain"), tiny_cache.make_plan(24)).directory


@pytest.fixture(scope="module")
def lossy(tmp_path_factory: pytest.TempPathFactory, images: datasets.Dataset) -> Path:
    """A cache with a calibrated codec and predicted views."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("lossy")
    trainer = make_trainer(
        tiny_vit(),
        images.with_transform(TinyTransform(augment=True)),
        schedule="0:2",
        cache={"cache_dir": str(folder), "num_views": 2, "codec": "auto", "copies": "residual", "max_distortion": 0.1},
        output_dir=str(folder / "out"),
    )
    return Path(trainer.build_cache().reader.directory)


def render(cache: Path, provenance: Provenance | None) -> str:
    return cache_card(cache, load_index(cache), "user/cache", provenance)


@pytest.mark.slow
@needs_validation
@pytest.mark.parametrize(
    "provenance", [None, FULL, Provenance(dataset_name="photos of mine", license="ask the photographer")]
)
@pytest.mark.parametrize("which", ["plain", "lossy"])
def test_cards_pass_the_hubs_validation_and_hold_no_placeholder(
    which, provenance, request, tmp_path, monkeypatch
) -> None:
    cache = request.getfixturevalue(which)
    card = DatasetCard(render(cache, provenance))
    with HubServer(tmp_path / "server") as server:
        connect(server, tmp_path / "home", monkeypatch)
        card.validate()
        with pytest.raises(ValueError, match="license"):
            DatasetCard("---\nlicense: my own\n---\n# x").validate()  # so that the validation itself is seen to work
    assert not PLACEHOLDER.search(card.text), PLACEHOLDER.search(card.text)
    assert card.text.count("```") % 2 == 0
    assert "**Hidden states can reveal the images" in card.text
    code = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1]
    compile(code, "card", "exec")


def test_a_card_says_what_it_was_told(plain) -> None:
    text = render(plain, FULL)
    index = load_index(plain)
    for words in (
        f"| source data set | somebody/pictures at revision `{'a' * 40}` |",
        "| licence of the source | cc-by-4.0 |",
        f"| model | somebody/vit at revision `{'b' * 40}` |",
        "| split point | 2 blocks have run |",
        "| samples | 24 |",
        "| views | 2 renderings of each image",
        "| codec | lossless |",
        "| distortion | exact |",
        f"({index.total_bytes:,} bytes) in 8 shards",
        f"| `prefix weights` | `{index.fingerprint['prefix weights']}` |",
        'CachedDataset.from_pretrained("user/cache")',
        f'from_pretrained("somebody/vit", revision="{"b" * 40}")',
        "as you would treat the images. The terms of the source data set go on to apply",
    ):
        assert words in text
    data = DatasetCard(text).data.to_dict()
    assert data["license"] == "cc-by-4.0"
    assert data["source_datasets"] == ["somebody/pictures"]
    assert data["size_categories"] == ["n<1K"]
    assert data["configs"] == [
        {
            "config_name": "view-00",
            "data_files": [{"split": "train", "path": "index/view-00/*.parquet"}],
            "default": True,
        },
        {"config_name": "view-01", "data_files": [{"split": "train", "path": "index/view-01/*.parquet"}]},
    ]


def test_a_card_says_nothing_that_it_was_not_told(plain) -> None:
    text = render(plain, None)
    data = DatasetCard(text).data.to_dict()
    assert not data.keys() & {"license", "source_datasets", "language", "pretty_name"}
    for words in ("icence", "source data set", "somebody", "| model |", "revision"):
        assert words not in text
    # Words are no identifiers: they stay words.
    data = DatasetCard(render(plain, Provenance(dataset_name="photos of mine", license="ask me"))).data.to_dict()
    assert "source_datasets" not in data
    assert data["license"] == "other"


@pytest.mark.slow
def test_a_lossy_cache_states_its_distortion(lossy) -> None:
    index, text = load_index(lossy), render(lossy, None)
    assert index.calibration is not None
    assert index.copies_calibration is not None
    assert f"| distortion | {index.calibration['distortion']:.3g} (" in text
    assert f"| distortion of further views | {index.copies_calibration['distortion']:.3g} (" in text
    assert "held-out images" in text


def test_names_of_classes_only_where_they_fit(plain) -> None:
    def names(provenance: Provenance) -> object:
        info = DatasetCard(render(plain, provenance)).data.to_dict()["dataset_info"][0]
        return next(column for column in info["features"] if column["name"] == "labels")["dtype"]

    assert names(FULL) == {"class_label": {"names": {"0": "zero", "1": "one", "2": "two"}}}
    assert names(replace(FULL, label_names=("zero", "one"))) == "int64"
    assert names(replace(FULL, label_names=("zero", "one", "one"))) == "int64"
    assert names(replace(FULL, label_names=None)) == "int64"


def test_text_cannot_break_out_of_its_cell(plain) -> None:
    text = render(plain, Provenance(dataset_name="a|b\n# c", license="x\n---\ny"))
    assert "| source data set | a\\|b # c |" in text
    assert "| licence of the source | x --- y |" in text
    text = render(plain, Provenance(dataset_name="<img src=x> [a](b)", dataset_revision="`c", license="*d*"))
    assert "| source data set | \\<img src=x\\> \\[a\\](b) at revision `c` |" in text
    assert "| licence of the source | \\*d\\* |" in text


def test_what_data_and_model_say_of_themselves(images, model, plain, tmp_path) -> None:
    assert provenance_of_dataset(images) == {"label_names": ("a", "b", "c", "d")}
    assert provenance_of_dataset([1, 2]) == {}
    numbered = datasets.Features({"label": datasets.ClassLabel(names=[3, 4])})
    found = Provenance(**provenance_of_dataset(datasets.Dataset.from_dict({"label": [0]}, features=numbered)))
    assert found == Provenance(label_names=("3", "4"))
    known = images.select(range(4))
    known.info.license = " mit "
    assert provenance_of_dataset(known) == {"license": "mit", "label_names": ("a", "b", "c", "d")}
    index = load_index(plain)
    model.save_pretrained(tmp_path / "somebody" / "vit")
    assert provenance_of_model(model, index) == {}
    assert provenance_of_model(type(model).from_pretrained("somebody/vit"), index) == {}
    for odd in (Path("elsewhere/vit"), 3, None, ["a/b"]):
        model.config._name_or_path = odd
        assert provenance_of_model(model, index) == {}
    model.config._name_or_path = "elsewhere/vit"
    assert provenance_of_model(model, index) == {}  # nothing was fetched


@pytest.fixture
def sources(tmp_path) -> dict[str, datasets.Dataset]:
    """Data sets as they come from three places: two of the Hub, and a folder."""
    rows = {}
    for name, place in (
        ("first", f"somebody___more_pictures/default/0.0.0/{'e' * 40}"),
        ("second", f"other___pictures/default/0.0.0/{'e' * 40}"),
        ("local", "pictures/default/0.0.0/04afcdde6b0c8525"),
    ):
        path = tmp_path / place / "pictures-train.arrow"
        path.parent.mkdir(parents=True)
        features = datasets.Features({"a": datasets.Value("int64")})
        with datasets.arrow_writer.ArrowWriter(path=str(path), features=features) as writer:
            writer.write({"a": 1})
            writer.finalize()
        info = datasets.DatasetInfo(license=f"licence of {name}", builder_name="parquet", dataset_name=name)
        rows[name] = datasets.Dataset.from_file(str(path), info=info)
    return rows


FIRST = {"dataset_name": "somebody/more_pictures", "dataset_revision": "e" * 40}


def test_a_data_set_of_the_hub_is_named_however_it_was_mapped(sources) -> None:
    named = {**FIRST, "license": "licence of first"}
    first = sources["first"]
    assert provenance_of_dataset(first) == named
    assert provenance_of_dataset(sources["local"]) == {"license": "licence of local"}
    for same in (
        first.map(lambda row: {"b": row["a"]}),
        first.shuffle(seed=0).select([0]),
        datasets.concatenate_datasets([first, first]),
    ):
        assert provenance_of_dataset(same) == named


def test_of_several_data_sets_all_are_named_or_none_and_no_licence(sources) -> None:
    first, second, local = sources.values()
    memory = datasets.Dataset.from_dict({"a": [2]}, info=datasets.DatasetInfo(license="private"))
    other = datasets.Dataset.from_dict({"a": [3]}, info=datasets.DatasetInfo(license="mit"))
    columns = datasets.Dataset.from_dict({"b": [2]})
    both = f"other/pictures at revision {'e' * 40}, somebody/more_pictures at revision {'e' * 40}"
    assert provenance_of_dataset(datasets.concatenate_datasets([first, second])) == {"dataset_name": both}
    for mixed in (
        datasets.concatenate_datasets([first, local]),
        datasets.concatenate_datasets([first, memory]),
        datasets.concatenate_datasets([memory, other]),
        datasets.concatenate_datasets([first, columns], axis=1),
        datasets.interleave_datasets([first, memory]),
        first.add_item({"a": 4}),
    ):
        assert provenance_of_dataset(mixed) == {}
    # Written beside the first of them, as one file, or put together in memory.
    for merged in ([first, second], [first, memory], [memory, other]):
        for keep_in_memory in (False, True):
            mapped = datasets.concatenate_datasets(merged).map(lambda row: {"c": 1}, keep_in_memory=keep_in_memory)
            assert provenance_of_dataset(mapped) == {}


def test_the_card_of_a_trained_cache(images) -> None:
    cached = make_trainer(tiny_vit(), images.with_transform(TinyTransform(augment=True)), schedule="0:2").build_cache()
    directory = Path(cached.reader.directory)
    text = cache_card(directory, cached.reader.index, "user/cache")
    assert str(directory) not in text
    assert str(Path.cwd()) not in text
    assert "| hidden states | 17 tokens x 16, float32 |" in text
    assert isinstance(cached, CachedDataset)
