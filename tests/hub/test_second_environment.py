"""What the quick start's script pushes serves others: plain libraries in an environment without this package, then with it.

The environments are made with pip, which takes minutes.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.documents import ROOT, read_blocks
from support.hub_client import environment
from support.hub_server import HubServer
from support.stand_ins import BEAN_CLASSES, publish
from transformers import AutoModelForImageClassification

PLAIN = ["torch", "transformers", "datasets"]

LOOK = """
import importlib.util, json, torch
from datasets import load_dataset
from transformers import AutoModelForImageClassification
assert importlib.util.find_spec("hf_freezecache") is None
model = AutoModelForImageClassification.from_pretrained("user/deit-tiny-beans").eval()
images = torch.randn((2, 3, 16, 16), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    logits = model(images).logits.tolist()
rows = load_dataset("user/beans-states", "view-00", split="train")
everything = load_dataset("user/beans-states", split="train")
print(json.dumps({
    "kind": type(model).__name__, "logits": logits, "labels": rows["labels"][:], "columns": rows.column_names,
    "classes": rows.features["labels"].names, "rows": len(rows), "all": len(everything),
    "index": rows["sample_index"][:],
}))
"""

TRAIN = """
import json, torch
from transformers import AutoModelForImageClassification, TrainingArguments
from hf_freezecache import CachedDataset, FreezeCacheTrainer, SuffixModel
cached = CachedDataset.from_pretrained("user/beans-states")
model = AutoModelForImageClassification.from_pretrained("user/deit-tiny-beans")
before = {name: value.clone() for name, value in model.state_dict().items()}
args = TrainingArguments("head", num_train_epochs=12, learning_rate=1e-2, use_cpu=True, logging_steps=1, save_strategy="no")
trainer = FreezeCacheTrainer(model=SuffixModel.for_cache(model, cached), args=args, train_dataset=cached)
trainer.train()
model.save_pretrained("trained")
print(json.dumps({
    "split_point": cached.reader.index.split_point,
    "changed": [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])],
    "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
}))
"""


def install(python: Path, *what: str) -> None:
    pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "-c", str(ROOT / ".ci" / "constraints.txt"), *what], check=True, timeout=900)


def make_environment(folder: Path, *what: str) -> Path:
    """Return the interpreter of a new virtual environment."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    install(folder / "bin" / "python", *what)
    return folder / "bin" / "python"


def run(python: Path | str, program: str, folder: Path, env: dict[str, str]) -> Any:
    """Return the JSON in the last line that a program prints."""
    folder.mkdir()
    done = subprocess.run(
        [str(python), "-c", program], cwd=folder, env=env, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.long
def test_what_the_script_pushes_serves_others(tmp_path) -> None:
    (tmp_path / "stand-ins").mkdir()
    calm = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ""}
    first = make_environment(tmp_path / "venv-1", str(ROOT))
    second = make_environment(tmp_path / "venv-2", *PLAIN)
    script = next(block.text for block in read_blocks("docs/quick_start.md") if block.language == "python")
    with HubServer(tmp_path / "server") as server:
        publish(server, tmp_path / "stand-ins")
        run(first, f"{script}\nprint(0)", tmp_path / "one", environment(server, tmp_path / "home-1", **calm))
        # Neither images nor the model they came from are there for those who come later.
        for repo in [("dataset", "AI-Lab-Makerere/beans"), ("model", "facebook/deit-tiny-patch16-224")]:
            del server.repos[repo]
        seen = run(second, LOOK, tmp_path / "two", environment(server, tmp_path / "home-2", **calm))
        install(second, str(ROOT))
        trained = run(second, TRAIN, tmp_path / "three", environment(server, tmp_path / "home-3", **calm))

    model = AutoModelForImageClassification.from_pretrained(tmp_path / "one" / "deit-tiny-beans").eval()
    with torch.no_grad():
        logits = model(torch.randn((2, 3, 16, 16), generator=torch.Generator().manual_seed(0))).logits
    assert seen["kind"] == "ViTForImageClassification"
    assert torch.allclose(torch.tensor(seen["logits"]), logits, atol=1e-5)
    assert (seen["rows"], seen["classes"]) == (24, BEAN_CLASSES)
    assert seen["all"] == 24  # of the first view alone
    assert {"sample_index", "view", "labels"} <= set(seen["columns"])
    assert sorted(seen["index"]) == list(range(24))
    assert seen["labels"] == [row % 3 for row in seen["index"]]

    assert trained["changed"]
    blocks = [int(match[1]) for name in trained["changed"] if (match := re.search(r"\.layers?\.(\d+)\.", name))]
    assert set(blocks) == set(range(trained["split_point"], 12))
    assert not any("embeddings" in name for name in trained["changed"])
    assert sum(trained["losses"][-3:]) < sum(trained["losses"][:3])  # epochs of three steps
    whole = AutoModelForImageClassification.from_pretrained(tmp_path / "three" / "trained")
    assert whole.config.num_labels == 3
