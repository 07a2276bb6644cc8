"""``FreezeCacheTrainer``: the only module that knows ``transformers.Trainer``. It holds overrides and nothing else."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer

from .config import CacheConfig, FreezeConfig
from .dataset import CachedDataset
from .distributed.process_group import ProcessGroup
from .errors import UnsupportedSetupError
from .report.record import RunRecord
from .report.stopwatch import Stopwatch
from .training.adapter import (
    augmenter_of,
    begin_from,
    build_cache_of,
    check_setup,
    check_train_arguments,
    optimizer_ready,
    plan_stages_of,
    prepare_optimizer,
    restore_weights_of,
    resume_weights_of,
    start_run,
)
from .training.block_weights import withhold_weights
from .training.by_block import compiling_by_block
from .training.checkpoints import move_scheduler, move_to_world_size
from .training.freezer import Freezer
from .training.hooks import check_trainer_hooks
from .training.learning_rates import begin_after
from .training.optimizer_arguments import copied_arguments
from .training.placement import find_process_groups
from .training.planner import shuffle_seed
from .training.preflight import check_plain_training, check_pushed, check_steps
from .training.reporting import describe, install_callbacks, report_callbacks, write_model_card
from .training.sharing import push_cache
from .training.stage import StageRunner

__all__ = ["FreezeCacheTrainer"]

logger = logging.getLogger(__name__)


class FreezeCacheTrainer(Trainer):
    """``Trainer`` that freezes leading blocks stage by stage and trains the rest from a cache of their output.

    Every argument of ``Trainer`` keeps its meaning. Without ``freeze_config`` the numbers are those of ``Trainer``, to the
    bit. Only restoring weights (resume, ``load_best_model_at_end``) is mended, see ``weights.restore_weights``.

    With ``freeze_config`` the training data are drawn as *views*: view ``v`` of row ``i`` is one draw of the data set's
    own transform under random states seeded by ``(view_seed, i, v)``. A stage that freezes at least one block first writes
    the hidden states of ``num_views`` views of every row to the folder of caches, or finds them there. It then trains on
    them. Evaluation sees images unless ``cache_eval`` is set, and prediction always. Saved models are whole, ordinary models.

    Each stage logs what was decided for it, and each epoch what it cost, as ``freezecache/<name>``; see
    ``report.run_log``. Where a run saves, ``ReportCallback`` writes its record and a report.

    Args:
        args: As for ``Trainer``, positional or keyword.
        freeze_config: When to freeze how many blocks. ``None`` trains like ``Trainer``.
        cache_config: Where and how hidden states are cached. Default: ``CacheConfig()``.
        train_transform: Renders training views, given with ``eval_transform`` in place of the data set's own transform.
            Both take and return a batch dict like ``Dataset.set_transform``'s.
        eval_transform: Renders the base view (view 0).
        kwargs: As for ``Trainer``.

    Raises:
        UnsupportedSetupError: The setup cannot work with cached training; the message says why and what to do.
        UnsupportedModelError: The model has no blocks to split at.
        ScheduleError: The schedule cannot be read or asks for more blocks than there are.
    """

    compute_loss_func: Any
    eval_dataset: Any
    model: Any
    model_wrapped: Any
    optimizer: Any
    optimizer_cls_and_kwargs: Any

    def __init__(
        self,
        *args: Any,
        freeze_config: FreezeConfig | None = None,
        cache_config: CacheConfig | None = None,
        train_transform: Callable[..., Any] | None = None,
        eval_transform: Callable[..., Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.freeze_config = freeze_config
        self.cache_config = cache_config or CacheConfig()
        self._transforms = (train_transform, eval_transform)
        self._process_groups = (ProcessGroup(), ProcessGroup())  # the run's, and those that share a folder of caches
        self._freezer = Freezer()
        self._record = RunRecord()
        self._chosen = None  # by ``schedule="auto"``
        self._run: StageRunner | None = None  # of the last ``train()`` or ``build_cache()``
        if freeze_config is None:
            check_plain_training(self._transforms, self.cache_config)
        else:
            check_trainer_hooks(Trainer)
        super().__init__(*args, **kwargs)
        self.optimizer_cls_and_kwargs = copied_arguments(self.optimizer_cls_and_kwargs)
        if freeze_config is None:
            return
        self._process_groups = find_process_groups(self)
        check_setup(self, FreezeCacheTrainer)
        install_callbacks(self)

    # ---- Training ----

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, as ``Trainer.train`` does; stages change at epoch boundaries.

        Raises:
            DataError: The transform or the collator gives batches that cannot be used.
            UnrepeatableTransformError: The transform has a random generator of its own.
            UnsupportedSetupError: As at construction, the transform cannot be hashed, or this is a trial of a search.
            CacheWriteError: The folder of caches cannot be written.
            CacheLockedError: Another live process is building the cache of a stage.
            CacheCorruptError: The cache of a stage is damaged.
            CacheMismatchError: A cache with the right fingerprint does not hold what its rows give now.
        """
        if self.freeze_config is None:
            return super().train(*args, **kwargs)
        kwargs = check_train_arguments(self, inspect.signature(Trainer.train).bind(self, *args, **kwargs))
        started = time.perf_counter()
        stages, num_epochs = plan_stages_of(self)
        if self._freezer.begin(self.optimizer, stages[0].split_point):
            self.optimizer, self.lr_scheduler = None, None
        self._record.decisions, self._record.epochs = [], []
        self._run = start_run(self, stages, num_epochs, augmenter_of(self, FreezeCacheTrainer), FreezeCacheTrainer)
        describe(self)
        self._record.preflight_seconds = round(time.perf_counter() - started, 3)
        try:
            with compiling_by_block(self.accelerator):
                return super().train(**kwargs)
        finally:
            self._run.end()

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int, *args: Any, **kwargs: Any
    ) -> Any:
        """As ``Trainer``; a checkpoint of another number of processes, with other steps per epoch, goes on in its epoch."""
        state = super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, *args, **kwargs)
        checkpoint = kwargs.get("resume_from_checkpoint", args[0] if args else None)
        if self._run is None or checkpoint is None:
            return state
        moved = move_to_world_size(checkpoint, self.args, self.state, num_update_steps_per_epoch, max_steps)
        if moved is None:
            return state
        self.state.global_step = self._run.moved_to = moved[0]
        return moved[1:]

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """As ``Trainer``; blocks that no stage will train are not in the optimizer.

        The model is final here (``model_init``, restored weights); the optimizer does not exist yet, see ``optimizer_ready``.
        """
        run = self._run
        if run is None:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        weights, self._freezer.optimizer_is_ours = self.freeze_config.block_weights, self.optimizer is None  # type: ignore[union-attr]
        split_point = begin_from(run, resume_from_checkpoint, weights)
        run.use_model(self.model)
        if weights == "qkv":
            withhold_weights(run.splits, self._freezer)
        run.freeze(split_point, self.optimizer)  # a user's own optimizer holds all parameters
        # A wrapper of an earlier train() would be kept, around parameters that this one may not train.
        self.model_wrapped = run.runtime.unwrap(self.model_wrapped, run.data.example_batch)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        prepare_optimizer(self)
        check_steps(run, self.model_wrapped)
        if run.moved_to is not None:
            move_scheduler(self.lr_scheduler, run.moved_to)
        # The caller keeps what it gets for the whole run: not the wrapper, which the next stage replaces.
        return self.model, prepared[1]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer``, which uses its arguments up: rehearsing needs them as well, and another ``train()``."""
        asked = self.optimizer_cls_and_kwargs
        self.optimizer_cls_and_kwargs = copied_arguments(asked)
        try:
            return super().create_optimizer(*args, **kwargs)
        finally:
            self.optimizer_cls_and_kwargs = asked

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer``; where the head trains first, alone, the schedule begins when blocks thaw."""
        known, head = self.lr_scheduler, 0 if self._run is None else self._run.steps_of_head
        scheduler = super().create_scheduler(max(num_training_steps - head, 1), *args, **kwargs)
        if known is None:
            begin_after(head, scheduler)
        return scheduler

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As ``Trainer``; a stage that begins with this epoch is entered before."""
        if (run := self._run) is None:
            super()._run_epoch(*args, **kwargs)
            return
        epoch, started = kwargs["epoch"], time.perf_counter()
        stage = run.begins(epoch)
        if stage is not None:
            self.model_wrapped = run.leave(stage, self.optimizer, self.model_wrapped)
            self.model_wrapped = run.enter(stage, self.model_wrapped)
            run.rates.enter(run.current.decision.lr_scale, self.optimizer, self.lr_scheduler)
            self.log(run.stage_logs)
            for callback in report_callbacks(self):
                callback.stage_began(self.args, self.state)
        run.begin_epoch(epoch)
        batch_size, entering_seconds = self.get_total_train_batch_size(self.args), time.perf_counter() - started
        run.stopwatch = Stopwatch(
            self.state.global_step, batch_size, len(run.sampler), entering_seconds, self.args.device
        )
        loader = run.current.loader
        super()._run_epoch(*args, **{**kwargs, "model": self.model_wrapped, "train_dataloader": loader})
        if logs := run.cost_logs(self.state):
            self.log(logs)
        run.end_epoch(epoch)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Train on a batch of images, or on a batch of hidden states through the suffix."""
        if self._run is None:
            return super().training_step(model, inputs, *args, **kwargs)
        return self._run.training_step(super().training_step, self.state.global_step, model, inputs, *args, **kwargs)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer``; with soft labels, by cross-entropy, while a batch of mixed samples is trained on."""
        step = None if self._run is None else self._run.step
        if step is None or step.soft_loss is None:
            return super().compute_loss(*args, **kwargs)
        # Trainer then keeps the labels from the model, which would take soft ones for multi-label, and hands over their number.
        # Not for longer: `training_step` would take every loss for one divided by it.
        self.compute_loss_func = step.soft_loss
        try:
            return super().compute_loss(*args, **kwargs)
        finally:
            self.compute_loss_func = None

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """As ``Trainer`` for images; for cached batches see ``CachedStep.floating_point_ops``."""
        step = self._run and self._run.step
        counted = step.floating_point_ops(inputs) if step else None
        return int(super().floating_point_ops(inputs)) if counted is None else counted

    def _track_num_input_tokens(self, inputs: Any) -> None:
        step = self._run and self._run.step
        super()._track_num_input_tokens(step.as_images(inputs) if step else inputs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        stopwatch = self._run and self._run.stopwatch
        waits = self.control.should_log or self.control.should_evaluate or self.control.should_save
        with stopwatch.paused(waits) if stopwatch else nullcontext():
            super()._maybe_log_save_evaluate(*args, **kwargs)

    def evaluation_loop(self, dataloader: Any, description: str, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer``; from a cache where ``cache_eval`` asks for it, see ``evaluation_cache``."""
        if self._run is not None and description == "Evaluation":
            dataloader = self._run.evaluation_loader(self, dataloader)
        return super().evaluation_loop(dataloader, description, *args, **kwargs)

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Evaluate a batch of images, or a batch of hidden states through the suffix."""
        if self._run is None:
            return super().prediction_step(model, inputs, *args, **kwargs)
        return self._run.prediction_step(self, super().prediction_step, model, inputs, *args, **kwargs)

    # ---- Data ----

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """As ``Trainer``; a ``CachedDataset`` is shuffled chunk by chunk, and shows its views in turn."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(dataset, CachedDataset):
            return super()._get_train_sampler(*(() if train_dataset is None else (train_dataset,)))
        window = self.cache_config.shuffle_window
        dataset.max_chunks = max(dataset.max_chunks, window + min(self._train_batch_size, window))
        return dataset.sampler(shuffle_seed(self.args), window)

    def get_train_dataloader(self) -> DataLoader:  # type: ignore[type-arg]
        """Return a loader that renders views as they are needed; each stage swaps in its own when it begins.

        Raises:
            UnsupportedSetupError: ``train()`` has not been called.
        """
        if self.freeze_config is None:
            return super().get_train_dataloader()
        if self._run is None:
            raise UnsupportedSetupError("get_train_dataloader() is available once train() has been called.")
        return self._run.live_loader()  # type: ignore[no-any-return]

    # ---- Checkpoints ----

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As ``Trainer``; the stage is written first, since ``Trainer`` may push the folder to the Hub at once."""
        if self._run is not None and self._run.active is not None:
            if logs := self._run.cost_logs(self.state):
                self.log(logs)
            if self.args.should_save:
                self._run.save(Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}")
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        """As ``Trainer``; what follows says that the checkpoint is complete, so all processes have to be done before."""
        with self._process_groups[0].fail_together():
            super()._save_rng_state(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not resume_weights_of(self, resume_from_checkpoint, model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not restore_weights_of(self, self.state.best_model_checkpoint):
            super()._load_best_model()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As ``Trainer``; the optimizer gets the groups that it had when it was saved."""
        with optimizer_ready(self, checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    # ---- Caches by themselves ----

    def build_cache(self, split_point: int | None = None) -> CachedDataset:
        """Build the cache of a split point without training, or find it.

        Args:
            split_point: Number of frozen blocks; default those of the schedule that one pass over the images can give.

        Raises:
            FreezeCacheError: As ``train``.
        """
        return build_cache_of(self, split_point)

    def push_cache_to_hub(self, repo_id: str, private: bool = True, **settings: Any) -> Any:
        """Push the cache of the stage that was trained or built last to a data set on the Hub. The first process pushes.

        Source data set, its licence, classes and the model are written on its card where they are known: where they came
        from the Hub, or are given. A model whose frozen blocks were trained first, in earlier stages, is not the one of the
        Hub.

        Args:
            repo_id: ``user/name``.
            private: A repository that is made is private, and a public one is refused; ``False`` makes a public one.
            settings: As for ``CachedDataset.push_to_hub``.

        Raises:
            UnsupportedSetupError: There is no cache yet.
            FreezeCacheError: As ``CachedDataset.push_to_hub``.
        """
        return push_cache(self._run, repo_id, private, settings)

    # ---- The Hub ----

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer``; the model only, never a cache.

        Raises:
            UnsupportedSetupError: A cache lies inside ``output_dir``, or the model is a ``SuffixModel``.
        """
        check_pushed(Path(self.args.output_dir), self.model)
        return super().push_to_hub(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        try:
            check_pushed(Path(self.args.output_dir), self.model)
        except UnsupportedSetupError as error:  # training goes on
            logger.warning("Checkpoint not pushed. %s", error)
        else:
            super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(self, *args: Any, baseline: Any = None, seeds: Any = (), **kwargs: Any) -> None:
        """Write ``README.md``, the record and the picture it shows into ``output_dir``; ``push_to_hub`` calls this.

        Data sets and licence are named if given, and never guessed. Without ``freeze_config`` the card is ``Trainer``'s.

        Args:
            args: As for ``Trainer.create_model_card``.
            baseline: ``output_dir`` of a run without freezing, to compare with, or of several of one setting.
            seeds: ``output_dir`` of runs, one or several, that differ in the seed only: for mean and spread.
            kwargs: As for ``Trainer.create_model_card``.

        Raises:
            RunError: ``baseline`` or ``seeds`` hold no run, or runs that differ in more than the seed.
        """
        if self.freeze_config is None:
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            call = inspect.signature(Trainer.create_model_card).bind(self, *args, **kwargs)
            call.apply_defaults()
            write_model_card(self, dict(call.arguments), baseline, seeds)
