"""Every code block of README.md and docs/, and every example of ``hf-freezecache --help``, as written, against tiny stand-ins.

A server on the loopback takes the place of the Hub; ``stand_ins`` says what it serves. Blocks run in the order of the pages,
in one process and one folder, as a reader would paste them into one session.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from support.documents import PAGES, ROOT, RUN_BY_CI, Block, read_blocks
from support.hub_client import environment
from support.hub_server import HubServer
from support.run_steps import runs_here, split_commands
from support.stand_ins import BEANS, FLOWER_CLASSES, MODEL, make_flowers, publish

from hf_freezecache import CacheConfig
from hf_freezecache.cache.verify import verify_cache
from hf_freezecache.cli.app import app

#: Programs of blocks that start processes of their own; see ``test_several_processes``.
LAUNCHERS = ("torchrun",)
#: Where a document takes for granted what its reader has: first line of the block -> Python that makes it.
PRELUDES = {
    "hf-freezecache report deit-tiny-beans": """
from transformers import Trainer
model = AutoModelForImageClassification.from_pretrained(base, num_labels=3, ignore_mismatched_sizes=True)
args = TrainingArguments("deit-tiny-beans-plain", num_train_epochs=2, remove_unused_columns=False, logging_steps=1)
Trainer(model, args, train_dataset=data["train"].with_transform(augmented)).train()
""",
}
#: What else to do with what a fragment defines: its first line -> Python.
SEQUELS = {
    'cache_config = CacheConfig(cache_dir="caches", codec="auto", num_views=8)': """
FreezeCacheTrainer(
    model=AutoModelForImageClassification.from_pretrained(base, num_labels=3, ignore_mismatched_sizes=True),
    args=TrainingArguments("auto", num_train_epochs=1, remove_unused_columns=False, save_strategy="no"),
    train_dataset=data["train"].with_transform(augmented),
    freeze_config=FreezeConfig(schedule="0:9"),
    cache_config=cache_config,
).train()
""",
}
#: Examples of the command line in an order in which each finds what it needs. The demo's is run by test_cli.
EXAMPLES = ("plan", "build", "inspect", "verify", "push", "pull", "report", "settings", "doctor", "prune")
#: The examples' stand-in for the name that ``build`` has computed.
EXAMPLE_CACHE = "k06-0123456789abcdef"


def launched(block: Block) -> bool:
    return block.language == "bash" and all(command[0] in LAUNCHERS for command in split_commands(block.text))


def opening(snippets: dict[str, str], block: Block) -> str | None:
    return next((code for start, code in snippets.items() if block.text.startswith(start)), None)


def examples() -> dict[str, str]:
    """Return the example of each command."""
    group = typer.main.get_command(app)
    return {
        name: re.search(r"Example: (hf-freezecache .*)", command.epilog or "")[1]
        for name, command in group.commands.items()
    }


def steps_of_readme(folder: Path) -> list[dict[str, str]]:
    steps = []
    for block in read_blocks():
        if block.by_ci or launched(block):
            continue
        step = {"name": block.name, "language": block.language, "text": block.text, "folder": str(folder)}
        for when, snippets in (("before", PRELUDES), ("", None), ("after", SEQUELS)):
            if snippets is None:
                steps.append(step)
            elif (code := opening(snippets, block)) is not None:
                steps.append({**step, "name": f"{when} {block.name}", "language": "python", "text": code})
    return steps


def steps_of_examples(folder: Path, readme: Path) -> list[dict[str, str]]:
    shell = {"language": "bash", "folder": str(folder)}
    python = {"language": "python", "folder": str(folder)}
    after_build = f"""
from pathlib import Path
import shutil
(cache,) = Path("caches").glob("k06-*[0-9a-f]")
cache.rename("caches/{EXAMPLE_CACHE}")
shutil.copytree("{readme}/deit-tiny-beans", "outputs/flowers")
shutil.copytree("{readme}/deit-tiny-beans-plain", "outputs/flowers-plain")
"""
    found, steps = examples(), [{"name": "--help", "text": "hf-freezecache --help", **shell}]
    for name in found:
        steps.append({"name": f"{name} --help", "text": f"hf-freezecache {name} --help", **shell})
    for name in EXAMPLES:
        steps.append({"name": name, "text": found[name], **shell})
        if name == "build":
            steps.append({"name": "after build", "text": after_build, **python})
    return steps


@dataclass
class Ran:
    folder: Path
    server: HubServer
    found: dict[str, dict[str, Any]]
    errors: str

    def check(self, name: str) -> str:
        """Return what a step printed; fail if it did not run."""
        assert name in self.found, f"{name} was not run:\n{self.errors[-4000:]}"
        assert "error" not in self.found[name], f"{name}: {self.found[name]['error']}\n{self.errors[-4000:]}"
        return self.found[name]["output"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("hub")
    with HubServer(folder / "server") as server:
        publish(server, folder)
        yield server


def working_folder(folder: Path) -> Path:
    """A folder that has what a checkout has."""
    folder.mkdir()
    (folder / "recipes").symlink_to(ROOT / "recipes", target_is_directory=True)
    make_flowers(folder / "flower_photos")
    return folder


def run(hub: HubServer, folder: Path, steps: list[dict[str, str]]) -> Ran:
    """Run steps in one process, in which the server stands for the Hub."""
    (folder / "steps.json").write_text(json.dumps(steps))
    (folder / "found").mkdir()
    script = ROOT / "tests" / "support" / "run_steps.py"
    done = subprocess.run(
        [sys.executable, str(script), "steps.json", str(folder / "found" / "found.json")],
        cwd=folder,
        env=environment(hub, folder / "home", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert (folder / "found" / "found.json").exists(), done.stderr[-4000:]
    return Ran(folder, hub, json.loads((folder / "found" / "found.json").read_text()), done.stderr)


@pytest.fixture(scope="module")
def ran(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Every block and example, one after another."""
    folder = tmp_path_factory.mktemp("ran")
    readme, others = working_folder(folder / "readme"), working_folder(folder / "examples")
    return run(hub, folder, steps_of_readme(readme) + steps_of_examples(others, readme))


def test_no_block_is_left_out() -> None:
    blocks = read_blocks()
    assert len(blocks) >= 10
    assert [block.by_ci for block in blocks].count(True) == len(RUN_BY_CI)
    for block in blocks:
        assert block.language in ("python", "bash"), f"{block.name}: nothing here runs {block.language!r}"
        if block.language == "bash" and not block.by_ci:
            for command in split_commands(block.text):
                assert runs_here(command) or launched(block), f"{block.name}: nothing here runs {command}"
        assert block.by_ci or "..." not in block.text, f"{block.name} cannot be run as it stands"
    for snippets in (PRELUDES, SEQUELS):
        for start in snippets:
            assert sum(block.text.startswith(start) for block in blocks) == 1, start


@pytest.mark.parametrize(("page", "lines"), [("README.md", 12), ("docs/quick_start.md", 20)])
def test_scripts_are_short(page, lines) -> None:
    script = next(block for block in read_blocks(page) if block.language == "python")
    assert len([line for line in script.text.splitlines() if line.strip()]) <= lines
    assert max(map(len, script.text.splitlines())) <= 120


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def anchors_of(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page) -> None:
    here = ROOT / page
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", here.read_text(), flags=re.DOTALL)):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        found = (here.parent / path).resolve() if path else here
        assert found.exists(), target
        assert not anchor or anchor in anchors_of(found), target


def test_every_page_is_listed() -> None:
    pages = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}
    assert pages == {page for page in PAGES if page.startswith("docs/")}
    index = (ROOT / "docs" / "README.md").read_text()
    assert all(f"({Path(page).name})" in index for page in pages - {"docs/README.md"})


def test_blocks_of_settings_run_as_they_stand() -> None:
    """In this process; the slow tests run all blocks in one session."""
    blocks = [
        block for block in read_blocks() if block.text.startswith(("CacheConfig(", "cache_config = CacheConfig("))
    ]
    assert len(blocks) >= 2
    for block in blocks:
        exec(block.text, {"CacheConfig": CacheConfig})


@pytest.mark.slow
def test_the_script_of_the_quick_start_runs(hub: HubServer, tmp_path: Path) -> None:
    steps = steps_of_readme(working_folder(tmp_path / "readme"))
    names = [block.name for block in read_blocks("docs/quick_start.md")]
    last = next(number for number, step in enumerate(steps) if step["name"] == names[0])
    ran = run(hub, tmp_path, steps[: last + 1])
    ran.check(steps[last]["name"])
    assert "model.safetensors" in ran.server.files("user/deit-tiny-beans", "model")


@pytest.mark.slow
@pytest.mark.parametrize(
    "block", [block for block in read_blocks() if not block.by_ci and not launched(block)], ids=lambda block: block.name
)
def test_block(block, ran) -> None:
    if opening(PRELUDES, block) is not None:
        ran.check(f"before {block.name}")
    ran.check(block.name)
    if opening(SEQUELS, block) is not None:
        ran.check(f"after {block.name}")


@pytest.mark.slow
def test_what_the_blocks_leave(ran) -> None:
    """The script has pushed a model with its card, and a private cache; the report is there."""
    for block in read_blocks():
        if not block.by_ci and not launched(block):
            ran.check(block.name)
    pushed = ran.server.files("user/deit-tiny-beans", "model")
    assert {"model.safetensors", "config.json", "preprocessor_config.json", "README.md"} <= set(pushed)
    assert ran.server.repo("user/beans-states").private
    card = ran.server.read("user/beans-states", "README.md").decode()
    assert BEANS in card
    flowers = ran.server.read("user/flowers-k09", "README.md").decode()
    for words in ("license: cc-by-2.0", MODEL, *FLOWER_CLASSES):
        assert words in flowers
    assert verify_cache(ran.folder / "readme" / "flowers-k09") == []
    page = ran.folder / "readme" / "deit-tiny-beans" / "freezecache_report" / "report.html"
    assert "deit-tiny-beans-plain" in page.read_text()


def test_the_tables_are_those_of_the_records(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "recipes" / "benchmarks"))
    from readme_table import SECTIONS, section

    for mark, (page, _) in SECTIONS.items():
        assert f"-->\n{section(mark)}\n<!-- /{mark} -->" in (ROOT / page).read_text(), mark


def test_every_command_has_an_example() -> None:
    assert set(examples()) == {*EXAMPLES, "demo"}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name, ran) -> None:
    assert ran.check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*EXAMPLES, "demo", ""])
def test_help(name, ran) -> None:
    assert "Usage: hf-freezecache" in ran.check(f"{name} --help".strip())


@pytest.mark.slow
@pytest.mark.parametrize("block", [block for block in read_blocks() if launched(block)], ids=lambda block: block.name)
def test_several_processes(block, hub, tmp_path) -> None:
    """Verbatim, by a shell: three processes, whose imports take most of the time."""
    folder = working_folder(tmp_path / "work")
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "torchrun").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m torch.distributed.run "$@"\n')
    (programs / "torchrun").chmod(0o755)
    env = environment(hub, tmp_path / "home", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", GLOO_SOCKET_IFNAME="lo")
    env["PATH"] = f"{programs}{os.pathsep}{env['PATH']}"
    shell = shutil.which("bash") or "bash"
    done = subprocess.run(
        [shell, "-c", block.text], cwd=folder, env=env, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert (folder / "out" / "model.safetensors").exists()
