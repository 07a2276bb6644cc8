"""Names of the arrays that stand for hidden states between the disk and the training device.

``Codec.entropy_decode`` gives several arrays and ``Codec.dequantize`` takes them. Between the two they are entries of a
flat dict, beside the labels of a batch. Only this module knows how their names are spelled:

==============================  =======================================================================================
``packed.<view>.values``        What the last array step gave, (samples, ...).
``packed.<view>.high``          High bytes of these at the first positions, int8, if any does not fit into a byte.
``packed.<view>.<step>.<name>`` What the array step at position ``<step>`` put beside it, (samples, ...).
``packed.geometry``             Where base view and view lie in their image, (samples, 2, 5) float32.
``packed.is_copy``              Whether the sample is a view beyond the first, (samples,) bool.
``packed.kept``                 Positions of the tokens that a training step sees, (samples, kept) int64.
==============================  =======================================================================================

``<view>`` is ``base`` for arrays of the codec of base views, and ``copy`` for arrays of the codec of further views.

Fitted tensors have names too, in the file that holds them: ``<group>.<name>``, where the group of a codec's tensors is the
position of the step. ``join_groups`` makes these names and ``split_groups`` takes them apart.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

__all__ = [
    "BASE",
    "COPY",
    "GEOMETRY",
    "IS_COPY",
    "KEPT",
    "high_bytes",
    "is_packed",
    "join_groups",
    "main_array",
    "side_array",
    "side_arrays",
    "split_groups",
]

_PACKED = "packed."
#: Values of ``<view>``.
BASE, COPY = "base", "copy"
#: Names of the arrays that no codec gives.
GEOMETRY, IS_COPY, KEPT = f"{_PACKED}geometry", f"{_PACKED}is_copy", f"{_PACKED}kept"


def is_packed(name: str) -> bool:
    """Say whether an entry of a batch is one of these arrays."""
    return name.startswith(_PACKED)


def main_array(view: str) -> str:
    """Return the name of the array that the last array step gave."""
    return f"{_PACKED}{view}.values"


def high_bytes(view: str) -> str:
    """Return the name of the high bytes of the main array, see ``base.join_bytes``."""
    return f"{_PACKED}{view}.high"


def side_array(view: str, step: int, name: str) -> str:
    """Return the name of an array that the step at position ``step`` put beside the main one as ``name``."""
    return f"{_PACKED}{view}.{step}.{name}"


def side_arrays(arrays: Mapping[str, Tensor], view: str, step: int) -> dict[str, Tensor]:
    """Return the arrays that a step put beside the main one, under the names that the step gave them."""
    prefix = side_array(view, step, "")
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def join_groups(groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors of all groups under ``<group>.<name>``."""
    return {f"{group}.{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}


def split_groups(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Undo ``join_groups``.

    Raises:
        ValueError: A name has no group.
    """
    groups: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        group, dot, name = full_name.partition(".")
        if not dot:
            raise ValueError(f"the tensor {full_name!r} has no group; expected a name such as '0.basis'")
        groups.setdefault(group, {})[name] = tensor
    return groups
