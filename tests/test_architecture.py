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


def external_imports(name: str, everywhere: bool = True) -> set[tuple[str, str]]:
    found = set(imported(MODULES[name], everywhere))
    return {(module, taken) for module, taken in found if module.partition(".")[0] != ROOT}


def roots(found: set[tuple[str, str]]) -> set[str]:
    return {module.partition(".")[0] for module, _ in found}


def in_package(name: str, *packages: str) -> bool:
    return name.partition(".")[0] in packages


def test_imports_are_read() -> None:
    """The other tests would pass on nothing."""
    assert ("transformers", "Trainer") in external_imports("trainer")
    assert ("zstandard", "") in external_imports("codecs.entropy")
    assert len(FILES) >= 20


def test_imports_point_down_the_floors() -> None:
    """The contracts of ``[tool.importlinter]``: the order of the floors, and who must not know whom."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from importlinter.cli import lint_imports_command; lint_imports_command()",
            "--no-cache",
        ],
        cwd=PACKAGE.parent,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def own_imports(name: str) -> set[str]:
    """Modules of this package that a module imports when it is loaded."""
    found = set()
    for module, taken in imported(MODULES[name], everywhere=False):
        if module == ROOT or module.startswith(f"{ROOT}."):
            short = module.removeprefix(ROOT).removeprefix(".")
            deeper = f"{short}.{taken}".removeprefix(".")
            found.add(deeper if deeper in MODULES else short)
    return found - {name}


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules that import each other in a circle, directly or not; empty if there are none."""
    remaining = {name: set(targets) for name, targets in graph.items()}
    while leaves := {name for name, targets in remaining.items() if not targets & remaining.keys()}:
        for name in leaves:
            del remaining[name]
    return sorted(remaining)


def test_no_import_cycles() -> None:
    assert "cache.index" in own_imports("cache.reader")
    # A package's own `__init__` may name its modules, which do not import it.
    assert find_cycle({name: own_imports(name) for name in MODULES}) == []
    assert find_cycle({"a": {"b"}, "b": {"a"}, "c": set()}) == ["a", "b"]


def test_only_the_trainer_knows_transformers_trainer() -> None:
    knows_transformers = {
        *(
            "trainer",
            "training.weights",
            "training.hooks",
            "report.callback",
            "distributed.jit_checkpoint",
            "hub.client",
            "hub.dataset_card",
        ),
        *("cli.build", "cli.demo"),
    }
    for name in MODULES:
        found = {
            (module, taken)
            for module, taken in external_imports(name)
            if module.partition(".")[0] in ("transformers", "accelerate")
        }
        assert not found or name in knows_transformers, name
        if name != "trainer":
            assert not any(taken == "Trainer" or module == "transformers.trainer" for module, taken in found), name


def test_nothing_but_hub_and_cli_touches_the_network() -> None:
    # Neither classes that read and write the text of a card, nor the path of what was fetched before, nor checks of
    # dataclasses ask the network for anything.
    offline = {
        *("DatasetCardData", "EvalResult", "ModelCard", "ModelCardData", "constants", "metadata_load", "DatasetCard"),
    }
    for name in MODULES:
        found = {
            (module, taken)
            for module, taken in external_imports(name)
            if module not in ("huggingface_hub.dataclasses", "huggingface_hub.errors")
            and (module, taken) not in {("huggingface_hub", o) for o in offline}
        }
        if not in_package(name, "hub", "cli"):
            assert not roots(found) & NETWORK, name
        # A cache's own files may lie in a store; what fsspec does to get there is not ours.
        if name != "cache.storage":
            assert "fsspec" not in roots(found), name


@pytest.mark.slow
def test_optional_dependencies_are_for_what_users_run() -> None:
    for name in MODULES:
        if not in_package(name, "cli"):
            drawing = {"matplotlib"} if in_package(name, "report") else set()
            optional = {"evaluate", "matplotlib", "sklearn", "torchvision", "timm", "typer"}
            assert not (roots(external_imports(name)) - drawing) & optional, name
        # Not even there when the module is loaded: the extra `demo` may not be installed.
        at_load = roots(external_imports(name, everywhere=False))
        assert not at_load & {"matplotlib", "sklearn", "torchvision", "timm"}, name


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


def test_no_pickle_anywhere() -> None:
    assert {
        name: found for name, path in MODULES.items() if (found := pickling(path.read_text(encoding="utf-8")))
    } == {}


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from dill import loads", "import torch\ntorch.load('x')", "from torch import load", "eval('1')"],
)
def test_pickles_would_be_seen(source) -> None:
    assert len(pickling(source)) == 1


def test_public_names_exist_and_are_documented() -> None:
    for name, path in MODULES.items():
        if in_package(name, "cli") or name == "__main__":
            continue
        module = importlib.import_module(f"{ROOT}.{name}".removesuffix("."))
        assert module.__doc__, name
        names = getattr(module, "__all__", None)
        if names is None:
            assert path.name == "__init__.py", f"{name} has no __all__"  # it only groups its modules
            continue
        assert list(names) == list(dict.fromkeys(names)), name
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


@pytest.mark.slow
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
        loaded = [name for name in ("hf_freezecache.cli", "hf_freezecache.hub", "typer") if name in sys.modules]
        assert not loaded, loaded
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
