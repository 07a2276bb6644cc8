"""Every test is seeded, offline and in a temporary folder. CONTRIBUTING.md says how to use the markers and options."""

from __future__ import annotations

import gc
import json
import os
import runpy
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Child processes import ``support``, too.
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest
from support.slow_budget import SlowBudget, spread

# torch and what builds on it is imported where it is used: pytest-xdist's controller runs no test, and starts workers sooner.
if TYPE_CHECKING:
    import datasets
    import transformers

#: Examples of each property test, by the name in the environment variable ``HYPOTHESIS_PROFILE``.
EXAMPLES = {"default": 10, "ci": 50, "nightly": 500}
for _profile, _examples in EXAMPLES.items():
    hypothesis.settings.register_profile(_profile, deadline=None, derandomize=True, max_examples=_examples)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

#: Files that take longest.
LONG = (
    *("test_crash_safety", "test_distributed", "test_extra_views_training", "test_lossy_training"),
    *("test_readme", "test_trainer", "test_training_from_the_hub", "test_what_a_repository_says", "test_writer"),
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--slow-budget",
        type=float,
        metavar="SECONDS",
        help="start no slow test once slow tests have taken this long; files share the time, and the rest is skipped",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--slow-budget") is not None:
        config.pluginmanager.register(SlowBudget(config), "slow-budget")


@pytest.hookimpl(tryfirst=True)  # before ``-m`` looks at the markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what ``by_default`` leaves out, and begin with the long files: others fill the time beside the last."""
    families: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("by_default") is not None:
            families.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for family in families.values():
        kept = spread(len(family), *family[0].get_closest_marker("by_default").args)
        for number, item in enumerate(family):
            if number not in kept:
                item.add_marker("slow")
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture(scope="session", autouse=True)
def _session() -> Iterator[Callable[..., None]]:
    """Set up once what holds for all tests; yield how a report is drawn.

    There is no network, and no garbage among imported modules. Runs that save draw no report: it takes a second or two, which
    only tests with the fixture ``drawing`` need.
    """
    import torch
    from support.image_processors import name_without_torchvision

    from hf_freezecache.report.callback import ReportCallback

    name_without_torchvision()  # for recipes
    gc.collect()
    gc.freeze()  # accelerate asks for collections: they would spend most of the time on what imports made
    torch.set_num_threads(1)  # bits depend on it, those of fixtures that come before the first test as well
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> object:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise RuntimeError(f"a test tried to reach {address}")
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded)
        draw = ReportCallback.draw
        patch.setattr(ReportCallback, "draw", lambda self, output_dir: None)
        yield draw


@pytest.fixture(autouse=True)
def _isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seed the test, give it a folder, and let it know nothing of the tests before."""
    import datasets
    import torch
    from support.seeds import seed_all

    from hf_freezecache.training.remembered import forget_all

    forget_all()
    monkeypatch.chdir(tmp_path)
    seed_all()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()


@pytest.fixture
def always_paying(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``mode="auto"`` take every cache for one that pays."""
    monkeypatch.setattr("hf_freezecache.training.stage.predict_costs", lambda *args: {})


@pytest.fixture
def drawing(_session: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs draw their report."""
    from hf_freezecache.report.callback import ReportCallback

    monkeypatch.setattr(ReportCallback, "draw", _session)


@pytest.fixture
def model() -> transformers.PreTrainedModel:
    from support.tiny import tiny_vit

    return tiny_vit()


@pytest.fixture(scope="session")
def images() -> datasets.Dataset:
    from support.images import make_images

    return make_images(50)


@pytest.fixture
def train_dataset(images: datasets.Dataset) -> datasets.Dataset:
    from support.tiny import TinyTransform

    return images.with_transform(TinyTransform(augment=True))


@pytest.fixture
def eval_dataset(images: datasets.Dataset) -> datasets.Dataset:
    from support.tiny import TinyTransform

    return images.select(range(20)).with_transform(TinyTransform(augment=False))


@pytest.fixture
def workspace(images: datasets.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Go into a folder with what recipes ask for: ``model``, a tiny one, and ``data``."""
    from support.tiny import PROCESSOR, tiny_vit

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    tiny_vit().save_pretrained("model")
    Path("model/preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    images.select(range(30)).to_parquet("data/train.parquet")
    images.select(range(30, 50)).to_parquet("data/test.parquet")
    return tmp_path


@pytest.fixture
def run_recipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """Run a recipe in this process, by its path in ``recipes/``; return the lines that it prints, without Trainer's logs."""

    def run(name: str, *arguments: str) -> list[str]:
        script = Path(__file__).parents[1] / "recipes" / name
        monkeypatch.setattr(sys, "argv", [str(script), *arguments])
        monkeypatch.syspath_prepend(str(script.parent))
        capsys.readouterr()
        runpy.run_path(str(script), run_name="__main__")
        return [line for line in capsys.readouterr().out.splitlines() if not line.startswith("{")]

    return run
