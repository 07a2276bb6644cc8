"""Holds the house to its plan: who imports whom, what importing does, and what must not appear anywhere."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import hf_freezecache

PACKAGE = Path(hf_freezecache.__file__).parent
ROOT = "hf_freezecache"
FILES = sorted(PACKAGE.rglob("*.py"))

#: Module -> what it may import of this package. Data flows one way: policies -> splitting, freezing -> writer -> reader ->
#: data set -> trainer -> what users run. A new module needs a line here, and that line needs a reason.
CACHE = {"errors", "cache.fingerprint", "cache.format", "cache.layout"}
#: What reads without trust.
FILES_OF_A_CACHE = {"cache.heads", "cache.schema", "cache.storage"}
CODECS = {"codecs", "codecs.base", "codecs.entropy"}
STEPS = {
    f"codecs.{name}"
    for name in ("base", "cast", "copies", "entropy", "pack", "pipeline", "planes", "quantize", "select", "transform")
}
MAY_IMPORT = {
    "errors": set(),
    "config": {"errors"},
    "policies": {"errors", "config"},
    "splitting": {"errors"},
    "freezing": {"errors", "splitting"},
    "seeding": set(),
    "transforms": {"errors", "seeding"},
    "views": {"errors", "seeding", "transforms"},
    "preflight": {"errors", "config", "processes", "suffix", "views"},
    "codecs.base": {"errors"},
    "codecs.entropy": {"errors", "codecs.base"},
    "codecs.planes": {"codecs.base"},
    "codecs.pack": {"codecs.base"},
    "codecs.cast": {"codecs.base"},
    "codecs.quantize": {"codecs.base", "codecs.cast"},
    "codecs.transform": {"codecs.base", "codecs.cast"},
    "codecs.select": {"codecs.base", "codecs.cast"},
    "codecs.copies": {"codecs.base", "codecs.cast", "codecs.transform"},
    "codecs.pipeline": {"codecs.base", "codecs.entropy", "codecs.planes"},
    "codecs": {"errors", *STEPS},
    "calibration": {"errors", "codecs"},
    "cache": set(),
    "cache.fingerprint": {"errors"},
    "cache.layout": {"errors"},
    "cache.storage": {"errors"},
    "cache.schema": {"codecs.base"},
    "cache.heads": {"errors", *CODECS, "cache.schema", "cache.storage"},
    "cache.format": {"errors", *CODECS, *FILES_OF_A_CACHE},
    "cache.parts": {"cache.schema", "cache.storage"},
    "cache.shard": {*CACHE, *CODECS, "cache.schema"},
    "cache.state": {*CACHE, *CODECS, "cache.schema", "cache.storage"},
    "processes": {"errors"},
    "agreement": {"processes"},
    "replicas": {"errors"},
    "cache.locking": {"errors", "cache.shard", "processes"},
    "cache.commit": {*CACHE, "cache.shard"},
    "cache.writer": {
        *(*CACHE, *CODECS, "cache.commit", "cache.locking", "cache.shard", "cache.state", "processes", "views"),
    },
    "cache.selection": {"cache.format"},
    "cache.transfer": {*CACHE, "cache.selection"},
    "cache.reader": {
        *(
            *CACHE,
            *CODECS,
            "cache.parts",
            "cache.schema",
            "cache.selection",
            "cache.state",
            "cache.storage",
            "codecs.copies",
        ),
    },
    "sampling": {"errors", "cache.layout", "views"},
    "dataset": {*CACHE, "cache.reader", "cache.selection", "cache.transfer", "codecs", "sampling", "views"},
    "choosing": {
        *(*CACHE, "cache.reader", "cache.state", "calibration", "codecs", "config", "dataset", "splitting", "views"),
    },
    "caching": {
        *(*CACHE, "cache.commit", "cache.locking", "cache.reader", "cache.shard", "cache.state", "cache.writer"),
        *("choosing", "codecs", "config", "copying", "dataset", "processes", "splitting", "views"),
    },
    "feature_augmentation": {"errors"},
    "sensitivity": {"codecs", "codecs.copies"},
    "copying": {
        *("cache.reader", "cache.state", "calibration", "choosing", "codecs", "config", "sensitivity", "splitting"),
        *("transforms", "views"),
    },
    "checkpoints": {"errors", "cache.format"},
    "suffix": {"cache.fingerprint", "dataset", "errors", "freezing", "splitting"},
    "wording": set(),
    "quieting": set(),
    "origin": {"cache.fingerprint", "cache.format", "quieting", "splitting"},
    "cards": {*CACHE, "codecs", "origin", "wording"},
    "plots": {"sensitivity"},
    # What a run left behind: record -> figures -> words -> pictures, page and card.
    "run_record": {"errors"},
    "cost": set(),
    "report": {"cost", "run_record"},
    "run_words": {"report"},
    "run_plots": {"report", "run_words", "wording"},
    "templating": {"run_words", "wording"},
    "page": {"report", "run_plots", "run_words", "templating", "wording"},
    "model_card": {"report", "run_words", "templating"},
    "callbacks": {
        *("cache.format", "codecs", "config", "errors", "model_card", "page", "report", "run_plots", "run_record"),
    },
}
LIBRARY = set(MAY_IMPORT)
MAY_IMPORT["trainer"] = LIBRARY
MAY_IMPORT[""] = {"config", "dataset", "errors", "splitting", "suffix", "trainer"}
#: At the end of the flow; nothing below may import it when loaded. Methods of the data set that fetch and push do when called.
MAY_IMPORT["hub"] = {"errors"}
MAY_IMPORT["pushing"] = {*CACHE, "cache.reader", "cards", "hub", "origin"}
MAY_IMPORT["pulling"] = {*CACHE, "cache.selection", "cache.transfer", "hub", "origin"}
HUB = {"hub", "pushing", "pulling"}
ONLY_WHEN_CALLED = {"dataset": {*HUB, "origin"}}
#: What users run. Nothing but another of these may import one of them.
SHELL = ["demo", "build", "cli"]
for position, shell in enumerate(SHELL):
    MAY_IMPORT[shell] = {"", "trainer", *HUB, *LIBRARY, *SHELL[:position]}

NETWORK = {
    "aiohttp",
    "ftplib",
    "http",
    "httpx",
    "huggingface_hub",
    "requests",
    "smtplib",
    "socket",
    "ssl",
    "urllib",
    "urllib3",
}
PICKLES = {"_pickle", "cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}


def name_of(path: Path) -> str:
    """``cache/format.py`` -> ``cache.format``; ``cache/__init__.py`` -> ``cache``; ``__init__.py`` -> the empty name."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


def imported(path: Path, everywhere: bool = True) -> Iterator[tuple[str, str]]:
    """Yield (absolute module, name taken from it or "") of all imports, or of those that run when the module loads."""
    package = [ROOT, *path.relative_to(PACKAGE).parts[:-1]]
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, ""
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield module, alias.name
        if everywhere or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            pending.extend(ast.iter_child_nodes(node))


def own_imports(name: str, everywhere: bool = True) -> set[str]:
    found = set()
    for module, taken in imported(MODULES[name], everywhere):
        if module == ROOT or module.startswith(f"{ROOT}."):
            short = module.removeprefix(ROOT).removeprefix(".")
            deeper = f"{short}.{taken}".removeprefix(".")
            found.add(deeper if deeper in MODULES else short)
    return found


def test_imports_are_read() -> None:
    """The other tests would pass on nothing."""
    assert {"errors", "codecs", "cache.layout"} <= own_imports("cache.reader")
    assert "cache.writer" in own_imports("caching")
    assert ("transformers", "Trainer") in set(imported(MODULES["trainer"]))
    assert ("zstandard", "") in set(imported(MODULES["codecs.entropy"]))
    assert len(FILES) >= 20


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_one_way(name) -> None:
    assert name in MAY_IMPORT, f"{name} is new: give it a line in MAY_IMPORT"
    assert own_imports(name) - MAY_IMPORT[name] - ONLY_WHEN_CALLED.get(name, set()) == set()
    assert own_imports(name, everywhere=False) - MAY_IMPORT[name] == set()


def test_the_plan_itself_goes_one_way() -> None:
    """So that a line added to MAY_IMPORT cannot turn it round."""
    assert not MAY_IMPORT["cache.reader"] & {"cache.writer", "cache.shard"}
    assert not MAY_IMPORT["cache.writer"] & {"cache.reader"}
    assert not MAY_IMPORT["cache.shard"] & {"cache.reader", "cache.writer"}
    for name in LIBRARY:
        assert not MAY_IMPORT[name] & {"", "trainer", *HUB, *SHELL}, name
    assert_no_cycle(MAY_IMPORT)


def assert_no_cycle(graph: dict[str, set[str]]) -> None:
    remaining = {name: set(targets) for name, targets in graph.items()}
    while remaining:
        leaves = {name for name, targets in remaining.items() if not targets & remaining.keys()}
        assert leaves, f"import cycle among {sorted(remaining)}"
        for name in leaves:
            del remaining[name]


def test_no_import_cycles() -> None:
    assert_no_cycle({name: own_imports(name, everywhere=False) for name in MODULES})
    with pytest.raises(AssertionError, match="cycle"):
        assert_no_cycle({"a": {"b"}, "b": {"a"}, "c": set()})


@pytest.mark.parametrize("name", MODULES)
def test_only_the_trainer_knows_transformers_trainer(name) -> None:
    found = {
        (module, taken)
        for module, taken in imported(MODULES[name])
        if module.partition(".")[0] in ("transformers", "accelerate")
    }
    if name not in {"trainer", "checkpoints", "callbacks", "agreement", "quieting", *SHELL}:
        assert found == set()
    if name != "trainer":
        assert not any(taken == "Trainer" or module == "transformers.trainer" for module, taken in found)


@pytest.mark.parametrize("name", MODULES)
def test_nothing_but_hub_and_cli_touches_the_network(name) -> None:
    # Neither classes that read and write the text of a card nor the path of what was fetched before ask the network for anything.
    offline = {
        ("huggingface_hub", taken)
        for taken in ("DatasetCardData", "EvalResult", "ModelCard", "ModelCardData", "constants", "metadata_load")
    }
    roots = {module.partition(".")[0] for module, taken in imported(MODULES[name]) if (module, taken) not in offline}
    if name not in {*HUB, "cli"}:
        assert roots & NETWORK == set()
    # A cache's own files may lie in a store; what fsspec does to get there is not ours.
    if name != "cache.storage":
        assert "fsspec" not in roots


@pytest.mark.parametrize("name", MODULES)
def test_optional_dependencies_are_for_what_users_run(name) -> None:
    roots = {module.partition(".")[0] for module, _ in imported(MODULES[name])}
    if name not in SHELL:
        drawing = {"matplotlib"} if name in ("plots", "run_plots") else set()
        assert (roots - drawing) & {"evaluate", "matplotlib", "sklearn", "torchvision", "timm", "typer"} == set()
    # Not even there when the module is loaded: the extra `demo` may not be installed.
    at_load = {module.partition(".")[0] for module, _ in imported(MODULES[name], everywhere=False)}
    assert at_load & {"matplotlib", "sklearn", "torchvision", "timm"} == set()


def pickling(source: str) -> list[str]:
    """What in a module could run code out of a file."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [name for name in names if name.partition(".")[0] in PICKLES]
            if isinstance(node, ast.ImportFrom) and node.module in ("torch", "numpy"):
                found += [alias.name for alias in node.names if alias.name in ("load", "save")]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (node.value.id, node.attr) in {(m, f) for m in ("torch", "np", "numpy") for f in ("load", "save")}:
                found.append(f"{node.value.id}.{node.attr}")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec"):
            found.append(node.func.id)
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found.append("allow_pickle")
    return found


@pytest.mark.parametrize("name", MODULES)
def test_no_pickle_anywhere(name) -> None:
    assert pickling(MODULES[name].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from dill import loads", "import torch\ntorch.load('x')", "from torch import load", "eval('1')"],
)
def test_pickles_would_be_seen(source) -> None:
    assert len(pickling(source)) == 1


@pytest.mark.parametrize("name", [name for name in MODULES if name not in SHELL])
def test_public_names_exist_and_are_documented(name) -> None:
    module = importlib.import_module(f"{ROOT}.{name}".removesuffix("."))
    assert module.__doc__
    names = getattr(module, "__all__", None)
    if names is None:
        assert name == "cache", f"{name} has no __all__"  # it only groups its modules
        return
    assert list(names) == list(dict.fromkeys(names))
    for public in names:
        value = getattr(module, public)
        if inspect.isclass(value) or inspect.isfunction(value):
            doc = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
            assert doc, f"{name}.{public}"
            assert not doc.startswith(f"{public}("), f"{name}.{public} has a docstring made by dataclass"


def test_the_public_surface() -> None:
    """Adding to it is a decision; removing from it breaks users."""
    assert set(hf_freezecache.__all__) >= {
        "CacheConfig",
        "CachedDataset",
        "FreezeCacheError",
        "FreezeCacheTrainer",
        "FreezeConfig",
        "Split",
        "SuffixModel",
        "split_model",
    }
    assert len(hf_freezecache.__all__) <= 12
    assert (PACKAGE / "py.typed").is_file()


def test_errors_are_of_the_builtin_kind_that_callers_expect() -> None:
    from hf_freezecache import errors

    kinds = {name: getattr(errors, name) for name in errors.__all__}
    base = kinds.pop("FreezeCacheError")
    assert len(kinds) >= 9
    for name, kind in kinds.items():
        assert issubclass(kind, base), name
        assert issubclass(kind, (ValueError, OSError)), name


def test_importing_has_no_side_effects(tmp_path) -> None:
    """In a process of its own, where everything it depends on is loaded before."""
    program = """
        import logging, os, random, sys, threading, warnings
        import accelerate, datasets, filelock, numpy as np, pyarrow, safetensors, torch, tqdm.auto
        import transformers, zstandard
        from datasets.fingerprint import Hasher
        from transformers import PreTrainedModel, Trainer, TrainingArguments

        def state():
            return {
                "python": random.getstate(),
                "numpy": [str(part) for part in np.random.get_state()],
                "torch": torch.get_rng_state().tolist(),
                "environment": dict(os.environ),
                "handlers": list(map(str, logging.getLogger().handlers)),
                "levels": [logging.getLogger(name).level for name in (None, "transformers", "datasets")],
                "our level": logging.getLogger("hf_freezecache").level,
                "our handlers": logging.getLogger("hf_freezecache").handlers,
                "warnings": list(map(str, warnings.filters)),
                "threads": (torch.get_num_threads(), threading.active_count()),
                "torch settings": (
                    torch.get_default_dtype(),
                    torch.are_deterministic_algorithms_enabled(),
                    torch.get_float32_matmul_precision(),
                    torch.is_grad_enabled(),
                ),
                "progress bars": datasets.are_progress_bars_disabled(),
                "verbosity": (transformers.logging.get_verbosity(), datasets.logging.get_verbosity()),
                "hook": sys.excepthook,
                "path": list(sys.path),
                "files": os.listdir("."),
            }

        before = state()
        import hf_freezecache
        after = state()
        changed = [name for name in before if before[name] != after[name]]
        assert not changed, changed
        assert not any(name in sys.modules for name in ("hf_freezecache.demo", "hf_freezecache.cli", "hf_freezecache.hub", "hf_freezecache.pulling", "hf_freezecache.pushing", "typer"))
    """
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:hf_freezecache", "-c", textwrap.dedent(program)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
