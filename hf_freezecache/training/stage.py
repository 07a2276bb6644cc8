"""Enters the stages of a run one after the other: freezes, finds or builds the cache, and says what was decided."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..config import CacheConfig
from ..data.feature_augmenter import FeatureAugmenter
from ..data.kept_tokens import TokenSubset
from ..data.sampler import ChunkSampler
from ..data.training_data import TrainingData
from ..dataset import CachedDataset
from ..distributed.ddp import is_replicated, wrap_again
from ..model.compiled import CompiledBlocks
from ..model.split import Split, Splits
from ..report.record import Decision, RunRecord, progress_to_dict
from ..report.run_log import decision_logs, epoch_logs
from ..report.stopwatch import Stopwatch
from ..schedules import Stage, stage_at, thawed_to
from .adaptive import AdaptiveStages
from .checkpoints import Chosen, SavedStage, check_goes_on, save_stage
from .decisions import describe_cache
from .evaluation_cache import EvaluationCache
from .evaluation_costs import Evaluations
from .freezer import Freezer
from .frozen_weights import FrozenWeights
from .learning_rates import LearningRates
from .offload import Step
from .planner import Outlook, predict_passes, steps_of_head, why_live
from .runtime import Runtime
from .stage_batches import cached_batches, live_batches
from .stage_cache import StageCache
from .stage_costs import predict_costs
from .stage_opening import open_for
from .transform_watch import TransformWatch

__all__ = ["ActiveStage", "StageRunner"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ActiveStage:
    """The stage that is being trained.

    Attributes:
        stage: The stage.
        split: The model, split where its frozen blocks end.
        loader: Gives its batches, of hidden states or of images.
        step: Trains on its batches, of hidden states or of some tokens; ``None`` if ``Trainer`` takes them as they are.
        decision: What was decided for the stage, and why.
    """

    stage: Stage
    split: Split
    loader: Any
    step: Step | None
    decision: Decision


@dataclass
class StageRunner:
    """The state of one call of ``train()`` or ``build_cache()``.

    Attributes:
        runtime: The trainer.
        config: The user's settings of caches.
        stages: All stages of the run, in order, as far as they are known.
        num_epochs: Epochs of the run; the last may be a part of one.
        data: The training data.
        splits: The splits of the model.
        sampler: Order of the samples, of cached and live stages alike.
        augmenter: Augments cached batches, if the user asks for it.
        cache: Finds and builds caches; it is not used under ``mode="never"``.
        freezer: What the trainer has frozen.
        record: The record of the run.
        foreseen: The stages that the run is prepared for: ``stages``, or more where they are decided while training.
        adaptive: Decides stages while training; ``None`` if all are known.
        frozen: Blocks that are frozen now; ``None`` before the first stage.
        frozen_before: Blocks that were frozen where the run begins: in its first stage, or in that of the checkpoint.
        saved: Stage of the checkpoint that the run goes on from, if any.
        active: The stage that is being trained; ``None`` before the first.
        stopwatch: Times the epoch that is being trained.
        moved_to: Optimizer step at which a checkpoint of another number of processes goes on.
        refusals: Why no cache is to be made, by split point; see ``rehearsal.rehearse``.
        token_keep: Share of the patch tokens that steps see behind frozen blocks, and behind the first where none is frozen.
        tokens: What draws these tokens, by split point; see ``rehearsal.rehearse``.
        chosen: What ``schedule="auto"`` chose, if it did: what the model cannot do of it is left out, and the log says so.
        released_bytes: Bytes of optimizer state that the last freezing released.
        stage_logs: What to log of the stage that was entered last.
        watch: Looks whether the transform is still what it was when the cache of the stage was opened.
        rates: What the user asks of learning rates.
        evaluations: What is evaluated while training, if caches are to serve that.
        evaluation: Evaluates from caches, if the user asks for it.
    """

    runtime: Runtime
    config: CacheConfig
    stages: Sequence[Stage]
    num_epochs: float
    data: TrainingData
    splits: Splits
    sampler: ChunkSampler
    augmenter: FeatureAugmenter | None
    cache: StageCache
    freezer: Freezer
    record: RunRecord
    foreseen: Sequence[Stage]
    adaptive: AdaptiveStages | None = None
    frozen: int | None = None
    frozen_before: int = 0
    saved: Stage | None = None
    active: ActiveStage | None = None
    stopwatch: Stopwatch | None = None
    moved_to: int | None = None
    refusals: dict[int, str] = field(default_factory=dict)
    token_keep: tuple[float, float] = (1.0, 1.0)
    chosen: Chosen | None = None
    tokens: dict[int, TokenSubset] = field(default_factory=dict)
    released_bytes: int = 0
    stage_logs: dict[str, float] = field(default_factory=dict)
    watch: TransformWatch | None = None
    frozen_weights: FrozenWeights | None = None
    rates: LearningRates = field(default_factory=LearningRates)
    evaluations: Evaluations = field(default_factory=Evaluations)
    evaluation: EvaluationCache = field(init=False)
    _compiled: CompiledBlocks = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Begin without a cache of any evaluation set, and with nothing compiled."""
        self.evaluation = EvaluationCache(self.config)
        self._compiled = CompiledBlocks(self.splits.blocks, self.runtime.compile_settings)

    @property
    def current(self) -> ActiveStage:
        """The stage that is being trained.

        Raises:
            RuntimeError: No stage has been entered.
        """
        if self.active is None:
            raise RuntimeError("no stage has been entered")
        return self.active

    @property
    def steps_of_head(self) -> int:
        """How many steps the run begins with in which the head trains alone; see ``planner.steps_of_head``."""
        return steps_of_head(self.stages, self.splits.num_blocks, self.runtime.args, self.sampler)

    @property
    def step(self) -> Step | None:
        """What trains on batches of the stage; ``None`` if ``Trainer`` takes them as they are, or there is no stage."""
        return None if self.active is None else self.active.step

    def use_model(self, model: nn.Module) -> None:
        """Go on with another model of the same kind: that of ``model_init``, which ``Trainer`` calls in ``train()``."""
        if model is self.runtime.model:
            return
        self.runtime = replace(self.runtime, model=model)
        self.splits = Splits(model, self.data.image_shape, self.data.call, self.splits.strict)
        self._compiled = CompiledBlocks(self.splits.blocks, self.runtime.compile_settings)
        self.cache.chooser = replace(self.cache.chooser, splits=self.splits, run=self.runtime.run_frozen)

    def live_loader(self) -> Any:
        """Return a loader that renders views as they are needed."""
        # Of an order of its own: iterating over it must not turn that of the run to another epoch.
        return live_batches(self.runtime, self.data, copy.copy(self.sampler))[0]

    def evaluation_loader(self, trainer: Any, images: Any) -> Any:
        """Return what an evaluation reads: ``images``, the trainer's loader, or a cache in a stage that has one. Collective."""
        if self.active is None or self.active.decision.trained_from != "cache":
            return images
        if trainer.model is not self.runtime.model:  # another has taken its place since
            return images
        return self.evaluation.loader(trainer, images, self.runtime, self.splits, self.active.stage.split_point)

    # ---- Freezing ----

    def freeze(self, split_point: int, optimizer: Any) -> int:
        """Freeze that many blocks; return the bytes of optimizer state that were released.

        Raises:
            UnsupportedSetupError: The model uses reentrant activation checkpointing.
        """
        self.frozen = split_point
        return self.freezer.freeze(self.splits.at(split_point), optimizer)

    # ---- Stages ----

    def begin_epoch(self, epoch: int) -> None:
        """Order the samples as in this epoch, and keep frozen what is to be frozen, whatever a callback has done."""
        self.sampler.set_epoch(epoch)
        self.freezer.hold()

    def end_epoch(self, epoch: int) -> None:
        """Thaw what the next epoch trains: a callback that freezes some of it does so before the stage is entered."""
        self.stopwatch, stage = None, stage_at(self.stages, epoch + 1)
        if self.frozen is not None and stage.split_point < self.frozen:
            self.freezer.freeze(self.splits.at(stage.split_point))

    def begins(self, epoch: int) -> Stage | None:
        """Return the stage that begins in an epoch, or with which a resumed run begins; ``None`` if none does. Collective."""
        if self.adaptive is not None:
            self.stages = self.adaptive.begin_epoch(epoch)
            self.cache.split_points = tuple(stage.split_point for stage in self.stages)
        stage = stage_at(self.stages, epoch)
        return None if self.active is not None and self.active.stage == stage else stage

    def leave(self, stage: Stage, optimizer: Any, wrapped: nn.Module) -> nn.Module:
        """Leave the stage before: drop its loader, freeze for the next stage, and prune the optimizer.

        Args:
            stage: The next stage.
            optimizer: The optimizer.
            wrapped: The model in its wrapper for several processes.

        Returns:
            The model, without its wrapper if the next stage needs another. Whoever holds the old wrapper must let go of it
            before ``enter``: its buckets of gradients would stay beside those of the new one.

        Raises:
            UnsupportedSetupError: See ``check_goes_on``.
        """
        if self.active is None:
            check_goes_on(self.saved, self.frozen_before, self.stages, stage)
        if (active := self.active) is not None:
            accelerator, self.active = self.runtime.accelerator, None
            accelerator._dataloaders = [known for known in accelerator._dataloaders if known is not active.loader]
        self.freezer.trained_from = min(
            self.freezer.trained_from, *(one.split_point for one in self.stages[: stage.index + 1])
        )
        changed, self.released_bytes = stage.split_point != self.frozen, self.freeze(stage.split_point, optimizer)
        self.freezer.hold()  # before the wrapper, and the record, look at what trains
        return self.runtime.unwrap(wrapped, self.data.example_batch) if changed else wrapped

    def enter(self, stage: Stage, model: nn.Module) -> nn.Module:
        """Wrap the model anew where it has no wrapper, and find or build the cache of a stage. Collective.

        Args:
            stage: The stage.
            model: What ``leave`` returned.

        Returns:
            The model in its wrapper for this stage. ``active`` is the stage.

        Raises:
            FreezeCacheError: See ``StageCache.open``.
        """
        if model is self.runtime.model and is_replicated(self.runtime.accelerator):
            model = wrap_again(self.runtime.accelerator, model)
        tokens, share = self.tokens.get(stage.split_point), self.freezer.trained_share
        token_keep = 1.0 if tokens is None else tokens.token_keep
        self.sampler.share, rows_share = self.cache.chooser.rows_shares(stage.split_point)
        decision = Decision(
            stage=stage.index,
            start_epoch=stage.start_epoch,
            split_point=stage.split_point,
            trainable_parameters=sum(p.numel() for p in self.runtime.model.parameters() if p.requires_grad),
            released_optimizer_bytes=self.released_bytes,
            lr_scale=self.rates.scale_at(stage.split_point, self.splits.num_blocks),
            predicted=predict_passes(
                stage, self.stages, self.num_epochs, self.splits.num_blocks, self.config, token_keep, share, rows_share
            ),
            token_keep=token_keep,
            trained_share=share,
            rows_share=rows_share,
        )
        self.sampler.num_views = self.config.num_views if stage.split_point > 0 else 0
        split, whole, opened = self.splits.at(stage.split_point), self.splits.at(stage.tokens_point), None
        step: Step | None
        outlook = Outlook(stage, self.config, decision.predicted, self.refusals.get(stage.split_point))
        # Without a cache nothing would augment hidden states: what is trained must not depend on how long it takes.
        if why_live(outlook) is None and self.config.mode == "auto" and self.augmenter is None:
            outlook = replace(outlook, costs=predict_costs(self, stage, token_keep))
            decision.predicted |= outlook.costs
        reason = why_live(outlook)
        decision.reason = reason or f"mode={self.config.mode!r} trains a stage with frozen blocks from a cache."
        if reason is None:
            opened = open_for(self, stage, decision)
        if opened is None:
            logger.info("Training without a cache from epoch %d on: %s", stage.start_epoch, decision.reason)
            self.watch = self.frozen_weights = None
            loader, step = live_batches(self.runtime, self.data, self.sampler, whole, tokens)
        else:
            describe_cache(decision, opened)
            self.watch = TransformWatch(self.data, self.config)
            self.frozen_weights = FrozenWeights(split, self.runtime, self.data)
            loader, step = cached_batches(
                self.runtime, self.config, self.sampler, split, opened.reader, self.augmenter, tokens
            )
            step = self.freezer.offloading(step, self.runtime, self.config.offload_prefix)
        if self.adaptive is not None:
            decision.reason = f"{self.adaptive.reasons[stage.index]} {decision.reason}".strip()
        self.active = ActiveStage(stage, split, loader, step, decision)
        # Before the record adds what a run that was interrupted in this stage had built.
        self.stage_logs = decision_logs(decision)
        self.record.keep_decision(decision)
        return model

    def built_ahead(self, stage: Stage) -> list[int]:
        """Return the split points of later stages whose caches are built together with that of a stage, in rising order."""
        if self.config.consume_previous_cache or self.config.build_from == "images":
            return []
        return [point for point in thawed_to(stage, self.stages) if point not in self.refusals]

    # ---- Steps ----

    def training_step(
        self,
        training_step: Callable[..., Tensor],
        global_step: int,
        model: nn.Module,
        inputs: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Train on a batch of the stage: of images, or of hidden states through the suffix.

        Args:
            training_step: ``Trainer.training_step``.
            global_step: Optimizer steps done.
            model: The model, wrapped or not.
            inputs: The batch.
            args: As for ``training_step``, which returns the loss.
            kwargs: The same.

        Raises:
            UnsupportedSetupError: See ``CachedStep``, ``LiveStep`` and ``watch_transform``.
        """
        with self._compiled.running(self.frozen or 0):
            if self.step is None:
                loss = training_step(model, inputs, *args, **kwargs)
            else:
                self.watch_transform()
                loss = self.step(training_step, global_step, model, inputs, *args, **kwargs)
        if self.adaptive is not None:
            self.adaptive.note_step(self.splits.blocks, self.runtime.accelerator)
        return loss

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate a batch, see ``EvaluationCache.predict``. Blocks that train run compiled there, too."""
        with self._compiled.running(self.frozen or 0):
            return self.evaluation.predict(*args, **kwargs)

    def watch_transform(self) -> None:
        """Warn, once in a stage, if a callback has changed the transform since the cache was opened.

        Raises:
            UnsupportedSetupError: Frozen blocks, or what the model does in front of them, have changed.
        """
        if self.frozen_weights is not None:
            self.frozen_weights.look(self.sampler.epoch)
        if self.watch is not None and self.runtime.everyone.is_main_process:
            self.watch.look(self.sampler.epoch)

    def save(self, folder: Path) -> None:
        """Write into a checkpoint what a resumed run needs of its stages.

        Args:
            folder: The folder of the checkpoint, which is made if need be.

        Raises:
            OSError: It cannot be written.
        """
        adaptive = {} if self.adaptive is None else self.adaptive.save(folder)
        found = (progress_to_dict(self.record), adaptive, self.chosen, self.freezer.block_weights)
        save_stage(folder, SavedStage(self.current.stage, self.runtime.args.world_size, *found))

    def cost_logs(self, state: Any) -> dict[str, float]:
        """Record what training has cost since this was called last, and return what to log of it.

        It is called at the end of an epoch, and before a checkpoint is saved.

        Args:
            state: ``TrainerState``.
        """
        measured = None if self.stopwatch is None else self.stopwatch.take(state.global_step)
        if measured is None:
            return {}
        return epoch_logs(self.record, measured, float(state.epoch or 0.0), self.current.stage.index)

    def end(self) -> None:
        """End training: nothing is frozen any more, and chunks of a cache do not stay in memory."""
        self.freezer.thaw()
        if self.active is not None and isinstance(cached := self.active.loader.dataset, CachedDataset):
            cached.forget_chunks()
