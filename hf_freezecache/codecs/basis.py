"""The basis across channels that transform coding fits to a sample."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .cast import check_finite

__all__ = ["Basis", "fit_basis"]

#: Smallest eigenvalue kept of the gradients' second moment, relative to the largest: bounds how unequal the weights are.
_LEAST_WEIGHT = 1e-4


@dataclass(frozen=True)
class Basis:
    """A fitted basis, in the 8 bits in which it is stored.

    Attributes:
        columns: (hidden, hidden) int8, columns in units of ``scale``.
        scale: (hidden,) float32.
        mean: (tokens, hidden) float64, mean of the patches at each position.
        spread: Root-mean-square of the centred patches, weighted.
    """

    columns: Tensor
    scale: Tensor
    mean: Tensor
    spread: float


def fit_basis(patches: Tensor, gradients: Tensor | None, gradient_weight: float, rotate: bool) -> Basis:
    """Fit a basis ``W^-1 V``; see ``Transform`` for ``W`` and ``V``.

    Args:
        patches: (samples, tokens, hidden), float, finite.
        gradients: Gradients of the loss, like ``patches``; needed if ``gradient_weight`` is not 0.
        gradient_weight: Power of the gradients' second moment in ``W``, times two.
        rotate: Whether ``V`` holds principal axes, or is the identity with ``W`` left out.

    Raises:
        ValueError: Gradients are missing, NaN or infinite, or all zero.
    """
    patches = patches.double()
    hidden = patches.shape[2]
    mean = patches.mean(0)
    centred = (patches - mean).reshape(-1, hidden)
    covariance = centred.T @ centred / len(centred)
    weights = torch.eye(hidden, dtype=torch.float64)
    if gradient_weight:
        if gradients is None:
            raise ValueError(f"gradient_weight={gradient_weight} needs gradients")
        check_finite(gradients)
        weights = _weights(gradients.double().reshape(-1, hidden), gradient_weight)
    basis = torch.eye(hidden, dtype=torch.float64)
    if rotate:
        _, axes = torch.linalg.eigh(weights @ covariance @ weights)
        basis = torch.linalg.solve(weights, axes.flip(1))
    # Eigenvectors have no sign; one of them makes the fit repeatable.
    basis = basis * torch.sign(basis.gather(0, basis.abs().argmax(0, keepdim=True)))
    scale = (basis.abs().amax(0) / 127).float()
    columns = torch.round(basis / scale).to(torch.int8).contiguous()
    return Basis(columns, scale, mean, float(((centred @ weights) ** 2).mean().sqrt()))


def _weights(gradients: Tensor, power: float) -> Tensor:
    """Return the symmetric weights of directions, (hidden, hidden) float64, of gradients (tokens, hidden) float64."""
    moment = gradients.T @ gradients / len(gradients)
    values, axes = torch.linalg.eigh(moment)
    if float(values[-1]) <= 0:
        raise ValueError("all gradients are zero: they cannot weigh directions; use gradient_weight=0")
    values = values.clamp_min(float(values[-1]) * _LEAST_WEIGHT).pow(power / 2)
    return (axes * (values / values.mean())) @ axes.T
