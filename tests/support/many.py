"""Run in several processes: trains tiny models on several processes, and writes what every process saw."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import resource
import signal
import sys
import time
import warnings
import weakref
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import datasets
import torch
import torch.distributed as dist
import transformers

from hf_freezecache.cache.reader import CacheReader
from hf_freezecache.dataset import CachedDataset
from hf_freezecache.errors import CacheWriteError, FreezeCacheError
from hf_freezecache.training import stage_cache, stage_costs
from support.images import make_images
from support.other_place import other_place
from support.tiny import Recorder, SlowTransform, TinyTransform, make_trainer, tiny_vit

ROWS = 50
SCHEDULE = "0:0,1:1,2:3"
SETTINGS = {"schedule": SCHEDULE, "num_train_epochs": 4, "per_device_train_batch_size": 5}


class Watched(Recorder):
    """Counts what DDP reduces, what is decoded, and the wrappers that are still there when another is made."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        prepare, self.alive = self.accelerator.prepare_model, []

        def counting(*args: Any, **kwargs: Any) -> Any:
            self.alive.append(sum(wrapper() is not None for wrapper in getattr(self, "wrappers", [])))
            return prepare(*args, **kwargs)

        self.accelerator.prepare_model = counting
        try:
            return super().train(*args, **kwargs)
        finally:
            del self.accelerator.prepare_model

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.rates = [*getattr(self, "rates", []), self.optimizer.param_groups[0]["lr"]]
        return super().training_step(*args, **kwargs)

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        if "freezecache/built_shards" in logs:
            self.built = [*getattr(self, "built", []), logs["freezecache/built_shards"]]
        if "freezecache/split_point" in logs:  # a stage was entered
            self.note_stage(int(logs["freezecache/split_point"]))
        super().log(logs, *args, **kwargs)

    def note_stage(self, split_point: int) -> None:
        loader = self._run.current.loader
        self.stages = [*getattr(self, "stages", []), {"split_point": split_point, "reduced": None, "decoded": []}]
        self.cached = loader.dataset if isinstance(loader.dataset, CachedDataset) else None
        wrapped = self.model_wrapped
        if isinstance(wrapped, torch.nn.parallel.DistributedDataParallel):
            self.wrappers = [*getattr(self, "wrappers", []), weakref.ref(wrapped)]
            self.seen: list[int] = []

            def hook(_, bucket):  # DDP reads annotations, which must not be strings
                self.seen.append(bucket.buffer().numel())
                return (
                    dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)
                    .get_future()
                    .then(lambda future: future.value()[0])
                )

            wrapped.register_comm_hook(None, hook)
            self.stages[-1]["find_unused"] = wrapped.find_unused_parameters

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        steps = self.state.global_step
        before = 0 if getattr(self, "cached", None) is None else self.cached.decoded_chunks
        old = getattr(self, "cached", None)
        super()._run_epoch(*args, **kwargs)
        stage = self.stages[-1]
        if getattr(self, "seen", None):
            stage["reduced"] = sum(self.seen) // (self.state.global_step - steps)
            self.seen.clear()
        if self.cached is not None:
            stage["decoded"].append(self.cached.decoded_chunks - (before if self.cached is old else 0))


def digest(model: torch.nn.Module) -> str:
    found = hashlib.sha256()
    for name, parameter in model.state_dict().items():
        found.update(name.encode() + parameter.detach().numpy().tobytes())
    return found.hexdigest()


def data(rows: int = ROWS) -> datasets.Dataset:
    return make_images(rows).with_transform(TinyTransform(augment=True))


def quiet() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def run(resume: str | bool | None = None, **settings: Any) -> dict[str, Any]:
    cache = {"num_views": 2, "transform_id": "tiny", **settings.pop("cache", {})}
    trainer = make_trainer(tiny_vit(), data(), cache=cache, **{**SETTINGS, "cls": Watched, **settings})
    trainer.train(resume_from_checkpoint=resume)
    logs = trainer.state.log_history
    return {
        "digest": digest(trainer.model),
        "chosen": trainer._record.chosen,
        "losses": getattr(trainer, "losses", []),
        "stages": getattr(trainer, "stages", []),
        "alive": trainer.alive,
        "built": [entry["freezecache/built_shards"] for entry in logs if "freezecache/built_shards" in entry],
        "new": getattr(trainer, "built", []),
        "rates": getattr(trainer, "rates", []),
        "steps": trainer.state.global_step,
        "trainable": [e["freezecache/trainable_parameters"] for e in logs if "freezecache/trainable_parameters" in e],
    }


def parity(*steps: str, **settings: Any) -> dict[str, Any]:
    """Train with a cache and without, and go on from the checkpoints of these steps, or from all."""
    found = {"never": run(cache={"mode": "never"}, save_strategy="no", **settings)}
    # By default the run that is compared is the one that saves: all steps have one apart, which finds the caches.
    saving = {"save_strategy": "steps", "save_steps": 5, "output_dir": "saved", **settings}
    found["always"] = run(cache={"mode": "always"}, **(saving if steps else {"save_strategy": "no", **settings}))
    saved = found["always"] if steps else run(**saving)
    if dist.is_initialized():
        dist.barrier()  # the first process is the last to save
    checkpoints = sorted(Path("saved").glob("checkpoint-*"))
    if steps:
        checkpoints = [path for path in checkpoints if path.name.partition("-")[2] in steps]
    resumed = {path.name: run(str(path), **{**settings, "output_dir": "resumed"}) for path in checkpoints}
    return {**found, "saved": saved, "resumed": resumed}


def adaptive(*steps: str) -> dict[str, Any]:
    """Blocks are frozen as their gradients settle."""
    return parity(*steps, schedule="autofreeze(percentile=60)", learning_rate=2e-2, save_steps=4)


def at_every_checkpoint(name: str, **settings: Any) -> dict[str, Any]:
    """Train with a cache and without, and go on from every checkpoint."""
    found = {mode: run(cache={"mode": mode, "cache_dir": name}, **settings) for mode in ("never", "always")}
    saving = {"save_strategy": "steps", "save_steps": 5, "output_dir": f"{name}-saved", "cache": {"cache_dir": name}}
    run(**settings, **saving)
    if dist.is_initialized():
        dist.barrier()
    again = {**settings, "output_dir": f"{name}-resumed", "cache": {"cache_dir": name}}
    names = [f"checkpoint-{step}" for step in (5, 10, 15, 20)]
    return {**found, "resumed": {each: run(f"{name}-saved/{each}", **again) for each in names}}


def fewer_tokens() -> dict[str, Any]:
    """Half of the patch tokens."""
    return at_every_checkpoint("fewer", freeze={"token_keep": 0.5, "unfrozen_token_keep": 0.5})


def queries() -> dict[str, Any]:
    """Of the blocks, queries, keys and values alone: the head first, on half of the rows, then behind one block, then all."""
    return at_every_checkpoint("queries", schedule="0:4,1:1,2:0", freeze={"block_weights": "qkv", "head_rows": 0.5})


def offloaded() -> dict[str, Any]:
    """Frozen weights leave the device, as if there were another memory, and come back to be looked at in each epoch."""
    plain = run(save_strategy="no")
    with other_place():
        saving = {"save_strategy": "steps", "save_steps": 15, "output_dir": "offloaded"}
        there = run(cache={"offload_prefix": True}, **saving)
        if dist.is_initialized():
            dist.barrier()
        resumed = run("offloaded/checkpoint-15", cache={"offload_prefix": True}, output_dir="offloaded-resumed")
    return {"plain": plain, "offloaded": there, "resumed": resumed}


def thawing() -> dict[str, Any]:
    """A head first, then more, then all; see ``run`` for the epochs."""
    rates = {"layer_decay": 0.8, "lr_scale": "1:2,4:3"}
    return at_every_checkpoint("thawing", schedule="0:4,1:1,2:0,3:2", freeze=rates)


def auto() -> dict[str, Any]:
    """What ``schedule="auto"`` chooses."""
    return at_every_checkpoint("auto", schedule="auto")


def evaluating(**cache: Any) -> dict[str, Any]:
    """Evaluate after each epoch, from images and from caches; the last batch is a short one."""
    found = {}
    for name, cache_eval in (("images", False), ("cached", True)):
        trainer = make_trainer(
            tiny_vit(hidden_dropout_prob=0.2),
            data(),
            make_images(27).with_transform(TinyTransform(augment=False)),
            cache={"cache_dir": name, "cache_eval": cache_eval, **cache},
            **{**SETTINGS, "schedule": "0:1,2:3", "eval_strategy": "epoch", "per_device_eval_batch_size": 4},
        )
        trainer.train()
        losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        from_cache = trainer._run.evaluation.step is not None
        found[name] = {"evaluations": losses, "losses": trainer.losses, "from_cache": from_cache}
    return found


def one_node_is_full() -> dict[str, Any]:
    """Evaluate on two machines, of which the second has no room for a cache of the evaluation set."""
    build = stage_cache.build_cache

    def full(cache_dir, plan, *args, **kwargs):
        if plan.layout.num_samples == 27 and os.environ["RANK"] == "1":
            raise CacheWriteError("no space left")
        return build(cache_dir, plan, *args, **kwargs)

    stage_cache.build_cache = full
    try:
        return evaluating(cache_placement="node")
    finally:
        stage_cache.build_cache = build


def compiled() -> dict[str, Any]:
    """``torch_compile``, from a cache and live, and the graphs of both; and the same without a compiler."""
    from torch._dynamo.utils import counters

    found = {}
    compiling = {"torch_compile": True, "torch_compile_backend": "aot_eager", "num_train_epochs": 3}
    for name, mode, settings in (
        ("always", "always", compiling),
        ("never", "never", compiling),
        ("plain", "never", {}),
    ):
        torch._dynamo.reset()
        counters.clear()
        os.environ["ACCELERATE_DYNAMO_BACKEND"] = "no"  # `TrainingArguments` sets it, and leaves it
        found[name] = run(cache={"mode": mode, "cache_dir": "compiled"}, **{"num_train_epochs": 3, **settings})
        found[name]["graphs"] = counters["stats"]["unique_graphs"]
    os.environ["ACCELERATE_DYNAMO_BACKEND"] = "no"
    return found


class OneNotANumber(Recorder):
    """The loss of one process is no number in one step; its gradients are."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        return loss + float("nan") if (self.state.global_step, self.args.process_index) == (3, 1) else loss


def not_a_number(mode: str) -> dict[str, Any]:
    rows = make_images(ROWS).with_transform(TinyTransform(True))
    cache = {"mode": mode, "cache_dir": f"caches-{mode}"}
    trainer = make_trainer(tiny_vit(), rows, schedule="0:2", cache=cache, cls=OneNotANumber, num_train_epochs=2)
    trainer.train()
    losses = [str(loss) for loss in trainer.losses]  # JSON has no NaN
    return {"losses": losses, "sum": sum(float(p.detach().double().sum()) for p in trainer.model.parameters())}


def deciding() -> dict[str, Any]:
    """``mode="auto"``, where a cache pays and where it does not."""
    stage_costs.LEAST_SECONDS = 0.1
    rows = make_images(ROWS).with_transform(SlowTransform(augment=True))
    found = {}
    for name, epochs, views in (("long", 6, 1), ("short", 1, 6)):
        cache = {"mode": "auto", "cache_dir": name, "num_views": views}
        trainer = make_trainer(
            tiny_vit(), rows, cache=cache, **{**SETTINGS, "schedule": "0:2", "num_train_epochs": epochs}
        )
        trainer.train()
        decision = trainer._record.decisions[0]
        found[name] = {"cache": decision.cache, "predicted": decision.predicted}
    return found


def lossy() -> dict[str, Any]:
    """A lossy cache with copies, promoted shard by shard; and the same without making room."""
    cache = {"codec": "auto", "build_from": "previous_cache", "chunk_size": 4}
    return {
        "plain": run(cache={**cache, "cache_dir": "plain"}),
        "consume_previous_cache": run(cache={**cache, "cache_dir": "low", "consume_previous_cache": True}),
    }


def build() -> dict[str, Any]:
    """Build and promote caches from weights that do not change: they depend on nothing that several processes change."""
    settings = {"schedule": "0:1,1:3", "num_train_epochs": 2, "learning_rate": 0.0}
    processes = os.environ.get("WORLD_SIZE", "1")
    caches = {
        "lossless": {"cache_dir": f"lossless-{processes}"},
        "lossy": {"cache_dir": f"lossy-{processes}", "codec": "auto", "build_from": "previous_cache"},
    }
    return {name: run(**settings, cache={**cache, "chunk_size": 4}) for name, cache in caches.items()}


def one_fails(mode: str) -> dict[str, Any]:
    """The disk of the second process is full: it may write no file over 4 KiB."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if int(os.environ["RANK"]) == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        return run(schedule="0:1,1:3", num_train_epochs=2, cache={"mode": mode, "cache_dir": f"full-{mode}"})
    except FreezeCacheError as error:
        return {"error": [type(error).__name__, str(error)]}
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def node() -> dict[str, Any]:
    """A folder of caches on each machine."""
    settings = {"schedule": "0:1,1:3", "num_train_epochs": 3}
    cache = {"cache_placement": "node", "chunk_size": 4}
    found = {mode: run(**settings, cache={**cache, "mode": mode}) for mode in ("always", "never")}
    readers = [CacheReader(path.parent) for path in sorted(Path("caches").glob("k*/index.json"))]
    return {
        **found,
        "rows": [sorted(reader.layout.order.tolist()) for reader in readers],
        "again": run(**settings, cache=cache),
    }


def go_on(checkpoint: str) -> dict[str, Any]:
    return run(checkpoint)


def rates() -> dict[str, Any]:
    """Train with rates by layer and stage, and go on from all checkpoints."""

    def make(**arguments: Any) -> Watched:
        freezing = dataclasses.replace(arguments["freeze_config"], layer_decay=0.6, lr_scale="auto")
        return Watched(**{**arguments, "freeze_config": freezing})

    saved = run(cls=make, save_strategy="steps", save_steps=5, output_dir="rates")
    dist.barrier()
    folders = sorted(Path("rates").glob("checkpoint-*"))
    return {"saved": saved, "resumed": {path.name: run(str(path), cls=make, output_dir="again") for path in folders}}


def terminated() -> dict[str, Any]:
    """SIGTERM reaches one process only, some time before the other could get its own."""
    settings = {"output_dir": "terminated", "enable_jit_checkpoint": True, "cache": {"cache_dir": "terminated-caches"}}
    step = Watched.training_step

    def stopping(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        for callback in self.callback_handler.callbacks:
            if getattr(callback, "jit_manager", None) is not None:
                callback.jit_manager.kill_wait = 0.0  # the default, 3 s, is longer than this run
        if self.state.global_step == 9 and int(os.environ["RANK"]) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)
        return step(self, *args, **kwargs)

    Watched.training_step = stopping
    try:
        stopped = run(**settings)
    finally:
        Watched.training_step = step
    dist.barrier()
    saved = [path.name for path in Path("terminated").glob("checkpoint-*")]
    resumed = run(True, **{**settings, "enable_jit_checkpoint": False})
    return {"stopped": stopped["steps"], "saved": saved, "resumed": resumed}


def save(folder: str) -> dict[str, Any]:
    return run(save_strategy="steps", save_steps=5, output_dir=folder, cache={"cache_dir": f"{folder}-caches"})


def go_on_all(folder: str) -> dict[str, Any]:
    """Resume at every checkpoint that another number of processes has saved."""
    cache = {"cache_dir": f"{folder}-caches"}
    settings = {"output_dir": "changed", "learning_rate": 3e-3, "logging_steps": 1, "cache": cache}
    return {path.name: run(str(path), **settings) for path in sorted(Path(folder).glob("checkpoint-*"))}


def killed_saving() -> dict[str, Any]:
    """The second process dies where it would write its random state, of a checkpoint that makes room for itself."""
    write = Watched._save_rng_state

    def dying(self, folder: str) -> None:
        if self.state.global_step == 10 and int(os.environ["RANK"]) == 1:
            time.sleep(0.5)  # the first one would be through by now
            os._exit(9)
        write(self, folder)

    Watched._save_rng_state = dying
    return run(save_strategy="steps", save_steps=5, save_total_limit=1, output_dir="killed")


def saved_again() -> dict[str, Any]:
    return run(True, output_dir="killed")


def twice() -> dict[str, Any]:
    """Train twice with the user's own optimizer."""
    model = tiny_vit()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    cache = {"num_views": 2, "transform_id": "tiny", "cache_dir": "twice"}
    trainer = make_trainer(
        model, data(), cls=Watched, cache=cache, trainer={"optimizers": (optimizer, None)}, **SETTINGS
    )
    held = []
    for _ in range(2):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        trainer.train()
        held.append(sum(not torch.equal(value, before[name]) for name, value in model.state_dict().items()))
    return {"changed": held, "of": len(before)}


def refused() -> dict[str, Any]:
    """What cannot be kept on several processes."""
    rank = int(os.environ["RANK"])
    tries: dict[str, Any] = {
        "rows": lambda: trainer_on(make_images(ROWS, seed=rank)).train(),
        "lengths": lambda: trainer_on(make_images(ROWS + rank)).train(),
        "split_batches": lambda: trainer_on(make_images(ROWS), accelerator_config={"split_batches": True}),
        "dispatch_batches": lambda: trainer_on(make_images(ROWS), accelerator_config={"dispatch_batches": True}),
        "drop_last": lambda: trainer_on(make_images(ROWS), dataloader_drop_last=True, per_device_train_batch_size=40),
        "weights": lambda: trainer_on(make_images(ROWS), rank).build_cache(1),
    }
    found = {}
    for name, attempt in tries.items():
        try:
            attempt()
            found[name] = "nothing"
        except FreezeCacheError as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def trainer_on(images: datasets.Dataset, shift: float = 0.0, **settings: Any) -> Watched:
    model = tiny_vit()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(shift)
    rows = images.with_transform(TinyTransform(augment=True))
    return make_trainer(model, rows, cls=Watched, cache={"transform_id": "tiny"}, **{**SETTINGS, **settings})


def too_many() -> dict[str, Any]:
    try:
        return run(cache={"chunk_size": 50})
    except FreezeCacheError as error:
        return {"error": [type(error).__name__, str(error)]}


def main(*scenarios: str) -> None:
    """Each scenario is a function, with its arguments after colons."""
    quiet()
    found = {}
    for scenario in scenarios:
        name, *arguments = scenario.split(":")
        found[scenario] = globals()[name](*arguments)
    rank, size = (os.environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    Path(f"found-{rank}-of-{size}.json").write_text(json.dumps(found))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
