"""The short recipes as a user runs them, on a tiny model; and ``recipes/README.md``, which lists them."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.children import free_port
from transformers import AutoModelForImageClassification

RECIPES = Path(__file__).parents[2] / "recipes"
#: In the order in which one reads them.
TOUR = ("finetune", "lora", "weighted_loss", "sweep", "two_processes", "share_backbone")
PATHS = ("--model", "model", "--data", "data")
SHORT = (*PATHS, "--epochs", "2")


def test_the_tour_is_short_and_listed_in_order() -> None:
    listed = re.findall(r"\]\((\w+)\.py\)", (RECIPES / "README.md").read_text())
    assert listed == [*TOUR, "image_classification"]
    assert set(listed) == {path.stem for path in RECIPES.glob("*.py")}
    for name in TOUR:
        text = (RECIPES / f"{name}.py").read_text()
        assert len(text.splitlines()) < 100, name
        header = text.split('"""')[1]
        assert f"recipes/{name}.py" in header, f"{name} does not say how it is run"


@pytest.mark.filterwarnings("ignore:'pin_memory':UserWarning")
def test_the_shortest_script_trains_within_its_budget(workspace, run_recipe) -> None:
    (told,) = [line for line in run_recipe("finetune.py", "model", "data") if line.startswith("accuracy")]
    assert re.fullmatch(r"accuracy [0-9.]+%", told)
    assert AutoModelForImageClassification.from_pretrained("outputs/finetune").config.id2label[3] == "d"
    assert list(Path("caches").glob("k*"))
    assert Path("outputs/finetune/freezecache_run.json").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:'pin_memory':UserWarning", "ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("schedule", ["0:2", "auto"])
def test_adapters_train_behind_frozen_blocks(workspace, run_recipe, schedule) -> None:
    pytest.importorskip("peft")
    told = run_recipe("lora.py", *SHORT, "--rank", "2", "--learning_rate", "1e-2", "--schedule", schedule)
    assert any(re.match(r"accuracy [0-9.]+%; the merged model is in outputs/lora/merged", line) for line in told)
    (cache,) = {path.name[:3] for path in Path("caches").glob("k*") if (path / "index.json").exists()}
    frozen = int(cache[1:])
    before = AutoModelForImageClassification.from_pretrained("model").state_dict()
    after = AutoModelForImageClassification.from_pretrained("outputs/lora/merged").state_dict()
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    blocks = {int(found[1]) for name in moved if (found := re.search(r"\.layers?\.(\d+)\.", name))}
    assert blocks == set(range(frozen, 4))
    assert "classifier.weight" in moved


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:'pin_memory':UserWarning")
def test_a_weighted_loss_trains_from_the_cache_of_any_weights(workspace, run_recipe, images) -> None:
    arguments = (*SHORT, "--schedule", "0:2", "--learning_rate", "1e-2")
    told = run_recipe("weighted_loss.py", *arguments)
    assert any(re.fullmatch(r"mean accuracy over classes [0-9.]+%", line) for line in told)
    first = AutoModelForImageClassification.from_pretrained("outputs/weighted_loss").state_dict()
    run_recipe("weighted_loss.py", *arguments, "--output_dir", "again")
    again = AutoModelForImageClassification.from_pretrained("again").state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert len([path for path in Path("caches").glob("k02-*") if path.is_dir()]) == 1


def test_the_weights_are_the_inverse_of_the_counts() -> None:
    recipe = runpy.run_path(str(RECIPES / "weighted_loss.py"))
    loss = recipe["WeightedLoss"]({"label": [0, 0, 0, 1]}, 3)
    assert loss.weight.tolist() == pytest.approx([4 / 9, 4 / 3, 4 / 3])
    logits, labels = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), torch.tensor([0, 1])
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    whole = float(4 / 9 * losses[0] + 4 / 3 * losses[1])
    assert float(loss(SimpleNamespace(logits=logits), labels)) == pytest.approx(whole / 2)
    assert float(loss(SimpleNamespace(logits=logits), labels, num_items_in_batch=4)) == pytest.approx(whole / 4)


@pytest.mark.slow
def test_two_processes_build_and_train_together(workspace) -> None:
    arguments = [str(RECIPES / "two_processes.py"), *SHORT, "--schedule", "0:2", "--batch_size", "5", "--use_cpu"]
    arguments += ["--chunk_size", "8", "--shard_chunks", "2"]
    launcher = ["torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1"]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "--master_port", str(free_port()), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(re.findall(r"2 processes: accuracy [0-9.]+%", done.stdout)) == 1
    assert Path("outputs/two_processes/model.safetensors").exists()
    assert len([path for path in Path("caches").glob("k02-*") if path.is_dir()]) == 1
