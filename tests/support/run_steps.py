"""Run by tests as ``run_steps.py STEPS FOUND``: code and commands of documents, one after another, in this one process.

``STEPS`` is a list, in JSON, of ``{"name", "language", "text", "folder"}``. Python shares one namespace, as in one session.
Commands are those of a shell without its syntax: lines joined at backslashes, comments dropped, ``hf-freezecache`` and
``python SCRIPT`` called in this process with ``sys.argv`` as a shell would set it. ``FOUND`` gets seconds and exit status of
each step by its name; after a step that fails no other is tried.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import shlex
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers  # noqa: F401  (before warnings are errors)

from hf_freezecache.cli.app import app
from support.image_processors import name_without_torchvision

#: Of the HTTP client, about how huggingface_hub uploads; of data loaders, where there is no accelerator.
IGNORED = [("Use 'content=", DeprecationWarning), ("'pin_memory'", UserWarning)]


def split_commands(text: str) -> list[list[str]]:
    """Return the words of each command."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def runs_here(command: list[str]) -> bool:
    return command[0] == "hf-freezecache" or (command[0] == "python" and command[1].endswith(".py"))


def run_command(command: list[str]) -> int:
    """Return the exit status."""
    arguments = command[1:] if command[0] == "python" else ["hf-freezecache", *command[1:]]
    before, sys.argv = sys.argv, arguments
    try:
        if command[0] == "python":
            runpy.run_path(arguments[0], run_name="__main__")
        else:
            app()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv = before
    return 0


def run_step(step: dict[str, str], namespace: dict[str, Any]) -> None:
    """Run one step.

    Raises:
        RuntimeError: A command ended with another exit status than 0.
    """
    if step["language"] == "python":
        exec(compile(step["text"], step["name"], "exec"), namespace)
        return
    for command in split_commands(step["text"]):
        if not runs_here(command):
            raise RuntimeError(f"cannot run {command}")
        status = run_command(command)
        if status != 0:
            raise RuntimeError(f"exit status {status}: {shlex.join(command)}")


def main() -> None:
    steps, found = json.loads(Path(sys.argv[1]).read_text()), {}
    name_without_torchvision()
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    for message, category in IGNORED:
        warnings.filterwarnings("ignore", message, category)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for step in steps:
        started = time.perf_counter()
        os.chdir(step["folder"])
        output = Path(sys.argv[2]).with_name(f"{len(found)}.txt")
        try:
            with output.open("w") as file, contextlib.redirect_stdout(file):
                run_step(step, namespace)
        except BaseException as error:
            found[step["name"]] = {"error": f"{type(error).__name__}: {error}"}
            traceback.print_exc()
            break
        finally:
            seconds = time.perf_counter() - started
            found.setdefault(step["name"], {}).update(seconds=seconds, output=output.read_text())
            Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
