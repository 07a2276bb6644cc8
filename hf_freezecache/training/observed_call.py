"""Finds out what a trainer's loss calls its model with."""

from __future__ import annotations

import inspect
import logging
from typing import Any

from torch import Tensor, nn

from ..model.probe import first_row

__all__ = ["observed_call"]

logger = logging.getLogger(__name__)


class _Observed(Exception):
    """Ends a computation of the loss once the model is called."""


def observed_call(
    trainer: Any, model: nn.Module, batch: dict[str, Tensor], label_names: tuple[str, ...]
) -> tuple[dict[str, Any], frozenset[str]]:
    """Return the arguments that a trainer's ``compute_loss`` calls its model with, for the first row of a batch.

    Args:
        trainer: A copy of the trainer, see ``rehearsal_copy.rehearsing``.
        model: The model, not wrapped.
        batch: A collated batch: name -> (rows, ...).
        label_names: Names under which the model takes labels.

    Returns:
        The arguments by name, without what is ``None``, and the names of those that come from the batch, beside
        ``pixel_values``. Where the model is not called as a whole, they are the entries of the batch that its forward names.
    """
    calls: list[dict[str, Any]] = []
    parameters = inspect.signature(model.forward).parameters

    def observe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append({**dict(zip(parameters, args, strict=False)), **kwargs})
        raise _Observed

    prepared = trainer._prepare_inputs(dict(batch))
    handle = model.register_forward_pre_hook(observe, with_kwargs=True)
    try:
        trainer.compute_loss(model, dict(prepared))
    except Exception as error:  # what is wrong with the loss, rehearsing the step will tell
        if not isinstance(error, _Observed):
            logger.debug("compute_loss ended with %r before the model was called.", error)
    finally:
        handle.remove()
    not_inputs = {"pixel_values", "labels", *label_names}
    # Other images than those of the batch tell nothing of it; rehearsing the step will find them.
    if calls and calls[0].get("pixel_values") is prepared["pixel_values"]:
        given = {name: value for name, value in calls[0].items() if value is not None}
    else:
        given = {name: value for name, value in prepared.items() if name in {"pixel_values", *parameters}}
    call = first_row(given)
    return call, frozenset(call.keys() & prepared.keys() - not_inputs)
