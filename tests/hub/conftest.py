"""A server, and a cache to push to it."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import tiny_cache
from support.hub_client import connect
from support.hub_server import HubServer


@pytest.fixture
def server(tmp_path, monkeypatch):
    with HubServer(tmp_path / "server") as server:
        connect(server, tmp_path / "home", monkeypatch)
        yield server


@pytest.fixture
def cache(tmp_path) -> Path:
    """24 samples in 2 views: 4 shards each, and as many parts of the index."""
    return tiny_cache.build(tmp_path / "caches", tiny_cache.make_plan(24)).directory
