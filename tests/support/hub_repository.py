"""The repository that tests push to, and what lies there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from hf_freezecache import CachedDataset
from support.hub_client import environment
from support.hub_server import HubServer

REPO = "user/cache"


def states(dataset: CachedDataset, keys: list) -> torch.Tensor:
    return torch.stack([item["hidden_states"] for item in dataset.__getitems__(keys)])


def shards_of(server: HubServer) -> dict[str, int]:
    return {path: count for path, count in server.uploads.items() if path.endswith((".safetensors", ".parquet"))}


def make_folder(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def assert_no_rows(server: HubServer, home: Path) -> None:
    """Another process, which has plain ``datasets``, loads nothing."""
    code = f"import datasets; print(datasets.load_dataset('{REPO}'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(server, home / "elsewhere"),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0, done.stdout
    assert "No (supported) data files found" in done.stderr
