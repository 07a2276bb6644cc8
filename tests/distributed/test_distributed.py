"""Several processes, started as users start them: what they train, read, write and send to each other."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import hold_lock, many, tiny_cache
from support.children import Child, free_port, run_group

from hf_freezecache.errors import CacheLockedError

#: Parameters of the tiny model behind 0, 1 and 3 frozen blocks.
TRAINABLE = {0: 10068, 1: 6772, 3: 2324}


def launch(folder: Path, processes: int, *scenarios: str) -> list[dict[str, Any]]:
    """Run scenarios of ``many.py`` in a folder; return what each process found."""
    folder.mkdir(exist_ok=True)
    run_group(many.main, *scenarios, folders=[folder] * processes)
    return found_in(folder, processes)


def torchrun(folder: Path, *scenarios: str) -> list[dict[str, Any]]:
    """Run scenarios of ``many.py`` in two processes that torchrun starts; return what each process found."""
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--nnodes", "1"),
        *("--master_addr", "127.0.0.1", "--master_port", str(free_port()), many.__file__, *scenarios),
    ]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return found_in(folder, 2)


def found_in(folder: Path, processes: int) -> list[dict[str, Any]]:
    return [json.loads((folder / f"found-{rank}-of-{processes}.json").read_text()) for rank in range(processes)]


def hashes(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".lock"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes found, one start for all scenarios: those of the default run."""
    return launch(tmp_path_factory.mktemp("two"), 2, "parity:10", "refused", "too_many")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("all")


@pytest.fixture(scope="module")
def all_of_two(folder: Path) -> list[dict[str, Any]]:
    """What two processes found in the scenarios of slow tests."""
    scenarios = [
        "parity",
        "build",
        "one_fails:always",
        "one_fails:auto",
        "lossy",
        "terminated",
        "twice",
        "rates",
        "offloaded",
    ]
    return launch(folder, 2, *scenarios, "save:two")


def test_cached_equals_frozen_uncached_to_the_bit(two) -> None:
    for found in two:
        parity = found["parity:10"]
        assert parity["always"]["losses"] == parity["never"]["losses"]
        assert parity["always"]["digest"] == parity["never"]["digest"]
    assert two[0]["parity:10"]["always"]["digest"] == two[1]["parity:10"]["always"]["digest"]
    assert two[0]["parity:10"]["always"]["losses"] != two[1]["parity:10"]["always"]["losses"]  # other samples each


@pytest.mark.slow
def test_frozen_weights_may_leave_the_device(all_of_two) -> None:
    for found in all_of_two:
        runs = found["offloaded"]
        assert runs["offloaded"]["losses"] == runs["plain"]["losses"]
        assert {run["digest"] for run in runs.values()} == {runs["plain"]["digest"]}


def check_resumed(parity: dict[str, Any], checkpoints: int) -> None:
    assert len(parity["resumed"]) == checkpoints
    for name, resumed in parity["resumed"].items():
        assert resumed["digest"] == parity["always"]["digest"], name
        assert resumed["steps"] == 24
        assert not any(resumed["new"]), name  # the caches of the first run


def test_resuming_within_an_epoch_is_the_same_to_the_bit(two) -> None:
    for found in two:
        check_resumed(found["parity:10"], 1)


@pytest.mark.slow
def test_resuming_at_every_checkpoint_is_the_same_to_the_bit(all_of_two) -> None:
    for found in all_of_two:
        assert found["parity"]["saved"]["built"] == [0, 0]  # the caches of the first run
        check_resumed(found["parity"], 5)


@pytest.mark.slow
def test_resuming_with_rates_by_layer_and_stage_is_the_same_to_the_bit(all_of_two) -> None:
    for found in all_of_two:
        saved, resumed = found["rates"]["saved"], found["rates"]["resumed"]
        assert saved["digest"] != found["parity"]["always"]["digest"]
        assert len(resumed) == 5
        assert {run["digest"] for run in resumed.values()} == {saved["digest"]}


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["fewer_tokens", "queries", "thawing", "auto"])
def test_ways_to_freeze_are_cached_and_resumed_to_the_bit(tmp_path: Path, scenario: str) -> None:
    for found in (each[scenario] for each in launch(tmp_path, 2, scenario)):
        assert ("keeps the 4 epochs asked for" in (found["always"]["chosen"] or "")) == (scenario == "auto")
        assert {run["chosen"] for run in found["resumed"].values()} == {found["always"]["chosen"]}
        assert found["always"]["losses"] == found["never"]["losses"]
        assert found["always"]["digest"] == found["never"]["digest"]
        if scenario == "thawing":  # a constant rate for the head, then the schedule from its beginning
            epoch = len(found["always"]["rates"]) // 4
            assert found["always"]["rates"][: epoch + 1] == pytest.approx([9e-3] * epoch + [6e-3])
        assert len(found["resumed"]) == 4
        for name, resumed in found["resumed"].items():
            assert resumed["digest"] == found["always"]["digest"], name


@pytest.mark.slow
def test_torchrun_gives_what_the_forked_processes_of_these_tests_give(two, tmp_path: Path) -> None:
    assert [found["parity:10"] for found in torchrun(tmp_path, "parity:10")] == [found["parity:10"] for found in two]


@pytest.mark.slow
def test_compiled_blocks_train_from_a_cache_as_live_to_the_bit(tmp_path: Path) -> None:
    """In processes of torchrun, since a compiler's state and its threads are not to come from a fork."""
    found = torchrun(tmp_path, "compiled")
    for runs in (each["compiled"] for each in found):
        cached, live, plain = runs["always"], runs["never"], runs["plain"]
        assert cached["built"] == [8, 8]
        assert cached["losses"] == live["losses"]
        assert cached["digest"] == live["digest"] == found[0]["compiled"]["always"]["digest"]
        assert [stage["reduced"] for stage in cached["stages"]] == list(TRAINABLE.values())
        assert cached["graphs"] >= 1
        assert live["graphs"] >= 1
        assert plain["graphs"] == 0
        assert cached["losses"] == pytest.approx(plain["losses"], rel=1e-4)


def test_each_chunk_is_decoded_by_one_process_in_an_epoch(two) -> None:
    counts = [[stage["decoded"] for stage in found["parity:10"]["always"]["stages"]] for found in two]
    assert counts == [[[], [4], [4, 4]], [[], [3], [3, 3]]]  # 50 rows in chunks of 8


def test_only_gradients_of_what_trains_are_sent(two) -> None:
    for found in two:
        for stage in found["parity:10"]["always"]["stages"]:
            assert stage["reduced"] == TRAINABLE[stage["split_point"]]
            assert stage["find_unused"] is False


def test_a_wrapper_is_gone_before_the_next_is_made(two) -> None:
    """Else its buckets of gradients would stay beside those of the next, and autograd would run the hooks of both."""
    for found in two:
        for run in (
            *(found["parity:10"][mode] for mode in ("always", "never")),
            *found["parity:10"]["resumed"].values(),
        ):
            assert len(run["alive"]) > len(run["stages"]) - 1 > 0
            assert not any(run["alive"])


@pytest.mark.slow
def test_what_is_written_does_not_depend_on_the_number_of_processes(all_of_two, one, folder: Path) -> None:
    for name in ("lossless", "lossy"):
        alone, both = (hashes(folder / f"{name}-{processes}") for processes in (1, 2))
        assert len(alone) > 50
        assert alone == both
    assert one["build"]["lossless"]["built"] == all_of_two[0]["build"]["lossless"]["built"] == [14, 14]


@pytest.mark.slow
def test_nor_with_three(folder: Path, all_of_two, tmp_path: Path) -> None:
    launch(tmp_path, 3, "build")
    for name in ("lossless", "lossy"):
        three, both = hashes(tmp_path / f"{name}-3"), hashes(folder / f"{name}-2")
        assert len(three) > 50
        assert three == both


def position(name: str, steps: int) -> float:
    return int(name.partition("-")[2]) / steps


@pytest.fixture(scope="module")
def one(all_of_two, folder: Path) -> dict[str, Any]:
    """What one process found, with checkpoints and caches of two beside it."""
    (found,) = launch(folder, 1, "go_on_all:two", "save:one", "build")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", [f"checkpoint-{step}" for step in (5, 10, 15, 20, 24)])
def test_one_process_goes_on_in_the_epoch_in_which_two_stopped(all_of_two, one, name: str) -> None:
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
    with pytest.raises(RuntimeError, match="9"):
        launch(folder, 2, "killed_saving")
    assert (folder / "killed" / "checkpoint-5" / "trainer_state.json").is_file()
    return launch(folder, 2, "go_on_all:one", "saved_again")


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_process_that_dies_saving_leaves_the_checkpoint_before(all_of_two, two_again) -> None:
    for found in two_again:
        assert found["saved_again"]["digest"] == all_of_two[0]["parity"]["always"]["digest"]
        assert len(found["saved_again"]["losses"]) == 19


@pytest.mark.slow
def test_a_second_training_trains_all_that_the_first_did(all_of_two) -> None:
    for found in all_of_two:
        assert found["twice"]["changed"] == [found["twice"]["of"]] * 2


def test_what_processes_cannot_share_is_refused_on_all_of_them(two) -> None:
    for found in two:
        assert "rows of the same number differ. Give every process the same rows" in found["refused"]["rows"]
        assert "they have [50, 51] rows" in found["refused"]["lengths"]
        assert "accelerator_config sets split_batches=True" in found["refused"]["split_batches"]
        assert "accelerator_config sets dispatch_batches=True" in found["refused"]["dispatch_batches"]
        assert "dataloader_drop_last=True leaves nothing" in found["refused"]["drop_last"]
        assert "different weights in the blocks to freeze" in found["refused"]["weights"]


@pytest.mark.slow
def test_where_one_process_cannot_write_all_stop_with_what_to_do(all_of_two) -> None:
    for rank, found in enumerate(all_of_two):
        name, message = found["one_fails:always"]["error"]
        assert name == "CacheWriteError"
        assert "File too large" in message
        assert "trainer.train() begins anew, with the finished shards" in message
        assert message.startswith("Process 1: ") == (rank == 0)


@pytest.mark.slow
def test_or_all_train_on_without_a_cache(all_of_two) -> None:
    for found in all_of_two:
        stages = found["one_fails:auto"]["stages"]
        assert [(stage["split_point"], stage["decoded"]) for stage in stages] == [(1, []), (3, [])]
    assert all_of_two[0]["one_fails:auto"]["digest"] == all_of_two[1]["one_fails:auto"]["digest"]


@pytest.mark.slow
def test_a_cache_gives_way_to_the_next_without_changing_it(all_of_two, folder: Path) -> None:
    for found in all_of_two:
        assert found["lossy"]["consume_previous_cache"]["digest"] == found["lossy"]["plain"]["digest"]
    plain, low = hashes(folder / "plain"), hashes(folder / "low")
    assert {name for name in low if name.startswith("k01") and "/view-" in name} == set()
    deep = {name: digest for name, digest in plain.items() if name.startswith("k03")}
    assert deep == {name: digest for name, digest in low.items() if name.startswith("k03")}


@pytest.mark.slow
def test_a_sigterm_that_reaches_one_process_stops_all_in_one_step(all_of_two) -> None:
    for found in all_of_two:
        assert found["terminated"]["stopped"] == 11
        assert found["terminated"]["saved"] == ["checkpoint-10"]
        assert found["terminated"]["resumed"]["digest"] == found["parity"]["always"]["digest"]


def test_more_processes_than_chunks_are_refused(two) -> None:
    for found in two:
        name, message = found["too_many"]["error"]
        assert name == "UnsupportedSetupError"
        assert "2 processes share 50 rows in 1 chunks" in message
        assert "at most 25" in message


@pytest.mark.slow
def test_each_machine_builds_and_reads_its_own_rows(tmp_path: Path) -> None:
    folders = [tmp_path / node for node in ("0", "1")]
    for node in folders:
        node.mkdir()
    run_group(many.main, "node", folders=folders, nodes=2)
    found = [json.loads((path / f"found-{node}-of-2.json").read_text())["node"] for node, path in enumerate(folders)]
    for each in found:
        assert each["always"]["digest"] == each["never"]["digest"]
        assert each["always"]["losses"] == each["never"]["losses"]
        assert each["always"]["built"] == [8, 8]  # 25 rows: 7 chunks, in 4 shards of 2 views
        assert each["again"]["built"] == [0, 0]
        assert each["rows"][0] == each["rows"][1]
    assert found[0]["always"]["digest"] == found[1]["always"]["digest"]
    assert sorted(found[0]["rows"][0] + found[1]["rows"][0]) == list(range(50))


# ---- Locks ----
# Here since another file that starts a child by default would import all again, for a server of its own.


def hold(folder: Path, seconds: float) -> Child:
    mark = folder / "held"
    child = Child(hold_lock.hold, folder, mark, seconds)
    child.wait_for(mark)
    return child


def test_a_lock_ends_with_the_process_that_held_it(tmp_path: Path) -> None:
    with hold(tmp_path, 600) as child:
        with pytest.raises(
            CacheLockedError, match="being written by another live process, for which this one waited 0 s"
        ):
            tiny_cache.build(tmp_path, tiny_cache.make_plan())
        child.kill()
        assert child.status == -signal.SIGKILL
    assert list(tmp_path.glob(".*.lock"))  # the file is still there; the lock is not
    assert tiny_cache.build(tmp_path, tiny_cache.make_plan()).built_shards == 4


@pytest.mark.slow
def test_a_run_waits_for_another_to_finish(tmp_path: Path, caplog) -> None:
    with hold(tmp_path, 1.0):
        report = tiny_cache.build(tmp_path, tiny_cache.make_plan(), lock_timeout=60.0)
    assert report.built_shards == 4
    assert "waiting up to 60 s" in caplog.text
