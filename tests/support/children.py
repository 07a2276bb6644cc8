"""Child processes of tests, forked from a server that has imported what takes seconds to import.

A child has a folder, environment variables and an output file of its own, can be killed, and reports its exit status.
What libraries read from the environment when they are imported (``HF_HOME``, say) is read by then.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["support.preloaded"])


def enter(function: Callable, arguments: tuple, folder: str, variables: dict[str, str], output: str) -> None:
    """Run in the child."""
    os.chdir(folder)
    os.environ.update(variables)
    with open(output, "wb", buffering=0) as file:  # noqa: PTH123
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)
    function(*arguments)


class Child:
    """A running call of a function, which ``pickle`` must find by its name in a module other than the test's own."""

    def __init__(
        self, function: Callable, *arguments: Any, folder: Path | None = None, variables: dict[str, str] | None = None
    ) -> None:
        handle, name = tempfile.mkstemp(suffix=".txt")
        os.close(handle)
        self._output = Path(name)
        self._process = CONTEXT.Process(
            target=enter, args=(function, arguments, str(folder or Path.cwd()), dict(variables or {}), name)
        )
        self._process.start()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._process.close()
        self._output.unlink()

    @property
    def output(self) -> str:
        """What the child has printed so far, errors included."""
        return self._output.read_text(errors="replace")

    @property
    def status(self) -> int | None:
        """Exit status, negative for a signal, None while the child runs."""
        return self._process.exitcode

    def wait(self, timeout: float = 280) -> int:
        """Return the exit status.

        Raises:
            TimeoutError: The child still runs; it is killed.
        """
        self._process.join(timeout)
        if self.status is None:
            self.kill()
            raise TimeoutError(f"a child process ran for more than {timeout:.0f} s:\n{self.output[-4000:]}")
        return self.status

    def wait_for(self, path: Path, timeout: float = 120) -> None:
        """Wait until the child has made a file."""
        deadline = time.monotonic() + timeout
        while not path.exists():
            assert self.status is None, f"a child process ended before it made {path}:\n{self.output[-4000:]}"
            assert time.monotonic() < deadline, f"a child process did not make {path} in {timeout:.0f} s"
            time.sleep(0.02)

    def kill(self) -> None:
        """Send SIGKILL and wait."""
        self._process.kill()
        self._process.join()


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def run_group(
    function: Callable, *arguments: Any, folders: list[Path], nodes: int = 1, timeout: float = 280
) -> list[str]:
    """Call a function in as many processes as there are folders, as torchrun would; return what each printed.

    Raises:
        RuntimeError: A process failed. The others are killed.
    """
    processes, port = len(folders), str(free_port())
    local = processes // nodes
    children = []
    try:
        for rank, folder in enumerate(folders):
            variables = {
                **{"RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
                **{"LOCAL_RANK": str(rank % local), "LOCAL_WORLD_SIZE": str(local), "GROUP_RANK": str(rank // local)},
                "GLOO_SOCKET_IFNAME": "lo",
                # As torchrun sets it. Without, accelerate lets a lone process on a machine have all cores, whatever torch was
                # told before, and the bits of some processors' kernels depend on the number of threads.
                "OMP_NUM_THREADS": "1",
            }
            children.append(Child(function, *arguments, folder=folder, variables=variables))
        deadline = time.monotonic() + timeout
        while any(child.status is None for child in children) and not any(child.status for child in children):
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        outputs = [child.output for child in children]
        statuses = [child.status for child in children]
        if any(status != 0 for status in statuses):
            raise RuntimeError(f"exit statuses {statuses}:\n" + "\n".join(output[-4000:] for output in outputs))
        return outputs
    finally:
        for child in children:
            child.__exit__()
