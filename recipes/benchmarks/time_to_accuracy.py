"""How long does it take to reach an accuracy? Full fine-tuning, LoRA, a frozen prefix, naive caches, and ours.

    python recipes/benchmarks/time_to_accuracy.py --model MODEL --data caltech50 --image-size 112 --arms coarse \\
        --processes 2 --json caltech50.json
    python recipes/benchmarks/time_to_accuracy.py --phase clock --model MODEL --data caltech50 --image-size 112 \\
        --arms full/epochs=4/decay=0.75 ours/k=9/epochs=8/views=2/keep=0.5/decay=0.75 --threads 2 --json caltech50.json
    python recipes/benchmarks/time_to_accuracy.py --phase table plot --json caltech50.json flowers.json --picture front.svg

``--arms`` takes names of groups and arms; see ``accuracy_arms.py``. Phases:

* ``tune``: each arm's learning rate, by accuracy on a quarter of the training rows, which is then not trained on. The
  grid has four values in steps of 2, and grows while the best lies on its edge. Arms that take the learning rate of full
  fine-tuning (``auto``, ``scale=...``) are not tuned.
* ``test``: ``--seeds`` with the chosen rate, on all training rows, measured on the test rows.
* ``clock``: the first seed once more, alone, in a process of its own, with ``--threads`` threads and no cache before:
  wall-clock, images/s, peak memory. With ``--again`` once more over the caches that are there then.
* ``table``, ``plot``: from records.

With ``--rates`` nothing is tuned: rates are those that another record has chosen, for the same size of images and batches;
that model and data are alike is not checked.

Runs that are in the record are not repeated: a run that was stopped goes on where it was. A record holds one data set.

The cost is counted in passes through blocks, forward 1 and backward 2, in epochs of full fine-tuning; a step that sees a
part of the tokens counts that part. Builds count in full, also where the cache was there already. Embeddings, head,
rendering, codec and evaluation are left out. Two processes side by side do not change it; they do change the wall-clock.

With ``--folds 3`` the rows of all splits are pooled, and seed ``s`` is tested on fold ``s % 3``; the learning rate is
chosen within the training rows of fold ``--tune-seeds``.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import concurrent.futures.process
import dataclasses
import functools
import json
import math
import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accuracy_arms import GRID, GROUPS, Arm, chosen_arms, rate_source, rates_to_try
from accuracy_front import print_tables
from accuracy_picture import draw
from accuracy_runs import RECIPE, Task, run_arm
from filelock import FileLock
from PIL import Image
from record import commit, save
from transformers import ViTConfig, ViTForImageClassification, set_seed

PHASES = ("tune", "test", "clock", "table", "plot")


@dataclasses.dataclass(frozen=True)
class Job:
    """One run: what it is known by in the record."""

    phase: str
    arm: str
    lr: float
    seed: int


class Record:
    """The runs of one data set, in a file."""

    def __init__(self, path: Path, config: dict[str, Any], grid: tuple[int, int]) -> None:
        self.path, self.config, self.grid = path, config, grid
        #: Another record whose learning rates are taken; ``None`` for those of this one.
        self.rates: Record | None = None
        self.runs: list[dict[str, Any]] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        self.read()

    def read(self) -> None:
        """Take in what is in the file now: several calls may add to it at the same time."""
        if not self.path.exists():
            return
        kept = json.loads(self.path.read_text())
        for name, value in self.config.items():
            if kept["config"].get(name) != value:
                found = kept["config"].get(name)
                raise SystemExit(f"{self.path} holds runs with {name}={found!r}, not {value!r}: give another --json.")
        self.runs = kept["results"]["runs"]

    def find(self, **fields: Any) -> list[dict[str, Any]]:
        return [run for run in self.runs if all(run[name] == value for name, value in fields.items())]

    def has(self, job: Job) -> bool:
        return bool(self.find(**dataclasses.asdict(job)))

    def add(self, job: Job, found: dict[str, Any]) -> None:
        with FileLock(f"{self.path}.lock"):
            self.read()
            self.runs.append({**dataclasses.asdict(job), **found})
            save(self.path, "time_to_accuracy", self.config, {"runs": self.runs}, quiet=True)

    def scores(self, arm: str) -> dict[float, tuple[float, float]]:
        """Return accuracy and negative loss of each rate that was tried, means over tuning seeds."""
        by_rate: dict[float, list[dict[str, Any]]] = {}
        for run in self.find(phase="tune", arm=arm):
            by_rate.setdefault(run["lr"], []).append(run)
        return {
            lr: (sum(run["accuracy"] for run in runs) / len(runs), -sum(run["loss"] for run in runs) / len(runs))
            for lr, runs in by_rate.items()
        }

    def best_rate(self, arm: Arm) -> float | None:
        """Return the chosen learning rate; ``None`` if the grid is not complete."""
        scores = self.scores(arm.name)
        return None if rates_to_try(arm, scores, self.grid) else max(scores, key=lambda lr: scores[lr])

    def rate_of(self, arm: Arm) -> float | None:
        """Return the learning rate of an arm, its own or that of full fine-tuning; ``None`` if it is not known yet."""
        if self.rates is not None:
            return self.rates.rate_of(arm)
        if arm.tuned:
            return self.best_rate(arm)
        known = [Arm.parse(name) for name in dict.fromkeys(run["arm"] for run in self.find(phase="tune"))]
        source = rate_source(arm, [one for one in known if self.best_rate(one) is not None])
        return None if source is None else self.best_rate(source)


# ---- Jobs ----


def plan(args: argparse.Namespace, record: Record) -> Iterator[Job]:
    """Yield jobs in order of worth, those that are done included; test runs of an arm once its rate is chosen."""
    for arm in chosen_arms(args.arms):
        if "tune" in args.phase and arm.tuned and record.rates is None:
            scores = record.scores(arm.name)
            for lr in [*scores, *rates_to_try(arm, scores, record.grid)]:
                yield from (Job("tune", arm.name, lr, seed) for seed in args.tune_seeds)
        lr = record.rate_of(arm)
        if "test" in args.phase and lr is not None:
            yield from (Job("test", arm.name, lr, seed) for seed in args.seeds)


def work(task: Task, job: Job, caches: str | None = None) -> dict[str, Any]:
    """Run a job in this process."""
    found = run_arm(task, Arm.parse(job.arm), job.lr, job.seed, job.phase == "tune", caches)
    return {**found, "threads": task.threads}


def keep(record: Record, job: Job, found: dict[str, Any], stamp: str) -> None:
    record.add(job, {**found, "commit": stamp})
    print(
        f"{record.config['data']} {job.phase} {job.arm} lr {job.lr:g} seed {job.seed}: accuracy {found['accuracy']:.2f}, "
        f"cost {found['cost']:.2f}, {found['seconds']:.0f} s ({found['cpu_seconds']:.0f} s of CPU)",
        flush=True,
    )


def run_jobs(args: argparse.Namespace, task: Task, record: Record) -> None:
    """Tune and test, so many runs side by side."""
    deadline = time.monotonic() + args.budget
    stamp, failed = commit(), set()

    def next_job(running: Sequence[Job]) -> Job | None:
        if time.monotonic() >= deadline:
            return None
        record.read()
        waiting = (job for job in plan(args, record) if not record.has(job))
        return next((job for job in waiting if job not in running and job not in failed), None)

    def finish(job: Job, result: Callable[[], dict[str, Any]]) -> None:
        try:
            found = result()
        except concurrent.futures.process.BrokenProcessPool:
            raise
        except Exception as error:
            # One arm that fails does not stop the others; it is tried again in the next call.
            failed.add(job)
            print(f"FAILED {job}: {type(error).__name__}: {error}\n{traceback.format_exc()}", flush=True)
        else:
            keep(record, job, found, stamp)

    if args.processes == 1:
        while (job := next_job([])) is not None:
            finish(job, functools.partial(work, task, job))
        return
    running: dict[concurrent.futures.Future[dict[str, Any]], Job] = {}
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(args.processes, mp_context=context) as pool:
        while True:
            while len(running) < args.processes and (job := next_job(list(running.values()))) is not None:
                running[pool.submit(work, task, job)] = job
            if not running:
                return
            done, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in done:
                finish(running.pop(future), future.result)


def clock(task: Task, job: Job, caches: str, queue: Any) -> None:
    """Run a job in a process of its own."""
    queue.put(work(task, job, caches))


def run_clock(args: argparse.Namespace, task: Task, record: Record) -> None:
    """Time each arm alone, without any cache before; with ``--again``, then over the caches of that run."""
    deadline, stamp, context = time.monotonic() + args.budget, commit(), multiprocessing.get_context("spawn")
    task = dataclasses.replace(task, threads=args.threads)
    for arm in chosen_arms(args.arms):
        record.read()
        lr = record.rate_of(arm)
        if lr is None:
            continue
        phases = ["clock", "again"] if args.again and arm.kind in ("ours", "auto") else ["clock"]
        jobs = [Job(phase, arm.name, lr, args.seeds[0]) for phase in phases]
        if all(map(record.has, jobs)) or time.monotonic() >= deadline:
            continue
        with tempfile.TemporaryDirectory() as caches:
            for job in jobs:
                queue = context.Queue()
                process = context.Process(target=clock, args=(task, job, caches, queue))
                process.start()
                while process.is_alive() and queue.empty():
                    time.sleep(0.2)
                found = None if queue.empty() else queue.get()
                process.join()
                if found is None:
                    print(f"FAILED {job}: see above", flush=True)
                    break
                if not record.has(job):
                    keep(record, job, found, stamp)


# ---- Command line ----


def smoke(args: argparse.Namespace, folder: Path) -> None:
    """Set the arguments to a tiny model, tiny data and two arms: what is tried is this script."""
    generator = np.random.default_rng(0)
    labels = [0, 1] * 16
    for name in ("train", "test"):
        images = [
            Image.fromarray((generator.random((16, 16, 3)) * 127 + 128 * label).astype(np.uint8)) for label in labels
        ]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "light"])})
        datasets.Dataset.from_dict({"image": images, "label": labels}, features).to_parquet(folder / f"{name}.parquet")
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    set_seed(0)
    config = ViTConfig(**sizes, image_size=16, patch_size=4)
    ViTForImageClassification(config).save_pretrained(folder / "model")
    args.model, args.data, args.image_size, args.batch_size = str(folder / "model"), str(folder), 16, 8
    args.arms = args.smoke_arms
    args.seeds, args.processes, args.grid = args.seeds[:1], 1, [2, 2]
    args.caches = str(folder / "caches")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phase", nargs="+", choices=PHASES, default=["tune", "test", "table"])
    parser.add_argument(
        "--json", type=Path, nargs="+", required=True, help="record; for table and plot there may be several"
    )
    parser.add_argument("--model", help="folder or name of a pretrained ViT-like classifier")
    parser.add_argument(
        "--data", help="folder of train.parquet and test.parquet with columns image and label; or digits"
    )
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--folds", type=int, default=0, help="pool the splits and test by folds; 0 takes the splits")
    parser.add_argument("--train", type=int, default=0, help="train on so many rows, each class evenly; 0 takes all")
    parser.add_argument("--scratch", action="store_true", help="random weights")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--bf16", action="store_true", help="bf16 autocast, for machines that compute in it")
    parser.add_argument("--workers", type=int, default=0, help="processes that render images, per run")
    parser.add_argument("--arms", nargs="+", default=["coarse"], help=f"arms, or {', '.join(GROUPS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--tune-seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--grid", type=int, nargs=2, default=GRID, help="learning rates of an arm at first, and at most"
    )
    parser.add_argument("--rates", type=Path, help="take the learning rates of another record, and tune none")
    parser.add_argument("--processes", type=int, default=1, help="runs side by side, one thread each if above 1")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of a run by itself")
    parser.add_argument("--budget", type=float, default=math.inf, help="start no run after so many seconds")
    parser.add_argument("--again", action="store_true", help="time a second run over the same caches, too")
    parser.add_argument("--caches", default=None, help="folder of caches that runs share; default: beside the record")
    parser.add_argument("--list", action="store_true", help="print the jobs that remain, and run none")
    parser.add_argument("--picture", type=Path, help="SVG or PNG for the plot; default: beside the record")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, tiny data, two arms")
    two = ["full/epochs=1/decay=0.75", "ours/k=2/epochs=1"]
    parser.add_argument("--smoke-arms", nargs="+", default=two, help="others, for a model of 4 blocks")
    return parser.parse_args()


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """Return what all runs of a record share; names, not where they lie on this machine."""
    return {
        "model": Path(args.model).name,
        "data": "smoke" if args.smoke else Path(args.data).name,
        "image_size": args.image_size,
        "folds": args.folds,
        "train": args.train,
        "scratch": args.scratch,
        "batch_size": args.batch_size,
        "bf16": args.bf16,
        "recipe": RECIPE,
    }


def rates_of(args: argparse.Namespace, grid: tuple[int, int]) -> Record:
    """Return the record whose learning rates are taken, and say which arms have none."""
    if not args.rates.is_file():
        raise SystemExit(f"--rates {args.rates}: there is no such record.")
    record = Record(args.rates, {"image_size": args.image_size, "batch_size": args.batch_size}, grid)
    for arm in chosen_arms(args.arms):
        if record.rate_of(arm) is None:
            print(f"{arm.name} is left out: {args.rates} has no learning rate of it", flush=True)
    return record


def run(args: argparse.Namespace) -> None:
    """Run the phases that train."""
    record = Record(args.json[0], describe(args), tuple(args.grid))
    if args.rates is not None:
        record.rates = rates_of(args, tuple(args.grid))
    threads = 1 if args.processes > 1 else args.threads
    task = Task(
        model=args.model,
        data=args.data,
        size=args.image_size,
        folds=args.folds,
        train=args.train,
        scratch=args.scratch,
        batch_size=args.batch_size,
        bf16=args.bf16,
        workers=args.workers,
        threads=threads,
        caches=args.caches or str(args.json[0].with_suffix("")) + "-caches",
    )
    if args.list:
        for job in plan(args, record):
            print("done   " if record.has(job) else "remains", job.phase, job.arm, f"lr {job.lr:g} seed {job.seed}")
        return
    if {"tune", "test"} & set(args.phase):
        run_jobs(args, task, record)
    if "clock" in args.phase:
        run_clock(args, task, record)


def main() -> None:
    args = parse_arguments()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        if args.smoke:
            smoke(args, Path(folder))
        if {"tune", "test", "clock"} & set(args.phase):
            if not args.model or not args.data:
                raise SystemExit("To train, give --model and --data.")
            run(args)
    if args.list:
        return
    records = [json.loads(path.read_text()) for path in args.json if path.exists()]
    if "table" in args.phase:
        print_tables(records)
    if "plot" in args.phase:
        draw(records, args.picture or args.json[0].with_suffix(".svg"))


if __name__ == "__main__":
    main()
