"""What stands in for the things that a suffix must not read: the images, and what came before the split.

A suffix needs their shapes, for masks and position codes. Their values are not there in a cached step. NaN stands for
them inside the model, where arithmetic on what is not used is harmless. Whoever reads them outside of the model, in
``compute_loss`` say, meets a ``Withheld`` tensor, which raises and says so.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import UnsupportedModelError, UnsupportedSetupError

__all__ = [
    "METADATA",
    "TensorShape",
    "Withheld",
    "blank_images",
    "first_tensor",
    "outer_parameters",
    "shapes_of",
    "with_first_tensor",
]

ImageShape = tuple[int, ...]

_ATTRIBUTES = (
    "shape dtype device ndim layout is_cuda is_cpu is_mps is_xpu is_meta is_sparse is_nested is_quantized is_mkldnn is_leaf "
    "requires_grad grad_fn"
)
_QUESTIONS = (
    "size dim ndimension numel nelement __len__ stride is_floating_point is_complex is_contiguous is_pinned element_size "
    "get_device data_ptr storage_offset new_zeros new_ones new_empty new_full"
)
_FUNCTIONS = "is_floating_point is_complex numel zeros_like ones_like empty_like full_like rand_like randn_like"
#: What tells shape and place of a tensor, and none of its values.
METADATA = {
    *(getattr(Tensor, name).__get__ for name in _ATTRIBUTES.split()),
    *(getattr(Tensor, name) for name in _QUESTIONS.split()),
    *(getattr(torch, name) for name in _FUNCTIONS.split()),
}
#: Copies to elsewhere are withheld too.
_COPYING = "to cpu cuda type float half bfloat16 contiguous clone detach pin_memory requires_grad_"
_COPIES = {getattr(Tensor, name) for name in _COPYING.split()}


class Withheld(Tensor):
    """A tensor whose shape, dtype and device are known and whose values are not there.

    Attributes:
        what: What it stands for, for the message.
        why: Why it is not there.
    """

    what: str
    why: str

    @classmethod
    def of(cls, tensor: Tensor, what: str, why: str) -> Withheld:
        """Return a stand-in of the shape, dtype and device of ``tensor``."""
        stand_in = tensor.detach().as_subclass(cls)
        stand_in.what, stand_in.why = what, why
        return stand_in

    def plain(self) -> Tensor:
        """Return the ordinary tensor behind it, which holds NaN."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer questions about shape and place.

        Raises:
            UnsupportedSetupError: Anything else reads values that are not there.
        """
        if func in METADATA or func in _COPIES:
            with torch._C.DisableTorchFunctionSubclass():
                answer = func(*args, **(kwargs or {}))
            if func in _COPIES and isinstance(answer, Tensor):
                return cls.of(answer, args[0].what, args[0].why)
            return answer.as_subclass(Tensor) if isinstance(answer, Tensor) else answer
        read = next(x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, cls))
        raise UnsupportedSetupError(
            f"{read.what} is read ({getattr(func, '__name__', func)}) while training from a cache, where it does not exist: "
            f"{read.why}"
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Return name and shape."""
        return f"Withheld({self.what}, {tuple(self.shape)})"


def outer_parameters(model: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    """Return the first and the last float parameter of a model: images have the dtype of one, and go to the device of the other."""
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    return parameters[0], parameters[-1]


def blank_images(
    outer: tuple[nn.Parameter, nn.Parameter], batch_size: int, image_shape: ImageShape, value: float = 0.0
) -> Tensor:
    """Return constant pixel values (batch_size, *image_shape) that take no memory: all strides are 0.

    Args:
        outer: Of the model, see ``outer_parameters``. The first may be elsewhere than the device: it may be frozen.
        batch_size: Number of images.
        image_shape: (channels, height, width).
        value: The value of all pixels.
    """
    first, last = outer
    return torch.full((1,), value, dtype=first.dtype, device=last.device).expand(batch_size, *image_shape)


def first_tensor(output: Any) -> Tensor:
    """Return the first tensor of a module's output: itself, or the first in a tuple, list, dict or ``ModelOutput``.

    Raises:
        UnsupportedModelError: There is none.
    """
    found = next((leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)), None)
    if found is None:
        raise UnsupportedModelError(f"An output of type {type(output).__name__} holds no tensor; expected one.")
    return found


def with_first_tensor(output: Any, tensor: Tensor) -> Any:
    """Return ``output`` with its first tensor replaced by ``tensor``."""
    leaves, structure = pytree.tree_flatten(output)
    position = next(i for i, leaf in enumerate(leaves) if isinstance(leaf, (Tensor, TensorShape)))
    leaves[position] = tensor
    return pytree.tree_unflatten(leaves, structure)


class TensorShape:
    """The shape of a tensor in a trace of ``rows`` samples, and whether it is that of hidden states.

    Args:
        tensor: The tensor.
        rows: Samples that were traced.
        hidden_shape: Shape of hidden states in the trace.
    """

    def __init__(self, tensor: Tensor, rows: int, hidden_shape: torch.Size) -> None:
        self.shape, self.dtype = tuple(tensor.shape), tensor.dtype
        self.is_hidden = tensor.shape == hidden_shape
        self.by_sample = tensor.dim() > 0 and tensor.shape[0] == rows

    @classmethod
    def of_hidden(cls, shape: torch.Size, dtype: torch.dtype) -> TensorShape:
        """Return the shape of the hidden states that enter the first block."""
        return cls(torch.empty(shape, dtype=dtype, device="meta"), shape[0], shape)

    def filled(self, hidden_states: Tensor, same_shape: bool, value: float) -> Tensor:
        """Return one value, or 0 for whole numbers, in this shape for the batch of ``hidden_states``; it takes no memory.

        Args:
            hidden_states: Hidden states at the split, perhaps of images of another size than those of the trace.
            same_shape: Whether hidden states at the split have the shape of those that enter the first block.
            value: The value.
        """
        floating = self.dtype.is_floating_point
        one = torch.full(
            (1,),
            value if floating else 0,
            dtype=hidden_states.dtype if floating else self.dtype,
            device=hidden_states.device,
        )
        if self.is_hidden and same_shape:
            return one.expand(hidden_states.shape)
        return one.expand((len(hidden_states), *self.shape[1:]) if self.by_sample else self.shape)


def shapes_of(output: Any, rows: int, hidden_shape: torch.Size) -> Any:
    """Return a module's output with each tensor replaced by its ``TensorShape``: a graph would hold memory."""
    return pytree.tree_map_only(Tensor, lambda tensor: TensorShape(tensor, rows, hidden_shape), output)
