"""Do training and caches survive whatever happens to the processes, the disk and the files?

    python recipes/benchmarks/faults.py --seconds 600 --json recipes/benchmarks/results/faults.json

Trains a tiny ViT on images over three stages (no frozen block, 1, then 3 by promotion), with checkpoints every three steps,
and disturbs it, over and over, until the time is up (or ``--kills`` are reached):

- ``kill``: SIGKILL at a random moment of a build, a promotion, a stage change, a checkpoint or a step, of one process, or of
  one of two processes (or both); then the same start again, with ``resume_from_checkpoint=True`` once there is a checkpoint.
- ``term``: SIGTERM under ``enable_jit_checkpoint``.
- ``vanish``: the folder of caches is removed. Lossless ones must end right; lossy ones, whose codec is calibrated with the suffix
  of the moment, must end.
- ``full``: the caches lie on a tmpfs that is too small (needs the right to mount; else files are limited in size), with
  ``mode="always"``, and room made afterwards, or ``mode="auto"``.
- ``flip`` and ``truncate``: damaged files, see ``damage.py``.

A trial is recovered if the next start goes on without an error. A chain of trials is right if it ends with the parameters of
an undisturbed run, to the bit, and no shard that was complete was written again. Each process is forked from one that has
imported everything, on one thread.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import gc
import hashlib
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

import datasets
import numpy as np
import torch
import transformers
from damage import DamageTrials
from PIL import Image
from record import save
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

from hf_freezecache import (
    CacheConfig,
    FreezeCacheTrainer,
    FreezeConfig,
)
from hf_freezecache.errors import FreezeCacheError
from hf_freezecache.training.checkpoints import last_complete
from hf_freezecache.training.stage import StageRunner
from hf_freezecache.training.stage_cache import StageCache

ROWS, SIZE, BATCH = 50, 16, 5
PHASES = ("start", "step", "stage change", "build", "promotion", "checkpoint", "evaluation and end")
#: What a cache is to be in a chain of trials.
KINDS: dict[str, dict[str, Any]] = {
    "lossless": {},
    "lossy": {"codec": "auto", "build_from": "previous_cache", "calibration_samples": 16},
    "low disk": {
        "codec": "auto",
        "build_from": "previous_cache",
        "calibration_samples": 16,
        "consume_previous_cache": True,
    },
}
#: Longest time that one start may take; a start that hangs is a failure.
PATIENCE = 120.0


class Transform:
    """Flips by Python's generator, adds noise by torch's."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        pixels = []
        for image in batch["image"]:
            values = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1
            values = values.flip(2) if random.random() < 0.5 else values
            pixels.append(values + 0.1 * torch.randn_like(values))
        return {"pixel_values": pixels, "labels": list(batch["label"])}


def images() -> datasets.Dataset:
    generator = np.random.default_rng(0)
    pixels = [Image.fromarray(generator.integers(0, 255, (SIZE, SIZE, 3)).astype(np.uint8)) for _ in range(ROWS)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict({"image": pixels, "label": [row % 4 for row in range(ROWS)]}, features=features)


def digest(model: torch.nn.Module) -> bytes:
    found = hashlib.sha256()
    for parameter in model.state_dict().values():
        found.update(parameter.detach().numpy().tobytes())
    return found.digest()


class Phases:
    """Tells the parent, through shared memory, what a child is doing and how it ended."""

    def __init__(self) -> None:
        self.phase = multiprocessing.RawValue(ctypes.c_int, 0)
        self.count = multiprocessing.RawArray(ctypes.c_int, len(PHASES))
        self.digest = multiprocessing.RawArray(ctypes.c_char, 32)
        self.error = multiprocessing.RawArray(ctypes.c_char, 2000)

    @contextlib.contextmanager
    def within(self, name: str):  # type: ignore[no-untyped-def]
        before = self.phase.value
        self.phase.value = PHASES.index(name)
        self.count[PHASES.index(name)] += 1
        try:
            yield
        finally:
            self.phase.value = before


def watched(phases: Phases) -> type[FreezeCacheTrainer]:
    """Return a trainer that says what it is doing."""
    build, enter = StageCache.build, StageRunner.enter

    def build_watched(self: StageCache, split: Any, planned: Any, started: float) -> Any:
        with phases.within("build" if planned.source is None else "promotion"):
            return build(self, split, planned, started)

    def enter_watched(self: StageRunner, *args: Any) -> Any:
        with phases.within("stage change"):
            return enter(self, *args)

    StageCache.build = build_watched  # type: ignore[method-assign]
    StageRunner.enter = enter_watched  # type: ignore[method-assign]

    class Watched(FreezeCacheTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            with phases.within("step"):
                return super().training_step(*args, **kwargs)

        def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            with phases.within("checkpoint"):
                super()._save_checkpoint(*args, **kwargs)

    return Watched


@dataclass(frozen=True)
class Run:
    """What a start of the training is given.

    Attributes:
        folder: Working folder, with checkpoints in ``out`` and caches in ``caches``.
        kind: Key of ``KINDS``.
        processes: How many.
        mode: Of ``CacheConfig``.
        jit: Whether SIGTERM asks for a checkpoint.
        file_limit: Largest file that may be written, in bytes.
    """

    folder: Path
    kind: str = "lossless"
    processes: int = 1
    mode: str = "always"
    jit: bool = False
    file_limit: int | None = None


def train(run: Run, phases: Phases) -> None:
    """Train in this process, going on from the last complete checkpoint."""
    os.chdir(run.folder)
    set_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=SIZE,
        patch_size=4,
        num_labels=4,
    )
    trainer = watched(phases)(
        model=ViTForImageClassification(config),
        args=TrainingArguments(
            output_dir="out",
            use_cpu=True,
            num_train_epochs=3,
            per_device_train_batch_size=BATCH,
            learning_rate=3e-3,
            save_strategy="steps",
            save_steps=3,
            save_total_limit=2,
            remove_unused_columns=False,
            report_to="none",
            disable_tqdm=True,
            logging_steps=100,
            seed=1,
            enable_jit_checkpoint=run.jit,
        ),
        train_dataset=images().with_transform(Transform()),
        freeze_config=FreezeConfig(schedule="0:0,1:1,2:3"),
        cache_config=CacheConfig(
            cache_dir="caches",
            mode=run.mode,
            num_views=2,
            chunk_size=4,
            shard_chunks=2,
            transform_id="tiny",
            **KINDS[run.kind],
        ),
    )
    if run.jit:
        for callback in trainer.callback_handler.callbacks:
            if getattr(callback, "jit_manager", None) is not None:
                callback.jit_manager.kill_wait = 0.05  # the default, 3 s, is longer than this whole run
    if run.file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (run.file_limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    with phases.within("start"):
        trainer.train(resume_from_checkpoint=last_complete(Path("out")) is not None)
    if trainer.state.global_step == trainer.state.max_steps:
        phases.digest.raw = digest(trainer.model)


def child(run: Run, rank: int, port: int, phases: Phases) -> None:
    """Be one process of a run; never return."""
    code = 1
    try:
        os.setpgid(0, 0)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        if run.processes > 1:
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(run.processes),
                "LOCAL_WORLD_SIZE": str(run.processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        torch.set_num_threads(1)
        train(run, phases)
        code = 0
    except FreezeCacheError as error:
        phases.error.value = f"{type(error).__name__}: {error}".encode()[:1999]
        code = 3
    except BaseException:
        phases.error.value = traceback.format_exc().encode()[-1999:]
    finally:
        os._exit(code)


@dataclass
class Started:
    """The processes of one start."""

    pids: list[int]
    phases: list[Phases]
    codes: dict[int, int] = field(default_factory=dict)

    def poll(self) -> bool:
        """Collect what has ended; say whether any still runs."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return len(self.codes) < len(self.pids)

    def signal(self, number: int, ranks: list[int]) -> None:
        for rank in ranks:
            if rank not in self.codes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.pids[rank], number) if number == signal.SIGKILL else os.kill(self.pids[rank], number)

    def wait(self, seconds: float) -> bool:
        """Wait for all to end, killing what is left after that; say whether they ended by themselves."""
        until = time.monotonic() + seconds
        while self.poll() and time.monotonic() < until:
            time.sleep(0.005)
        ended = not self.poll()
        self.signal(signal.SIGKILL, list(range(len(self.pids))))
        while self.poll():
            time.sleep(0.005)
        return ended


def start(run: Run) -> Started:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    phases = [Phases() for _ in range(run.processes)]
    pids = []
    for rank in range(run.processes):
        pid = os.fork()
        if pid == 0:
            child(run, rank, port, phases[rank])
        pids.append(pid)
    return Started(pids, phases)


def complete_shards(folder: Path) -> dict[str, tuple[int, int]]:
    """Return inode and time of every shard whose index part is there as well: nothing may write it again."""
    found = {}
    for path in (folder / "caches").glob("k*/view-*/shard-*.safetensors"):
        part = path.parent.parent / "index" / path.parent.name / f"part-{path.stem[6:]}.parquet"
        with contextlib.suppress(FileNotFoundError):
            if part.is_file():
                status = path.stat()
                found[str(path.relative_to(folder))] = (status.st_ino, status.st_mtime_ns)
    return found


def rewritten(folder: Path, before: dict[str, tuple[int, int]]) -> list[str]:
    """Return the shards that were complete and have been written again; those that gave way are gone, not rewritten."""
    now = complete_shards(folder)
    return [name for name, status in before.items() if name in now and now[name] != status]


@dataclass
class Report:
    """Counts of all trials."""

    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    wrong: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def failed(self, what: str) -> None:
        self.counts["wrong results"] += 1
        self.wrong.append(what[:1500])
        print(f"WRONG: {what}", file=sys.stderr, flush=True)


class Harness:
    """Runs chains of trials in a folder of its own."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root = root
        self.random = random.Random(seed)
        self.report = Report()
        self.references: dict[tuple[str, int], bytes] = {}
        self.durations: dict[tuple[str, int], dict[str, float]] = {}
        self.number = 0
        self.trials: DamageTrials | None = None

    def folder(self) -> Path:
        self.number += 1
        path = self.root / f"chain-{self.number}"
        path.mkdir()
        return path

    def reference(self, kind: str, processes: int) -> bytes:
        """Return the parameters of an undisturbed run. A cache that gives way must change nothing."""
        key = ("lossy" if kind == "low disk" else kind, processes)
        if key not in self.references:
            folder = self.folder()
            run = Run(folder, key[0], processes)
            started = start(run)
            spent: dict[str, float] = collections.defaultdict(float)
            last = time.monotonic()
            while started.poll():
                now = time.monotonic()
                spent[PHASES[started.phases[0].phase.value]] += now - last
                last = now
                time.sleep(0.0005)
            if set(started.codes.values()) != {0}:
                raise SystemExit(f"the undisturbed run failed: {started.phases[0].error.value.decode()}")
            self.references[key] = started.phases[0].digest.raw
            self.durations[key] = dict(spent)
            shutil.rmtree(folder)
        return self.references[key]

    def finish(self, run: Run, what: str, exact: bool = True) -> None:
        """Start once more, undisturbed, and compare."""
        before = complete_shards(run.folder)
        started = start(run)
        ended = started.wait(PATIENCE)
        if not ended or set(started.codes.values()) != {0}:
            self.report.failed(f"{what}: the last start {'failed' if ended else 'hung'}: {self.errors(started)}")
        elif exact and started.phases[0].digest.raw != self.reference(run.kind, run.processes):
            self.report.failed(f"{what}: ended with other parameters")
        else:
            self.report.counts["right ends" if exact else "ends"] += 1
        again = rewritten(run.folder, before)
        if again:
            self.report.failed(f"{what}: complete shards were written again: {again}")
        shutil.rmtree(run.folder, ignore_errors=True)

    @staticmethod
    def errors(started: Started) -> str:
        return " | ".join(phases.error.value.decode(errors="replace") for phases in started.phases)

    def disturb(self, run: Run, number: int, phase: str, ranks: list[int]) -> tuple[str, Started]:
        """Start, and send a signal at a random moment of a phase; return the phase it fell into."""
        key = ("lossy" if run.kind == "low disk" else run.kind, run.processes)
        self.reference(run.kind, run.processes)
        # Uniform over what is left of that phase in an undisturbed run, counted from the first time that it is seen.
        delay = self.random.uniform(0, max(self.durations[key].get(phase, 0.0), 0.002))
        started, spent, last = start(run), 0.0, time.monotonic()
        wanted, until = PHASES.index(phase), last + PATIENCE
        hit = "end"
        while started.poll() and time.monotonic() < until:
            now = time.monotonic()
            if started.phases[ranks[0]].phase.value == wanted:
                spent += now - last
                if spent >= delay:
                    hit = PHASES[started.phases[ranks[0]].phase.value]
                    started.signal(number, ranks)
                    break
            last = now
            time.sleep(0.0003)
        return hit, started

    def kill_chain(self, kind: str, processes: int, kills: int) -> None:
        """Kill a training run a few times, then let it end."""
        run = Run(self.folder(), kind, processes)
        history = []
        for _ in range(kills):
            before = complete_shards(run.folder)
            phase = self.random.choice(["start", "step", "stage change", "build", "promotion", "checkpoint"])
            ranks = [self.random.randrange(processes)] if self.random.random() < 0.7 else list(range(processes))
            hit, started = self.disturb(run, signal.SIGKILL, phase, ranks)
            # The launcher would end the others; left alone, they must see for themselves that one is gone. Before all have
            # met, torch has them wait for the missing one for minutes: ended here as the launcher does.
            early = processes > 1 and hit == "start"
            ended = started.wait(2 if early else 60 if processes > 1 else PATIENCE) or early
            history.append(hit)
            again = rewritten(run.folder, before)
            if again:
                self.report.failed(
                    f"{kind}, {processes} processes, {history}: complete shards were written again: {again}"
                )
            if hit == "end":  # it was over before its time came
                if started.phases[0].error.value:
                    self.report.failed(f"{kind}, {processes} processes, {history}: {self.errors(started)}")
                continue
            self.report.counts["kills"] += 1
            self.report.counts[f"kills in {hit}"] += 1
            self.report.counts[f"kills with {processes} processes"] += 1
            if not ended:
                self.report.failed(f"{kind}, {processes} processes, {history}: the others did not end")
            survivors = [code for rank, code in started.codes.items() if code == 3 and rank not in ranks]
            self.report.counts["survivors that ended with an error of ours"] += len(survivors)
        wrong = self.report.counts["wrong results"]
        self.finish(run, f"{kind}, {processes} processes, killed in {history}")
        if self.report.counts["wrong results"] == wrong:
            self.report.counts["recoveries"] += sum(hit != "end" for hit in history)

    def term_chain(self) -> None:
        """SIGTERM under ``enable_jit_checkpoint``."""
        run = Run(self.folder(), "lossless", jit=True)
        phase = self.random.choice(["step", "stage change", "build", "promotion", "checkpoint"])
        hit, started = self.disturb(run, signal.SIGTERM, phase, [0])
        started.wait(PATIENCE)
        self.report.counts["terminations"] += 1
        if started.codes[0] not in (0, -signal.SIGTERM):
            self.report.failed(f"SIGTERM in {hit}: {self.errors(started)}")
        self.finish(run, f"SIGTERM in {hit}")

    def vanish_chain(self) -> None:
        """The folder of caches is gone, at a random moment."""
        run = Run(self.folder(), self.random.choice(list(KINDS)))
        phase = self.random.choice(["step", "stage change", "build", "promotion"])
        hit, started = self.disturb(run, 0, phase, [0])
        shutil.rmtree(run.folder / "caches", ignore_errors=True)
        started.wait(PATIENCE)
        self.report.counts["vanished folders"] += 1
        if started.codes[0] not in (0, 3):
            self.report.failed(f"the folder vanished in {hit}: {self.errors(started)}")
        # A lossy codec is calibrated with the suffix of the moment: the one that vanished cannot be made again.
        self.finish(run, f"{run.kind}: the folder vanished in {hit}", exact=run.kind == "lossless")

    def full_chain(self, mounts: bool) -> None:
        """The disk is full while building."""
        mode = self.random.choice(["always", "auto"])
        folder = self.folder()
        if mounts:
            kibibytes = self.random.randrange(60, 900)
            caches = folder / "caches"
            caches.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", str(caches)], check=True)
            run = Run(folder, "lossless", mode=mode)
            what = f"a disk of {kibibytes} KiB, mode={mode}"
        else:
            limit = self.random.randrange(2_000, 12_000)
            run = Run(folder, "lossless", mode=mode, file_limit=limit)
            what = f"files of at most {limit} bytes, mode={mode}"
        try:
            started = start(run)
            started.wait(PATIENCE)
            self.report.counts["full disks"] += 1
            error = started.phases[0].error.value.decode()
            if started.codes[0] == 3 and mode == "always":
                self.report.counts["full disks that stopped with an instruction"] += 1
                if "could not be written" not in error or not (
                    "resume_from_checkpoint" in error or "begins anew" in error
                ):
                    self.report.failed(f"{what}: {error}")
            elif started.codes[0] != 0:
                self.report.failed(f"{what}: {error}")
            elif started.phases[0].digest.raw != self.reference("lossless", 1):
                self.report.failed(f"{what}: ended with other parameters")
            if mounts:
                subprocess.run(["mount", "-o", "remount,size=64m", str(caches)], check=True)
            self.finish(Run(folder, "lossless"), what)
        finally:
            if mounts:
                subprocess.run(["umount", "-l", str(caches)], check=False)
                shutil.rmtree(folder, ignore_errors=True)


def can_mount(root: Path) -> bool:
    """Say whether a tmpfs can be mounted here."""
    place = root / "mount"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)], check=False, capture_output=True
    )
    if mounted.returncode == 0:
        subprocess.run(["umount", str(place)], check=False)
    return mounted.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600, help="stop after the chain that ends past this")
    parser.add_argument("--kills", type=int, default=0, help="stop only once so many processes were killed, too")
    parser.add_argument("--json", type=Path, default=None, help="where to write the record")
    parser.add_argument("--chain", type=int, default=5, help="kills of one training run, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", nargs="*", default=[], choices=["kill", "term", "vanish", "full", "damage"], help="kinds of faults"
    )
    parser.add_argument(
        "--processes", type=int, nargs="*", default=[1, 1, 1, 2], help="drawn from for each chain of kills"
    )
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # what imports made is no child's garbage
    kinds = arguments.only or ["kill", "kill", "kill", "kill", "term", "vanish", "full", "damage"]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        harness = Harness(root, arguments.seed)
        mounts = can_mount(root)
        draw, counts = harness.random, harness.report.counts
        while time.monotonic() - began < arguments.seconds or counts["kills"] < arguments.kills:
            fault = draw.choice(kinds)
            if fault == "kill":
                harness.kill_chain(
                    draw.choice(list(KINDS)), draw.choice(arguments.processes), draw.randint(1, arguments.chain)
                )
            elif fault == "term":
                harness.term_chain()
            elif fault == "vanish":
                harness.vanish_chain()
            elif fault == "full":
                harness.full_chain(mounts)
            else:
                damage(harness)
            print(f"{time.monotonic() - began:6.0f} s  {dict(sorted(counts.items()))}", flush=True)
    seconds = time.monotonic() - began
    report = harness.report
    print(f"kills: {counts['kills']}, recoveries: {counts['recoveries']}, wrong results: {counts['wrong results']}")
    if arguments.json is not None:
        config = {key: value for key, value in vars(arguments).items() if key != "json"}
        results = {"seconds": round(seconds, 1), "counts": dict(sorted(counts.items())), "wrong": report.wrong}
        save(arguments.json, "faults", {**config, "mounts": mounts}, results)
    raise SystemExit(1 if report.wrong else 0)


def damage(harness: Harness) -> None:
    """Damage files of caches twenty times, in ways not tried yet."""
    report = harness.report
    if harness.trials is None:
        folder = harness.folder()
        with contextlib.redirect_stdout(None):
            harness.trials = DamageTrials(folder)
    for _ in range(20):
        flip = harness.random.random() < 0.8
        seed = harness.random.getrandbits(48)
        trial = harness.trials.flip_trial(seed) if flip else harness.trials.truncate_trial(seed)
        report.counts["flips" if flip else "truncations"] += 1
        report.counts[f"{'flips' if flip else 'truncations'} detected"] += trial.detected
        if not trial.detected or trial.read == "different":
            report.failed(f"{trial}")


if __name__ == "__main__":
    main()
