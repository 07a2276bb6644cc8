"""What the hashes of data and code see, and what they do not mind."""

from __future__ import annotations

import collections
import enum
import functools
import importlib
import itertools
import logging
import os
import random
import re
import subprocess
import sys
import textwrap
import threading
import uuid
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from hf_freezecache.data import hashing
from hf_freezecache.data.code_walk import changed_parts
from hf_freezecache.data.hashing import hash_dataset, hash_object, look_into
from hf_freezecache.errors import UnsupportedSetupError


@pytest.fixture(autouse=True)
def _said_anew() -> None:
    hashing._say_once.cache_clear()


def hashed(code) -> str:
    return hash_object((code, None), "training transform")


# ---- Files that rows name ----


def save_images(names) -> None:
    for number, name in enumerate(names):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (number, 0, 0)).save(name)


def column_of(kind: str, paths: list[str]) -> datasets.Dataset:
    image, text = datasets.Image(), datasets.Value("string")
    feature, values = {
        "text": (text, paths),
        "texts": ([text], [[path] for path in paths]),
        "fixed list of texts": (datasets.Sequence(text, length=2), [[path, "x"] for path in paths]),
        "large text": (datasets.Value("large_string"), paths),
        "image": (image, paths),
        "images": ([image], [[path] for path in paths]),
        "struct of text": (
            {"file": text, "size": datasets.Value("int64")},
            [{"file": path, "size": 4} for path in paths],
        ),
        "struct of image": ({"picture": image}, [{"picture": path} for path in paths]),
        "list of structs": ([{"views": [image]}], [[{"views": [path]}] for path in paths]),
        "url of a file": (text, [f"file://{path}" for path in paths]),
    }[kind]
    rows = {"data": values, "label": list(range(len(paths)))}
    features = datasets.Features({"data": feature, "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict(rows, features=features)


@pytest.mark.parametrize(
    "kind",
    [
        *("text", "texts", "fixed list of texts", "large text", "image", "images", "struct of text", "struct of image"),
        *("list of structs", "url of a file"),
    ],
)
@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
def test_a_file_that_a_row_names_is_seen(kind, relative) -> None:
    names = [f"images/{number}.png" for number in range(12)]
    save_images(names)
    dataset = column_of(kind, names if relative else [str(Path(name).absolute()) for name in names])
    before = hash_dataset(dataset)
    assert hash_dataset(dataset) == before
    Image.new("RGB", (40, 40), (9, 9, 9)).save(names[11])
    after = hash_dataset(dataset)
    assert after != before
    # Rows that are not in the data set do not matter, whatever its table holds.
    some = dataset.select(range(5))
    before = hash_dataset(some)
    Image.new("RGB", (60, 60), (9, 9, 9)).save(names[11])
    assert hash_dataset(some) == before


def test_a_folder_that_a_row_names_is_seen() -> None:
    save_images([f"scans/{number}/slice.png" for number in range(3)])
    dataset = column_of("text", [f"scans/{number}" for number in range(3)])
    before = hash_dataset(dataset)
    Image.new("RGB", (40, 40)).save("scans/1/slice.png")
    assert hash_dataset(dataset) != before


def test_texts_that_are_no_paths_are_not_tried_as_paths(monkeypatch) -> None:
    rows = {"caption": [f"A dog, no. {number}." for number in range(600)], "name": ["dog"] * 600, "none": [None] * 600}
    dataset = datasets.Dataset.from_dict(rows)
    tried = []
    monkeypatch.setattr(hashing, "stamp", tried.append)
    hash_dataset(dataset)
    assert len(tried) <= 8
    assert "dog" not in tried


def test_files_that_cannot_be_found_are_told_once(caplog) -> None:
    save_images(["images/0.png"])
    lost = column_of("text", ["elsewhere/0.png", "elsewhere/1.png"])
    with caplog.at_level(logging.WARNING):
        hash_dataset(lost)
        hash_dataset(lost)
    (message,) = caplog.messages
    assert "'data'" in message
    assert "dataset_id" in message
    caplog.clear()
    hash_dataset(column_of("text", ["images/0.png"]))
    # Beside images, names of files are likely read by nobody.
    both = column_of("image", ["images/0.png"]).add_column("source", ["http://somewhere/0.png"])
    hash_dataset(both)
    hash_dataset(datasets.Dataset.from_dict({"caption": ["A dog.", "Mr. Dog"]}))
    assert caplog.messages == []
    hashing._say_once.cache_clear()
    hash_dataset(column_of("image", ["https://somewhere/0.png"]))
    assert "dataset_id" in caplog.text


def test_a_data_set_whose_transform_cannot_be_copied_is_hashed() -> None:
    lock = threading.Lock()
    dataset = datasets.Dataset.from_dict({"a": [1, 2]})
    assert hash_dataset(dataset.with_transform(lambda batch: (lock, batch)[1])) == hash_dataset(dataset)


# ---- Code of the user's own ----

STEPS = """
    def scale(value, by=VALUE):
        return value * by
"""
BETWEEN = """
    import steps_module
    from steps_module import scale

    def calls(batch):
        return scale(batch)

    def calls_by_module(batch):
        return steps_module.scale(batch)

    def imports_inside(batch):
        from steps_module import scale as inner
        return inner(batch)

    def make(function):
        def closure(batch):
            return function(batch)
        return closure

    class Step:
        def __init__(self, function=scale):
            self.function = function
        def __call__(self, batch):
            return self.function(batch)
        def run(self, batch):
            return batch

    class Calls(Step):
        def __init__(self):
            pass
        def __call__(self, batch):
            return calls(batch)

    class Child(Calls):
        pass

    class Compose:
        def __init__(self, steps):
            self.steps = steps

    through_global = Compose([scale])

    def reads_global(batch):
        return through_global.steps
"""
REACHING = {
    "function": lambda m: m.scale,
    "function that calls it": lambda m: m.calls,
    "function of a module that is called": lambda m: m.calls_by_module,
    "import inside a function": lambda m: m.imports_inside,
    "partial": lambda m: functools.partial(m.scale, by=3),
    "partial of a partial": lambda m: functools.partial(functools.partial(m.calls), 1),
    "lambda": lambda m: lambda batch: [m.scale(batch)],
    "lambda in a lambda": lambda m: lambda batch: (lambda: m.calls(batch))(),
    "closure": lambda m: m.make(m.scale),
    "bound method": lambda m: m.Calls().run,
    "attribute": lambda m: m.Step(),
    "method that calls it": lambda m: m.Calls(),
    "method of a parent": lambda m: m.Child(),
    "steps": lambda m: m.Compose([m.Step(), m.calls]),
    "steps in a dict in steps": lambda m: m.Compose([m.Compose({"a": [functools.partial(m.scale)]})]),
    "variable of a module": lambda m: m.reads_global,
    "class": lambda m: m.Calls,
    "default of an argument": lambda m: lambda batch, step=m.scale: step(batch),
    "module": lambda m: m.Compose([m, sys.modules["steps_module"]]),
    "wrapped": lambda m: functools.lru_cache(m.calls),
}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Write the user's modules with a value, and import them anew."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setitem(sys.modules, "steps_module", None)
    monkeypatch.setitem(sys.modules, "between_module", None)

    def write(value, between=BETWEEN):
        (tmp_path / "steps_module.py").write_text(textwrap.dedent(STEPS).replace("VALUE", str(value)))
        (tmp_path / "between_module.py").write_text(textwrap.dedent(between))
        for name in ("steps_module", "between_module"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        return importlib.import_module("between_module")

    return write


@pytest.mark.parametrize("how", REACHING)
def test_an_edit_of_a_module_that_a_transform_reaches_is_seen(project, how) -> None:
    reach = REACHING[how]
    before = hashed(reach(project(2)))
    assert hashed(reach(project(2))) == before
    assert hashed(reach(project(3))) != before


def test_a_module_that_a_transform_does_not_reach_does_not_matter(project) -> None:
    before = hashed(project(2).Compose([1, 2]))
    assert hashed(project(3).Compose([1, 2])) == before
    assert hashed(project(3).Compose([2, 1])) != before


def test_what_a_script_sets_in_a_module_is_seen(project) -> None:
    module = project(2, "SIZE = 3\nclass Step:\n    scale = 1\n    def __call__(self, batch):\n        return SIZE\n")
    before = hashed(module.Step())
    module.SIZE = 4
    assert hashed(module.Step()) != before
    module.SIZE = 3
    assert hashed(module.Step()) == before
    module.Step.scale = 2
    assert hashed(module.Step()) != before


def test_lambdas_of_one_name_differ_by_their_code() -> None:
    assert hashed(lambda batch: batch) != hashed(lambda batch: [batch])
    assert hashed([lambda x: x + 1]) != hashed([lambda x: x + 2])
    assert len({hashed(functools.partial(max, value)) for value in (1, 1.0, True, "1", b"1", None, (1,), [1])}) == 8


def test_a_file_that_a_transform_names_is_seen() -> None:
    class Background:
        def __init__(self, path):
            self.path = path

    save_images(["paper.png"])
    kinds = [Background("paper.png"), Background(Path("paper.png")), lambda batch: Image.open("paper.png")]
    before = [hashed(kind) for kind in kinds]
    assert [hashed(kind) for kind in kinds] == before
    Image.new("RGB", (50, 50)).save("paper.png")
    assert all(hashed(kind) != old for kind, old in zip(kinds, before, strict=True))
    # What a run writes is no input.
    log = Background("log.txt")
    before = hashed(log)
    Path("log.txt").write_text("line")
    assert hashed(log) == before


def test_content_of_arrays_tensors_and_data_sets_is_seen() -> None:
    kinds = [
        lambda x: np.full((3, 4), x),
        lambda x: np.array([{"a": x}], dtype=object),
        lambda x: torch.full((3,), x),
        lambda x: torch.full((3,), x, dtype=torch.bfloat16),
        lambda x: (
            torch.nn.Sequential(torch.nn.Linear(1, 1)).apply(lambda m: m.requires_grad_(False)) if x == 1.0 else x
        ),
        lambda x: datasets.Dataset.from_dict({"a": [x]}),
        lambda x: {"a": [x], "b": {x}},
        lambda x: collections.deque([x]),
        lambda x: np.random.default_rng(int(x)),
        lambda x: torch.Generator().manual_seed(int(x)),
        lambda x: re.compile(f"a{x}"),
        lambda x: Image.new("RGB", (2, 2), (int(x), 0, 0)),
        lambda x: collections.OrderedDict([("a", 1), ("b", 2)][:: 1 if x == 1.0 else -1]),
    ]
    for kind in kinds:
        assert hashed(kind(1.0)) != hashed(kind(2.0)), kind


# ---- What does not matter ----


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


class Step:
    """As libraries of augmentations make them: an identity, sets, generators, and a table of methods."""

    def __init__(self, order: int = 1) -> None:
        names = ["image", "mask", "boxes"][::order]
        self.id = id(self)
        self.by_id = {id(self): "first"}
        self.token = uuid.uuid4()
        self.targets = set(names)
        self.numbers = frozenset([0, 8, 16][::order])
        self.methods = dict.fromkeys(names, self.apply)
        self.kinds = {Colour.RED, Colour.BLUE}
        self.python = random.Random()
        self.numpy = np.random.default_rng()
        self.legacy = np.random.RandomState()
        self.torch = torch.Generator()
        self.torch.seed()
        self.lock = threading.RLock()
        self.pattern = re.compile("a+", re.I)
        self.parent = [self]

    def apply(self, batch):
        return batch


def test_identities_orders_of_sets_and_generators_drawn_at_random_do_not_matter() -> None:
    assert hashed(Step()) == hashed(Step(-1))
    assert hashed([Step(), Step()]) == hashed([Step(-1), Step()])
    one = Step()
    assert hashed([one, one]) == hashed([Step(), Step()])
    other = Step()
    other.targets.add("points")
    assert hashed(other) != hashed(one)


PROGRAM = """
    import re, sys, functools
    from hf_freezecache.data.hashing import hash_object
    sys.path.insert(0, sys.argv[1])
    from test_hashing import Step, Colour

    WORDS = frozenset({"a", "bb", "ccc", "dddd"})

    class Own:
        def __init__(self):
            self.words = {word: {word, "x", (1, word)} for word in WORDS}
        def __call__(self, batch):
            return batch in {"q", "r", "s"} and WORDS

    Own.reference, Own.first = f"Own:{id(Own)}", f"{id(Step):x}"

    for code in (Step(), Own(), functools.partial(Own().__call__), re.compile("a|b", re.X), WORDS, {Colour.RED, Colour.BLUE}):
        print(hash_object((code, None), "training transform"))
"""


@pytest.mark.slow
def test_two_processes_hash_alike(tmp_path) -> None:
    Path("program.py").write_text(textwrap.dedent(PROGRAM))
    found = [
        subprocess.run(
            [sys.executable, "program.py", str(Path(__file__).parent)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for seed in ("1", "2")
    ]
    assert found[0] == found[1]
    assert len(set(found[0])) == 6


class Counting:
    def __init__(self) -> None:
        self.calls = 0
        self.seen: dict[int, list[int]] = {}
        self.inner = [Counted()]
        self.strength = 1

    def __call__(self, batch):
        self.calls += 1
        self.seen[batch] = [batch]
        self.inner[0].calls += 1
        return batch


class Counted:
    calls = 0


def test_what_a_call_changes_by_itself_can_be_left_out() -> None:
    transform = Counting()
    before = look_into((transform,), "training transform")
    transform(1)
    changed = changed_parts(before, look_into((transform,), "training transform"))
    first = hash_object((transform,), "training transform", changed)
    transform(2)
    assert hash_object((transform,), "training transform", changed) == first
    assert hash_object((transform,), "training transform") != before.digest
    transform.strength = 2
    assert hash_object((transform,), "training transform", changed) != first


# ---- What cannot be hashed ----


def test_what_a_transform_holds_and_cannot_be_hashed_is_named() -> None:
    class Holding:
        def __init__(self):
            self.rows = [(row for row in range(3))]

    with pytest.raises(UnsupportedSetupError, match=r"rows\[0\] is a generator.*transform_id"):
        hashed(Holding())


rows_of_a_file = (row for row in range(3))


def test_what_code_reads_and_cannot_be_seen_is_told_once(caplog) -> None:
    def transform(batch):
        return next(rows_of_a_file), batch

    with caplog.at_level(logging.WARNING):
        first = hashed(transform)
        assert hashed(transform) == first
    (message,) = caplog.messages
    assert "rows_of_a_file (generator)" in message
    assert "transform_id" in message


def test_code_that_refers_to_itself_ends() -> None:
    def fibonacci(number):
        return number if number < 2 else fibonacci(number - 1) + fibonacci(number - 2)

    loop: list = [fibonacci]
    loop.append(loop)
    assert hashed(loop) == hashed(loop)
    assert hashed(itertools.count()) == hashed(itertools.count())
    assert hashed(pa.array([1])) != hashed(pa.array([2]))
