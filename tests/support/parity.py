"""Compares what was trained, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def parameters_of(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(a, b) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def assert_resumes_everywhere(train: Callable[..., Any]) -> None:
    """Train once with a checkpoint every third step, and go on from each: losses and parameters must be the same.

    Args:
        train: Takes ``output_dir``, ``resume`` and settings of the trainer, and returns the trainer, trained; it keeps ``losses``.
    """
    saving = {"save_strategy": "steps", "save_steps": 3}
    whole = train(output_dir="whole", resume=None, **saving)
    folders = sorted(Path("whole").glob("checkpoint-*"))
    assert len(folders) > 1
    for folder in folders:
        done = int(folder.name.partition("-")[2])
        resumed = train(output_dir="again", resume=str(folder), **saving)
        assert getattr(resumed, "losses", []) == whole.losses[done:], folder
        assert_same(parameters_of(resumed.model), parameters_of(whole.model))
