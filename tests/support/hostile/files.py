"""What is no file of the cache: links, pipes, devices, folders."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from hf_freezecache.cache.index import shard_name, table_name

from .cases import case
from .tools import replace_by


@case()
def shard_that_links_out_of_the_cache(cache: Path) -> None:
    path = cache / shard_name(0, 0)
    target = cache.parent / "elsewhere"
    path.rename(target)
    path.symlink_to(target)


@case()
def table_that_links_out_of_the_cache(cache: Path) -> None:
    path = cache / table_name(0, 0)
    path.rename(cache.parent / "elsewhere")
    path.symlink_to("../../../elsewhere")


@case("int8")
def state_that_links_out_of_the_cache(cache: Path) -> None:
    (cache / "codec.safetensors").rename(cache.parent / "elsewhere")
    (cache / "codec.safetensors").symlink_to(cache.parent / "elsewhere")


@case()
def view_that_links_out_of_the_cache(cache: Path) -> None:
    (cache / "view-01").rename(cache.parent / "elsewhere")
    (cache / "view-01").symlink_to(cache.parent / "elsewhere", target_is_directory=True)


@case()
def index_that_links_out_of_the_cache(cache: Path) -> None:
    (cache / "index.json").rename(cache.parent / "elsewhere")
    (cache / "index.json").symlink_to(cache.parent / "elsewhere")


@case()
def links_in_a_loop(cache: Path) -> None:
    replace_by(cache / shard_name(0, 0), lambda path: path.symlink_to(path.name))


@case()
def index_that_links_to_itself(cache: Path) -> None:
    replace_by(cache / "index.json", lambda path: path.symlink_to("index.json"))


@case()
def shard_that_is_a_pipe(cache: Path) -> None:
    replace_by(cache / shard_name(0, 0), os.mkfifo)


@case()
def index_that_is_a_pipe(cache: Path) -> None:
    replace_by(cache / "index.json", os.mkfifo)


@case()
def shard_that_is_a_device(cache: Path) -> None:
    replace_by(cache / shard_name(0, 0), lambda path: path.symlink_to("/dev/zero"))


@case()
def index_that_is_a_device(cache: Path) -> None:
    replace_by(cache / "index.json", lambda path: path.symlink_to("/dev/zero"))


@case()
def shard_that_is_a_folder(cache: Path) -> None:
    replace_by(cache / shard_name(0, 0), Path.mkdir)


@case()
def index_that_is_a_folder(cache: Path) -> None:
    replace_by(cache / "index.json", Path.mkdir)


@case()
def folder_that_is_a_file(cache: Path) -> None:
    shutil.rmtree(cache / "view-01")
    (cache / "view-01").write_text("x")
