"""Several processes, started as users start them: what they train, read, write and send to each other."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
#: Parameters of the tiny model behind 0, 1 and 3 frozen blocks.
TRAINABLE = {0: 10068, 1: 6772, 3: 2324}


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    return {**os.environ, "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def torchrun(processes: int, *arguments: str, port: int | None = None, nodes: str = "1", node: str = "0") -> list[str]:
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--nnodes", nodes),
        *("--node_rank", node, "--master_addr", "127.0.0.1", "--master_port", str(port or free_port())),
        *(str(ROOT / "tests" / "support" / "many.py"), *arguments),
    ]


def launch(folder: Path, processes: int, *scenarios: str) -> list[dict[str, Any]]:
    """Run scenarios of ``many.py`` in a folder; return what each process found."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        torchrun(processes, *scenarios),
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"found-{rank}-of-{processes}.json").read_text()) for rank in range(processes)]


def hashes(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".lock"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Any]]:
    """What two processes found, one start for all scenarios."""
    scenarios = ["parity", "build", "one_fails:always", "one_fails:auto", "lossy", "terminated", "twice", "refused"]
    return launch(folder, 2, *scenarios, "save:two", "too_many")


def test_cached_equals_frozen_uncached_to_the_bit(two) -> None:
    for found in two:
        parity = found["parity"]
        assert parity["always"]["losses"] == parity["never"]["losses"]
        assert parity["always"]["digest"] == parity["never"]["digest"]
    assert two[0]["parity"]["always"]["digest"] == two[1]["parity"]["always"]["digest"]
    assert two[0]["parity"]["always"]["losses"] != two[1]["parity"]["always"]["losses"]  # other samples each


def test_resuming_at_every_checkpoint_is_the_same_to_the_bit(two) -> None:
    for found in two:
        parity = found["parity"]
        assert parity["saved"]["built"] == [0, 0]  # the caches of the first run
        assert len(parity["resumed"]) == 5
        for name, resumed in parity["resumed"].items():
            assert resumed["digest"] == parity["always"]["digest"], name
            assert resumed["steps"] == 24


def test_each_chunk_is_decoded_by_one_process_in_an_epoch(two) -> None:
    counts = [[stage["decoded"] for stage in found["parity"]["always"]["stages"]] for found in two]
    assert counts == [[[], [4], [4, 4]], [[], [3], [3, 3]]]  # 50 rows in chunks of 8


def test_only_gradients_of_what_trains_are_sent(two) -> None:
    for found in two:
        for stage in found["parity"]["always"]["stages"]:
            assert stage["reduced"] == TRAINABLE[stage["split_point"]]
            assert stage["find_unused"] is False


def test_what_is_written_does_not_depend_on_the_number_of_processes(two, one, folder: Path) -> None:
    for name in ("lossless", "lossy"):
        alone, both = (hashes(folder / f"{name}-{processes}") for processes in (1, 2))
        assert len(alone) > 50
        assert alone == both
    assert one["build"]["lossless"]["built"] == two[0]["build"]["lossless"]["built"] == [14, 14]


@pytest.mark.slow
def test_nor_with_three(folder: Path, two, tmp_path: Path) -> None:
    launch(tmp_path, 3, "build")
    for name in ("lossless", "lossy"):
        three, both = hashes(tmp_path / f"{name}-3"), hashes(folder / f"{name}-2")
        assert len(three) > 50
        assert three == both


def position(name: str, steps: int) -> float:
    return int(name.partition("-")[2]) / steps


@pytest.fixture(scope="module")
def one(two, folder: Path) -> dict[str, Any]:
    """What one process found, with checkpoints and caches of two beside it."""
    (found,) = launch(folder, 1, "go_on_all:two", "save:one", "build")
    return found


@pytest.mark.parametrize("name", [f"checkpoint-{step}" for step in (5, 10, 15, 20, 24)])
def test_one_process_goes_on_in_the_epoch_in_which_two_stopped(two, one, name: str) -> None:
    resumed = one["go_on_all:two"][name]
    epoch = position(name, 6)  # of two processes; one takes ten steps
    assert resumed["steps"] == 40
    assert len(resumed["losses"]) == 40 - int(epoch * 10 + 1e-9)
    assert resumed["rates"] == pytest.approx(
        [3e-3 * (1 - step / 40) for step in range(40 - len(resumed["losses"]), 40)]
    )
    # Caches of the stage are those that two have built; the last stage has other weights unless it had begun.
    if epoch >= 2:
        assert resumed["new"] == ([0] if epoch < 4 else [])
    elif epoch > 1:
        assert resumed["new"] == [0, 8]


@pytest.fixture(scope="module")
def two_again(one, folder: Path) -> list[dict[str, Any]]:
    """What two processes found with checkpoints of one, and with what a dying one left."""
    done = subprocess.run(
        torchrun(2, "killed_saving"), cwd=folder, env=environment(), capture_output=True, timeout=200, check=False
    )
    assert done.returncode != 0
    assert (folder / "killed" / "checkpoint-5" / "trainer_state.json").is_file()
    return launch(folder, 2, "go_on_all:one", "saved_again")


def test_and_two_in_that_in_which_one_stopped(two_again) -> None:
    for found in two_again:
        assert len(found["go_on_all:one"]) == 8
        for name, resumed in found["go_on_all:one"].items():
            epoch = position(name, 10)
            assert resumed["steps"] == 24, name
            assert len(resumed["losses"]) == 24 - int(epoch * 6 + 1e-9), name
            if epoch == 4:
                assert resumed["new"] == [], name
            elif epoch > 1:
                assert resumed["new"] == ([0, 8] if epoch < 2 else [0]), name


def test_a_process_that_dies_saving_leaves_the_checkpoint_before(two, two_again) -> None:
    for found in two_again:
        assert found["saved_again"]["digest"] == two[0]["parity"]["always"]["digest"]
        assert len(found["saved_again"]["losses"]) == 19


def test_a_second_training_trains_all_that_the_first_did(two) -> None:
    for found in two:
        assert found["twice"]["changed"] == [found["twice"]["of"]] * 2


def test_what_processes_cannot_share_is_refused_on_all_of_them(two) -> None:
    for found in two:
        assert "rows of the same number differ. Give every process the same rows" in found["refused"]["rows"]
        assert "they have [50, 51] rows" in found["refused"]["lengths"]
        assert "accelerator_config sets split_batches=True" in found["refused"]["split_batches"]
        assert "accelerator_config sets dispatch_batches=True" in found["refused"]["dispatch_batches"]
        assert "dataloader_drop_last=True leaves nothing" in found["refused"]["drop_last"]
        assert "different weights in the blocks to freeze" in found["refused"]["weights"]


def test_where_one_process_cannot_write_all_stop_with_what_to_do(two) -> None:
    for rank, found in enumerate(two):
        name, message = found["one_fails:always"]["error"]
        assert name == "CacheWriteError"
        assert "File too large" in message
        assert "trainer.train() begins anew, with the finished shards" in message
        assert message.startswith("Process 1: ") == (rank == 0)


def test_or_all_train_on_without_a_cache(two) -> None:
    for found in two:
        stages = found["one_fails:auto"]["stages"]
        assert [(stage["split_point"], stage["decoded"]) for stage in stages] == [(1, []), (3, [])]
    assert two[0]["one_fails:auto"]["digest"] == two[1]["one_fails:auto"]["digest"]


def test_a_cache_gives_way_to_the_next_without_changing_it(two, folder: Path) -> None:
    for found in two:
        assert found["lossy"]["consume_previous_cache"]["digest"] == found["lossy"]["plain"]["digest"]
    plain, low = hashes(folder / "plain"), hashes(folder / "low")
    assert {name for name in low if name.startswith("k01") and "/view-" in name} == set()
    deep = {name: digest for name, digest in plain.items() if name.startswith("k03")}
    assert deep == {name: digest for name, digest in low.items() if name.startswith("k03")}


def test_a_sigterm_that_reaches_one_process_stops_all_in_one_step(two) -> None:
    for found in two:
        assert found["terminated"]["stopped"] == 11
        assert found["terminated"]["saved"] == ["checkpoint-10"]
        assert found["terminated"]["resumed"]["digest"] == found["parity"]["always"]["digest"]


def test_more_processes_than_chunks_are_refused(two) -> None:
    for found in two:
        name, message = found["too_many"]["error"]
        assert name == "UnsupportedSetupError"
        assert "2 processes share 50 rows in 1 chunks" in message
        assert "at most 25" in message


def test_each_machine_builds_and_reads_its_own_rows(tmp_path: Path) -> None:
    port, running = free_port(), []
    for node in ("0", "1"):
        (tmp_path / node).mkdir()
        command = torchrun(1, "node", port=port, nodes="2", node=node)
        running.append(
            subprocess.Popen(command, cwd=tmp_path / node, env=environment(), stderr=subprocess.PIPE, text=True)
        )
    errors = [process.communicate(timeout=200)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], errors
    found = [json.loads((tmp_path / str(n) / f"found-{n}-of-2.json").read_text())["node"] for n in range(2)]
    for each in found:
        assert each["always"]["digest"] == each["never"]["digest"]
        assert each["always"]["losses"] == each["never"]["losses"]
        assert each["always"]["built"] == [8, 8]  # 25 rows: 7 chunks, in 4 shards of 2 views
        assert each["again"]["built"] == [0, 0]
        assert each["rows"][0] == each["rows"][1]
    assert found[0]["always"]["digest"] == found[1]["always"]["digest"]
    assert sorted(found[0]["rows"][0] + found[1]["rows"][0]) == list(range(50))
