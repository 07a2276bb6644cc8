"""Points this process, or another one, at a server on the loopback in place of the Hub."""

from __future__ import annotations

import inspect
import os
from pathlib import Path

import pytest
from huggingface_hub import RepoCard, constants

from support.hub_server import HubServer

#: For tests in which a card of a model is pushed or validated.
needs_validation = pytest.mark.skipif(
    "https://huggingface.co/api" in inspect.getsource(RepoCard.validate),
    reason="this huggingface_hub validates cards nowhere but on the Hub",
)


def connect(server: HubServer, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let huggingface_hub, which read its environment when it was imported, talk to the server."""
    for name, value in {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", server.token)
    # The client that transformers keeps, with the address of the server of an earlier test.
    monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)


def environment(server: HubServer, home: Path, **more: str) -> dict[str, str]:
    """Environment of a process that talks to the server."""
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "HF_ENDPOINT": server.url,
        "HF_HUB_OFFLINE": "0",
        "HF_DATASETS_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": str(home),
        "HF_TOKEN": server.token,
        "PYTHONPATH": os.environ.get("PYTHONPATH", str(Path(__file__).parents[2])),
        **more,
    }
