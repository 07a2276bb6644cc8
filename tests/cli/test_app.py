"""What the commands print, when they fail, and that ``verify`` sees every kind of damage in every file."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import torch
import transformers
from PIL import Image
from support.commands import assert_one_line, call
from support.tiny import TinyTransform, make_trainer, tiny_vit
from typer.testing import CliRunner

from hf_freezecache import CacheConfig, FreezeConfig
from hf_freezecache.cache import verify
from hf_freezecache.cache.index import load_index
from hf_freezecache.cli import (
    app as cli,
)
from hf_freezecache.cli import (
    demo,
)
from hf_freezecache.cli.digits import load_digit_images, other_scans, unseen_digits
from hf_freezecache.errors import CacheCorruptError
from hf_freezecache.report.plots import draw_runs
from hf_freezecache.report.text import format_runs, size_words

NAME = "k02-0123456789abcdef"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, images: datasets.Dataset) -> Path:
    """One cache: 20 rows, 2 views, 2 shards each."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("built")
    make_trainer(
        tiny_vit(),
        images.select(range(20)).with_transform(TinyTransform(augment=True)),
        schedule="0:2",
        cache={"cache_dir": str(folder / "caches"), "num_views": 2},
        output_dir=str(folder / "out"),
        num_train_epochs=1,
    ).train()
    (cache,) = (path for path in (folder / "caches").iterdir() if path.is_dir())
    return cache


@pytest.fixture
def cache(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "caches" / NAME))


def files_of(cache: Path) -> list[str]:
    """Names of what makes up a cache; on ``provenance.json``, words for a card, nothing depends."""
    names = sorted(str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file())
    names.remove("provenance.json")
    assert len(names) == 9
    return names


def size_of(cache: Path) -> int:
    """Bytes of all but the index."""
    return sum((cache / name).stat().st_size for name in files_of(cache) if name != "index.json")


# ---- Help and errors ----


@pytest.mark.parametrize(
    "command", ["build", "inspect", "verify", "push", "pull", "demo", "report", "settings", "doctor", "prune"]
)
def test_help_shows_an_example(command) -> None:
    status, out, _ = call(command, "--help")
    assert status == 0
    assert f"Example: hf-freezecache {command} " in " ".join([*out.split(), ""])


def test_help_names_commands_and_exit_codes() -> None:
    status, out, _ = call("--help")
    assert status == 0
    for word in ("inspect", "verify", "demo", "Exit status: 0", "1 if", "2 on"):
        assert word in " ".join(out.split())


def test_wrong_usage_exits_with_2() -> None:
    assert call("verify")[0] == 2
    assert call("build")[0] == 2
    assert call("demo", "--seed", "-1")[0] == 2


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_path_without_a_cache_is_one_line_on_stderr(command, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for name, words in (("nowhere", "does not exist"), ("file", "is a file"), ("empty", "no index.json")):
        status, out, err = call(command, tmp_path / name)
        assert (status, out) == (1, "")
        assert_one_line(err)
        assert words in err
        assert name in err


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_debug_shows_the_traceback(command) -> None:
    with pytest.raises(CacheCorruptError, match="does not exist"):
        call(command, "nowhere", "--debug")


def test_an_error_of_another_kind_is_one_line_too(cache, monkeypatch) -> None:
    def fail(path: Path) -> list[str]:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(verify, "verify_cache", fail)
    status, _, err = call("verify", cache)
    assert status == 1
    assert_one_line(err)
    assert "RuntimeError: two lines" in err


# ---- settings ----


def test_settings_are_printed_in_groups() -> None:
    status, out, err = call("settings")
    assert (status, err) == (0, "")
    freezing, caching, advanced = out.split("\n\n")
    assert freezing.startswith("When to freeze: FreezeConfig\n  --schedule  (default: None)\n")
    assert caching.startswith("Where and how to cache: CacheConfig\n  --freezecache_dir  (default: caches)\n")
    assert advanced.startswith("Advanced: CacheConfig\n")
    words = " ".join(out.split())
    for group, config in ((freezing, FreezeConfig), (caching + advanced, CacheConfig)):
        for field in dataclasses.fields(config):
            assert f"\n  --{field.name}  (default: {field.default})\n" in group
            assert field.metadata["help"].removeprefix("Advanced: ")[1:] in words
    assert "--chunk_size" in advanced
    assert "--num_views" in caching
    assert max(map(len, out.splitlines())) <= 100


def test_a_command_is_one_function(monkeypatch) -> None:
    """What the frame's docstring says of adding one."""
    monkeypatch.setattr(cli.app, "registered_commands", list(cli.app.registered_commands))

    @cli.app.command()
    def plan() -> None:
        """Say what would pay."""
        print("planned")

    assert call("plan") == (0, "planned\n", "")
    assert "Say what would pay." in call("--help")[1]


# ---- start and completion ----


def loaded_by(program: str) -> str:
    """Names of the slow libraries that a program of its own has imported at its end."""
    program += "\nimport sys; print(*sorted({'torch', 'transformers', 'datasets', 'pandas'} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120, check=True
    ).stdout.strip()


@pytest.mark.parametrize("module", ["hf_freezecache", "hf_freezecache.cli.app"])
def test_nothing_slow_is_imported_before_a_command_needs_it(module) -> None:
    assert loaded_by(f"import {module}") == ""


@pytest.mark.slow
def test_what_is_imported_is_seen() -> None:
    assert "transformers" in loaded_by("import hf_freezecache; hf_freezecache.FreezeCacheTrainer")


@pytest.mark.slow
def test_reading_a_cache_imports_no_transformers_and_no_datasets(cache) -> None:
    program = f"""
from typer.testing import CliRunner
from hf_freezecache.cli.app import app
for command in ("inspect", "verify"):
    assert CliRunner().invoke(app, [command, {str(cache)!r}]).exit_code == 0
"""
    assert loaded_by(program) == "torch"


def complete(instruction: str, **variables: str) -> str:
    """What a shell gets when it asks the program, by the protocol of click."""
    variables = {"_HF_FREEZECACHE_COMPLETE": instruction, **variables}
    return CliRunner().invoke(cli.app, [], prog_name="hf-freezecache", env=variables).stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_gives_the_subcommands(shell) -> None:
    assert "hf-freezecache" in complete(f"source_{shell}")
    words = {
        "bash": {"COMP_WORDS": "hf-freezecache ", "COMP_CWORD": "1"},
        "zsh": {"_TYPER_COMPLETE_ARGS": "hf-freezecache "},
        "fish": {"_TYPER_COMPLETE_ARGS": "hf-freezecache ", "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
    }[shell]
    found = complete(f"complete_{shell}", **words)
    for command in ("build", "demo", "inspect", "pull", "push", "report", "settings", "verify"):
        assert command in found
    if shell == "bash":
        assert complete("complete_bash", COMP_WORDS="hf-freezecache ver", COMP_CWORD="1").split() == ["verify"]


def test_completion_can_be_installed() -> None:
    status, out, _ = call("--help")
    assert status == 0
    assert "--install-completion" in out
    assert "--show-completion" in out


# ---- inspect ----


def test_inspect_prints_what_a_cache_holds(cache) -> None:
    provenance = {
        "dataset_name": "somebody/pictures",
        "license": "mit",
        "model_id": "facebook/vit",
        "model_revision": "0123",
    }
    (cache / "provenance.json").write_text(json.dumps(provenance))
    status, out, err = call("inspect", cache)
    assert (status, err) == (0, "")
    rows = {parts[0]: parts[2].strip() for parts in (line.strip().partition("  ") for line in out.splitlines()[:0:-1])}
    size = size_of(cache)
    assert out.splitlines()[0] == str(cache)
    for label, words in {
        "split point": "2 frozen blocks",
        "samples": "20 in 2 views",
        "images": "3 x 16 x 16",
        "hidden states": "17 tokens x 16, float32",
        "codec": "lossless",
        "shards": "4, up to 2 chunks of 8 samples",
        "size": f"({size:,} bytes)",
        "per element": f"{8 * size / (20 * 2 * 17 * 16):.2f} bits",
        "extras": "labels (int64, one number)",
        "made of": "somebody/pictures (mit), model facebook/vit at revision 0123",
        "prefix weights": load_index(cache).fingerprint["prefix weights"],
        "number of views": "2",
    }.items():
        assert words in rows[label]


def test_inspect_prints_json(cache) -> None:
    status, out, _ = call("inspect", cache, "--json")
    (entry,) = json.loads(out)["caches"]
    size = size_of(cache)
    assert status == 0
    assert entry["fingerprint_components"] == load_index(cache).fingerprint
    expected = {
        "path": str(cache),
        "split_point": 2,
        "num_views": 2,
        "num_samples": 20,
        "tokens": 17,
        "hidden": 16,
        "dtype": "float32",
        "shards": 4,
        "bytes": size,
        "bytes_per_image": size / 20,
        "bytes_per_image_and_view": size / 40,
        "bits_per_element": 8 * size / 40 / (17 * 16),
    }
    assert entry["extras"] == [{"name": "labels", "dtype": "int64", "shape": []}]
    assert entry["provenance"] == {"label_names": ["a", "b", "c", "d"]}
    assert {name: entry[name] for name in expected} == pytest.approx(expected)


def test_inspect_takes_a_folder_and_passes_over_a_damaged_cache(cache) -> None:
    other = shutil.copytree(cache, cache.with_name("k01-0000000000000000"))
    (cache.parent / "k03-0000000000000000" / "view-00").mkdir(parents=True)
    status, out, _ = call("inspect", cache.parent)
    assert status == 0
    assert str(cache) in out
    assert str(other) in out
    assert "note: " in out
    assert "k03-0000000000000000 is unfinished" in out
    (other / "index.json").write_text("{}")
    status, out, err = call("inspect", cache.parent, "--json")
    assert status == 1
    assert [entry["path"] for entry in json.loads(out)["caches"]] == [str(cache)]
    assert_one_line(err)
    assert f"{other}/index.json" in err


def test_sizes_are_readable() -> None:
    assert [size_words(n) for n in (0, 1023, 1024, 5 * 2**20, 3 * 2**40)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "5.0 MiB",
        "3072.0 GiB",
    ]


# ---- verify ----


def test_verify_of_a_sound_cache(cache) -> None:
    size = size_of(cache) + (cache / "index.json").stat().st_size
    status, out, err = call("verify", cache)
    assert (status, err) == (0, "")
    assert out == f"sound: {cache}, 9 files, {size:,} bytes\n"
    status, out, _ = call("verify", cache, "--json")
    assert status == 0
    assert json.loads(out) == {
        "sound": True,
        "caches": [{"path": str(cache), "files": 9, "bytes": size, "problems": []}],
        "unfinished": [],
    }


def assert_found(cache: Path, name: str) -> None:
    status, out, _ = call("verify", cache)
    assert status == 1, name
    assert out.startswith("problem: "), name
    assert str(cache / name) in out


@pytest.mark.slow
def test_verify_finds_a_flipped_bit_in_every_file(cache) -> None:
    """Seeded positions all over each file, its first and last byte included; one bit at a time."""
    generator = random.Random(0)
    for name in files_of(cache):
        path = cache / name
        content = path.read_bytes()
        positions = [0, len(content) - 1, *generator.sample(range(len(content)), 20)]
        for position in positions:
            damaged = bytearray(content)
            damaged[position] ^= 1 << generator.randrange(8)
            path.write_bytes(damaged)
            assert_found(cache, name)
        path.write_bytes(content)
    assert call("verify", cache)[0] == 0


@pytest.mark.slow
def test_verify_finds_truncated_and_lengthened_files(cache) -> None:
    for name in files_of(cache):
        path = cache / name
        content = path.read_bytes()
        for damaged in (b"", content[: len(content) // 2], content[:-1], content + b"\0"):
            path.write_bytes(damaged)
            assert_found(cache, name)
        path.write_bytes(content)
    assert call("verify", cache)[0] == 0


def test_verify_finds_missing_files(cache) -> None:
    for name in files_of(cache):
        path = cache / name
        content = path.read_bytes()
        path.unlink()
        if name == "index.json":  # without it a cache was never finished
            status, _, err = call("verify", cache)
            assert status == 1
            assert_one_line(err)
            assert str(cache) in err
            assert "has no index.json" in err
        else:
            assert_found(cache, name)
        path.write_bytes(content)
    assert call("verify", cache)[0] == 0


def test_verify_finds_shards_that_changed_places(cache) -> None:
    first, second = (cache / f"view-0{view}" / "shard-00000.safetensors" for view in range(2))
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])
    status, out, _ = call("verify", cache)
    assert status == 1
    assert str(first) in out
    assert str(second) in out


@pytest.mark.parametrize("name", ["notes.txt", "view-00/shard-00009.safetensors", ".build/part.arrow"])
def test_verify_finds_foreign_files(cache, name) -> None:
    (cache / name).parent.mkdir(exist_ok=True)
    (cache / name).write_bytes(b"x")
    assert_found(cache, name)


def test_verify_names_every_problem_in_json(cache) -> None:
    (cache / "view-00/shard-00000.safetensors").unlink()
    (cache / "notes.txt").write_text("x")
    status, out, _ = call("verify", cache, "--json")
    document = json.loads(out)
    assert status == 1
    assert document["sound"] is False
    missing, foreign = document["caches"][0]["problems"]
    assert "view-00/shard-00000.safetensors is missing" in missing
    assert "notes.txt does not belong" in foreign


def test_an_unfinished_cache_is_a_problem_by_itself_and_beside_others(cache) -> None:
    unfinished = shutil.copytree(cache, cache.with_name("k03-0000000000000000"))
    (unfinished / "index.json").unlink()
    (cache.parent / "photos").mkdir()
    status, _, err = call("verify", unfinished)
    assert status == 1
    assert_one_line(err)
    assert "no finished cache" in err
    status, out, _ = call("verify", cache.parent)
    assert status == 1
    assert f"sound: {cache}" in out
    assert f"problem: {unfinished} has no index.json" in out
    assert "photos" not in out
    assert json.loads(call("verify", cache.parent, "--json")[1])["unfinished"] == [str(unfinished)]
    shutil.rmtree(cache)
    status, out, err = call("verify", cache.parent)
    assert (status, out) == (1, "")
    assert_one_line(err)
    assert str(unfinished) in err


def test_verify_of_a_folder_checks_all_caches(cache, monkeypatch) -> None:
    other = Path(shutil.copytree(cache, cache.with_name("k01-0000000000000000")))
    (other / "index.json").write_bytes(b"\xff")
    status, out, _ = call("verify", cache.parent)
    assert status == 1
    assert f"problem: {other}/index.json" in out
    assert f"sound: {cache}" in out
    # A file that cannot be read hides nothing that is found in the next cache.
    sound = verify.verify_cache

    def verify_cache(path: Path) -> list[str]:
        if path == other:
            raise PermissionError(13, "Permission denied", f"{other}/view-00")
        return sound(path)

    monkeypatch.setattr(verify, "verify_cache", verify_cache)
    status, out, _ = call("verify", cache.parent)
    assert status == 1
    assert "Permission denied" in out
    assert f"sound: {cache}" in out


# ---- demo ----

TINY = demo.DemoSettings(
    image_size=16,
    hidden_size=16,
    num_blocks=3,
    pretrain_epochs=1,
    epochs=6,
    batch_size=16,
    max_images=300,
)


@pytest.fixture
def tiny_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "DemoSettings", lambda: TINY)


def test_the_demo_tells_who_is_ahead_when(tmp_path) -> None:
    """A head alone may have more than what comes of it: that is told, and when each first had what ours ends at."""
    curves = {
        demo.FULL: [[4.0, 0.5], [8.0, 0.8], [12.0, 0.9]],
        demo.SHORT: [[5.0, 0.6]],
        demo.CACHED: [[1.0, 0.85], [3.0, 0.7], [9.0, 0.75]],
    }
    runs = [
        {"run": name, "accuracy": curve[-1][1], "seconds": curve[-1][0], "accuracy_after_seconds": curve, "chosen": "x"}
        for name, curve in curves.items()
    ]
    figures = {"test_images": 100, "runs": runs, "picture": "p", "caches": ["c"], "total_seconds": 30.0}
    told = "\n".join(demo._summary(figures, tmp_path))
    assert "is 15.0 points above full fine-tuning, and takes 9.0 s against 5.0 s." in told
    assert "after 9.0 s it has 75.0%; the long run had 80.0%. On the way it had 85.0%, after 1.0 s." in told
    assert "it first has 75.0% after 1.0 s; full fine-tuning reaches that after 8.0 s." in told
    runs[2] |= {"accuracy": 0.95, "seconds": 2.0, "accuracy_after_seconds": [[2.0, 0.95]]}
    told = "\n".join(demo._summary(figures, tmp_path))
    assert "the long run had no epoch done.\n" in told
    assert "full fine-tuning never reaches that." in told


def check_demo(folder: Path, out: str, figures: dict, epochs: int) -> None:
    names = [demo.FULL, demo.SHORT, demo.CACHED]
    lines = out.splitlines()
    header = next(number for number, line in enumerate(lines) if line.startswith("run "))
    for name, line in zip(names, lines[header + 2 : header + 5], strict=True):
        assert line.startswith(f"{name} ")
    full, short, cached = figures["runs"]
    assert [run["run"] for run in figures["runs"]] == names
    assert len(full["accuracy_after_seconds"]) == epochs
    assert len(short["accuracy_after_seconds"]) == epochs // 3
    for run in figures["runs"]:
        assert 0 <= run["accuracy"] <= 1
        seconds = [0, *(at for at, _ in run["accuracy_after_seconds"])]
        assert seconds == sorted(seconds)
        assert 0.9 * run["seconds"] < seconds[-1] <= run["seconds"]
        assert run["accuracy_after_seconds"][-1][1] == run["accuracy"]
        assert f"{run['seconds']:.1f} s, accuracy {run['accuracy']:.1%}" in out
    assert full["build_seconds"] == short["build_seconds"] == full["cache_bytes"] == short["cache_bytes"] == 0
    assert "schedule='auto' may spend 2 epochs" in cached["chosen"]
    assert cached["chosen"] in out
    points = 100 * (cached["accuracy"] - short["accuracy"])
    assert (
        f"frozen and cached is {abs(points):.1f} points {'above' if points >= 0 else 'below'} full fine-tuning" in out
    )
    assert 0 < cached["build_seconds"] < cached["seconds"]
    sizes = [load_index(Path(path)).total_bytes for path in figures["caches"]]
    assert cached["cache_bytes"] == sum(sizes)
    assert cached["cache_bytes_per_image"] == pytest.approx(sum(sizes) / figures["train_images"])
    with Image.open(folder / "demo.png") as picture:
        assert picture.size == (1440, 552)
        assert len(picture.convert("RGB").getcolors(2**20)) > 20
    for path in [folder / "demo.png", *figures["caches"]]:
        assert str(path) in out
    for path in figures["caches"]:
        assert call("verify", path)[0] == 0
    # The hint can be followed.
    assert call(*lines[-1].split()[1:])[0] == 0
    assert {path.name for path in folder.iterdir()} <= {"demo.png", "demo.json", "caches"}


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_demo")
def test_demo_writes_table_picture_and_figures(tmp_path, capfd, caplog) -> None:
    level = logging.getLogger("hf_freezecache").level, transformers.logging.get_verbosity()
    torch.set_num_threads(2)
    status, out, err = call("demo", "--output-dir", tmp_path / "demo")
    assert (status, err) == (0, "")
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    figures = json.loads((tmp_path / "demo" / "demo.json").read_text())
    check_demo(tmp_path / "demo", out, figures, TINY.epochs)
    assert (figures["machine"]["threads"], torch.get_num_threads()) == (1, 2)
    assert [line[:3] for line in out.splitlines() if line[:1].isdigit()] == ["1/5", "2/5", "3/5", "4/5", "5/5"]
    assert figures["seed"] == 0
    assert (logging.getLogger("hf_freezecache").level, transformers.logging.get_verbosity()) == level


@pytest.mark.slow
def test_seconds_leave_evaluation_out(train_dataset, eval_dataset, monkeypatch) -> None:
    def slow(self: object, *args: object, **kwargs: object) -> dict[str, float]:
        time.sleep(0.25)
        return {"eval_accuracy": 0.5}

    monkeypatch.setattr(demo.FreezeCacheTrainer, "evaluate", slow)
    settings = {"schedule": None, "cls": demo._TimedTrainer, "eval_strategy": "epoch"}
    trainer = make_trainer(tiny_vit(), train_dataset, eval_dataset, **settings)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    assert len(trainer.curve) == 4
    assert seconds > 1
    assert trainer.curve[-1][0] <= trainer.seconds < seconds - 0.95


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_demo")
def test_the_harder_task_is_of_digits_never_seen() -> None:
    status, out, _ = call("demo", "--output-dir", "demo", "--unseen-digits")
    assert status == 0
    assert "learns the digits 0-5" in out
    assert json.loads(Path("demo/demo.json").read_text())["task"] == "unseen digits"


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_demo")
def test_a_second_demo_builds_its_caches_anew_and_leaves_others_alone(tmp_path) -> None:
    def run_demo(*args: str) -> dict:
        assert call("demo", "--output-dir", "demo", "--json", "figures.json", *args)[0] == 0
        return json.loads(Path("figures.json").read_text())

    first = run_demo()
    assert not Path("demo/demo.json").exists()
    mine = Path("demo/caches") / NAME
    mine.mkdir()
    second = run_demo()
    assert second["runs"][2]["build_seconds"] > 0
    # The same seed gives the same weights, hence the same caches, in their places.
    assert second["caches"] == first["caches"]
    assert [run["accuracy"] for run in second["runs"]] == [run["accuracy"] for run in first["runs"]]
    other = run_demo("--seed", "1")
    assert not set(other["caches"]) & set(first["caches"])
    assert mine.is_dir()
    assert all(Path(cache, "index.json").is_file() for cache in first["caches"])


@pytest.mark.slow
@pytest.mark.parametrize("module", ["sklearn.datasets", "matplotlib.figure"])
def test_demo_without_its_extras_says_what_to_install(module, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    status, out, err = call("demo", "--output-dir", "demo")
    assert (status, out) == (1, "")
    assert_one_line(err)
    assert "pip install 'hf-freezecache[demo]'" in err
    assert not Path("demo").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_demo")
def test_demo_that_fails_leaves_nothing_half_done(monkeypatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo, "draw_runs", fail)
    status, out, err = call("demo", "--output-dir", "demo")
    assert status == 1
    assert_one_line(err)
    assert "No space left" in err
    assert demo.CACHED in out
    assert list(Path("demo").iterdir()) == []
    assert call("demo", "--output-dir", "demo", "--json", ".")[0] == 1


@pytest.mark.slow
def test_digits_are_real_and_whole() -> None:
    digits = load_digit_images(32)
    assert len(digits) == 1797
    assert sorted(set(digits["label"])) == list(range(10))
    image = digits[0]["image"]
    assert (image.size, image.mode) == ((32, 32), "RGB")
    assert image.convert("L").getextrema()[1] > 200


@pytest.mark.parametrize(("make", "num_first", "num_classes"), [(other_scans, 10, 10), (unseen_digits, 6, 4)])
def test_held_out_digits_are_never_trained_on(make, num_first, num_classes) -> None:
    task = make(32, 0, 400)
    first, train, test = task.first, task.train, task.test
    parts = [
        {bytes(row["bytes"]) for row in part.with_format("arrow")[:]["image"].to_pylist()}
        for part in (first, train, test)
    ]
    assert not (parts[0] | parts[1]) & parts[2]
    assert len(first) + len(train) + len(test) == 400
    assert (task.num_first, task.num_classes) == (num_first, num_classes)
    assert set(first.with_format(None)["label"]) == set(range(num_first))
    assert set(train.with_format(None)["label"]) == set(test.with_format(None)["label"]) == set(range(num_classes))
    # Held-out images are not augmented, the others are.
    assert torch.equal(test[0]["pixel_values"], test[0]["pixel_values"])
    assert not all(torch.equal(train[row]["pixel_values"], train[row]["pixel_values"]) for row in range(5))


RUNS = [
    {"run": "plain", "accuracy": 0.5, "seconds": 10.04, "build_seconds": 0.0, "cache_bytes_per_image": 0},
    {"run": "cached", "accuracy": 0.987, "seconds": 9.0, "build_seconds": 2.06, "cache_bytes_per_image": 1234.5},
]


def test_table_is_aligned() -> None:
    assert format_runs(RUNS).splitlines() == [
        "run     accuracy  seconds  of it build  bytes per image",
        "------  --------  -------  -----------  ---------------",
        "plain      50.0%     10.0            -                -",
        "cached     98.7%      9.0          2.1            1,234",
    ]


@pytest.mark.slow
def test_picture_of_runs_without_a_cache(tmp_path) -> None:
    draw_runs([{**RUNS[0], "accuracy_after_seconds": [[1.0, 0.2], [9.0, 0.5]]}], tmp_path / "one.png")
    with Image.open(tmp_path / "one.png") as picture:
        assert picture.format == "PNG"


@pytest.mark.slow
def test_the_whole_demo_ends_in_time(tmp_path, monkeypatch) -> None:
    """As the example of its help says it."""
    epilog = next(command.epilog for command in cli.app.registered_commands if command.callback.__name__ == "demo")
    example = epilog.removeprefix("Example: ").split()
    assert example == ["hf-freezecache", "demo", "--output-dir", "freezecache-demo"]
    done = subprocess.run(
        [str(Path(sys.executable).with_name(example[0])), *example[1:]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    monkeypatch.chdir(tmp_path)
    figures = json.loads(Path("freezecache-demo/demo.json").read_text())
    check_demo(Path("freezecache-demo"), done.stdout, figures, demo.DemoSettings().epochs)
    assert figures["total_seconds"] < 180
    full, short, cached = figures["runs"]
    assert max(short["seconds"], cached["seconds"]) < full["seconds"]
    # Far above chance, 10%.
    assert min(run["accuracy"] for run in figures["runs"]) > 0.6
