"""Transform coding: decorrelate across channels and across the token grid, then round to one uniform step."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import (
    FLOATS,
    INTEGERS,
    ArraySpec,
    ArrayStep,
    largest_value,
)
from .cast import check_finite

__all__ = ["Transform", "dct_matrix", "digest", "frequency_order"]

#: Quanta of the stored mean per step. The mean is known to both sides, so this costs no error, only residual variance:
#: a quarter of a step leaves at most (1/8)**2 of a step squared.
_MEAN_QUANTA = 4
#: Smallest eigenvalue kept of the gradients' second moment, relative to the largest: bounds how unequal the weights are.
_LEAST_WEIGHT = 1e-4
#: Tokens up to which the DCT is undone by one matrix of all frequencies: more arithmetic than rows and columns apart, but in
#: one product, which for 196 tokens takes half the time (measured on a CPU in bf16).
_DENSE_TOKENS = 1024
#: Step of ``codec="transform"`` when nobody asks for a rate or a distortion, in root-mean-square values of the centred states.
DEFAULT_RELATIVE_STEP = 0.5
_LARGEST = 32767
#: Samples whose largest value is within this many steps are not decoded again to check the bound: some 400 products of that
#: size summed in fp32 are wrong by at most 128 * 400 * 6e-8 = 0.003 steps.
_ORDINARY = 128


def dct_matrix(size: int) -> Tensor:
    """Return the orthonormal DCT-II, (size, size) float64; row ``u`` is the ``u``-th cosine.

    Source: Ahmed, Natarajan and Rao, "Discrete Cosine Transform", 1974; with the usual orthonormal scaling.
    """
    position = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi * (2 * position[None] + 1) * position[:, None] / (2 * size)) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


def frequency_order(height: int, width: int) -> Tensor:
    """Return the positions of a (height, width) grid of frequencies from low to high, (height * width,) int64."""
    rows = torch.arange(height, dtype=torch.float64)[:, None] / height
    columns = torch.arange(width, dtype=torch.float64)[None] / width
    return torch.argsort((rows.square() + columns.square()).flatten(), stable=True)


@dataclass(frozen=True)
class Transform(ArrayStep):
    """Mean per token position removed, basis across channels, DCT over the token grid, one step; prefix tokens in fp16.

    With patch tokens ``x`` (tokens, hidden), mean ``m``, basis ``B`` (hidden, hidden) and orthonormal 2-D DCT ``C``, the
    stored integers are ``round(C (x - m) B^-T / step)``. ``B`` is ``W^-1 V``: ``W`` weighs directions, and the columns of
    ``V`` are the principal axes of ``W (x - m)``. Unweighted, ``B`` is orthonormal up to the rounding of its storage
    (8 bits; the encoder inverts what is stored), so the error of the coefficients is the error of the states.

    A token whose coefficients might outgrow 16 bits is stored as it is, and so is a prefix token beyond fp16: nothing is
    clipped.

    Attributes:
        step: Step in the units of the (weighted) states. ``None`` until fitted: half the root-mean-square of the centred
            states.
        gradient_weight: ``W`` is the second moment of the loss gradients to the power of half this number, scaled to a
            mean eigenvalue of 1. 0: all directions alike. 0.5: the square root of the second moment is the metric.
        prefix_tokens: Leading tokens that are no patches. Set by ``fit``.
        grid: (height, width) of the patches; (1, tokens) if they form no known grid, then there is no DCT. Set by ``fit``.
        state: SHA-256 of the fitted tensors. Set by ``fit``.
        basis: (hidden, hidden) int8, columns in units of ``scale``. Set by ``fit``.
        scale: (hidden,) float32. Set by ``fit``.
        mean: (tokens, hidden) int32: mean in the transform domain, in units of ``step / 4``. Set by ``fit``.
    """

    name: ClassVar[str] = "transform"
    takes: ClassVar[frozenset[str]] = frozenset({FLOATS})
    gives: ClassVar[str] = INTEGERS
    step: float | None = None
    gradient_weight: float = 0.0
    prefix_tokens: int = 0
    grid: tuple[int, int] | None = None
    state: str = ""
    basis: Tensor | None = field(default=None, repr=False, compare=False, metadata={"stored": False})
    scale: Tensor | None = field(default=None, repr=False, compare=False, metadata={"stored": False})
    mean: Tensor | None = field(default=None, repr=False, compare=False, metadata={"stored": False})

    def __post_init__(self) -> None:
        """Check the configuration.

        Raises:
            ValueError: A value is out of range, or the tensors are not those of ``state``.
        """
        if self.step is not None and not (
            isinstance(self.step, (int, float)) and math.isfinite(self.step) and self.step > 0
        ):
            raise ValueError(f"step must be a positive number, got {self.step!r}")
        if not (isinstance(self.gradient_weight, (int, float)) and 0 <= self.gradient_weight <= 1):
            raise ValueError(f"gradient_weight must be a number from 0 to 1, got {self.gradient_weight!r}")
        if type(self.prefix_tokens) is not int or self.prefix_tokens < 0:
            raise ValueError(f"prefix_tokens must be a whole number, got {self.prefix_tokens!r}")
        if self.grid is not None:
            grid = tuple(self.grid)
            if len(grid) != 2 or not all(type(side) is int and side > 0 for side in grid):
                raise ValueError(f"grid must be two positive whole numbers, got {self.grid!r}")
            object.__setattr__(self, "grid", grid)
        tensors = {name: getattr(self, name) for name in ("basis", "scale", "mean") if getattr(self, name) is not None}
        if tensors and (self.grid is None or digest(tensors) != self.state):
            raise ValueError("the fitted tensors are not those that the configuration names")

    def configuration(self) -> dict[str, Any]:
        """See base class."""
        stored = super().configuration()
        return {**stored, "grid": None if self.grid is None else list(self.grid)}

    def tensors(self) -> dict[str, Tensor]:
        """Return ``basis``, ``scale`` and ``mean``, or nothing before ``fit``."""
        if self.basis is None or self.scale is None or self.mean is None:
            return {}
        return {"basis": self.basis, "scale": self.scale, "mean": self.mean}

    # ---- Fitting ----

    def fit(
        self,
        sample: Tensor,
        prefix_tokens: int = 0,
        grid: tuple[int, int] | None = None,
        gradients: Tensor | None = None,
        rotate: bool = True,
    ) -> Transform:
        """Fit mean and basis, and the step if there is none.

        A sample smaller than the hidden size, and constant channels, are fine: directions without variance get a basis
        vector like all others.

        Args:
            sample: (samples, tokens, hidden), float, on the CPU.
            prefix_tokens: Leading tokens that are no patches.
            grid: (height, width) of the patches, if they form a grid.
            gradients: Of the loss, like ``sample``; needed if ``gradient_weight`` is not 0.
            rotate: Whether components are principal axes, or the channels themselves.

        Returns:
            The fitted step.

        Raises:
            ValueError: Fewer than two samples, NaN or infinite values, a grid that does not fit, or no gradients.
        """
        if sample.dim() != 3 or len(sample) < 2:
            raise ValueError(
                f"a basis is fitted on at least 2 samples of (tokens, hidden), got a sample of shape {tuple(sample.shape)}"
            )
        tokens, hidden = sample.shape[1] - prefix_tokens, sample.shape[2]
        grid = grid or (1, tokens)
        if tokens < 1 or math.prod(grid) != tokens:
            raise ValueError(
                f"{sample.shape[1]} tokens with {prefix_tokens} prefix tokens do not form a grid of {grid[0]} x {grid[1]}"
            )
        check_finite(sample)
        patches = sample[:, prefix_tokens:].double()
        mean = patches.mean(0)
        centred = (patches - mean).reshape(-1, hidden)
        covariance = centred.T @ centred / len(centred)
        weights = torch.eye(hidden, dtype=torch.float64)
        if self.gradient_weight:
            if gradients is None:
                raise ValueError(f"gradient_weight={self.gradient_weight} needs gradients")
            check_finite(gradients)
            weights = _weights(gradients[:, prefix_tokens:].double().reshape(-1, hidden), self.gradient_weight)
        basis = torch.eye(hidden, dtype=torch.float64)
        if rotate:
            _, axes = torch.linalg.eigh(weights @ covariance @ weights)
            basis = torch.linalg.solve(weights, axes.flip(1))
        # Eigenvectors have no sign; one of them makes the fit repeatable.
        basis = basis * torch.sign(basis.gather(0, basis.abs().argmax(0, keepdim=True)))
        scale = (basis.abs().amax(0) / 127).float()
        stored = torch.round(basis / scale).to(torch.int8).contiguous()
        step = self.step
        if step is None:
            spread = float(((centred @ weights) ** 2).mean().sqrt())
            step = DEFAULT_RELATIVE_STEP * (spread or float(mean.abs().max()) or 1.0)
        blank = torch.zeros(0, dtype=torch.int32)
        fitted = dataclasses.replace(
            self,
            step=step,
            prefix_tokens=prefix_tokens,
            grid=grid,
            basis=stored,
            scale=scale,
            mean=blank,
            state=digest({"basis": stored, "scale": scale, "mean": blank}),
        )
        return fitted._with_mean(mean)

    def with_step(self, step: float) -> Transform:
        """Return the same fit with another step.

        Raises:
            ValueError: Not a positive number, or not fitted.
        """
        self._check_fitted()
        mean = self._mean_tokens(torch.float64, torch.device("cpu"))
        return dataclasses.replace(self, step=step)._with_mean(mean)

    def _with_mean(self, mean: Tensor) -> Transform:
        assert self.step is not None
        quanta = torch.round(self._forward(mean[None])[0] * (_MEAN_QUANTA / self.step))
        if float(quanta.abs().max()) > 2**31 - 1:
            raise ValueError(
                f"a step of {self.step:.3g} is too fine for states whose mean reaches {float(mean.abs().max()):.3g}"
            )
        tensors = {**self.tensors(), "mean": quanta.T.contiguous().to(torch.int32)}
        return dataclasses.replace(self, mean=tensors["mean"], state=digest(tensors))

    # ---- The two maps, in float64 or in the dtype of training ----

    def _check_fitted(self) -> None:
        if self.basis is None or self.grid is None:
            raise ValueError("codec 'transform' has not been fitted: use fit(), or codec='auto'")

    def _basis(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        assert self.basis is not None
        assert self.scale is not None
        return self.basis.to(device, dtype) * self.scale.to(device, dtype)

    @functools.cached_property
    def _inverse(self) -> Tensor:
        return torch.linalg.inv(self._basis(torch.float64, torch.device("cpu")))

    def _grids(self) -> tuple[int, int]:
        assert self.grid is not None
        return self.grid

    def _forward(self, centred: Tensor) -> Tensor:
        """(samples, tokens, hidden) -> coefficients (samples, hidden, tokens) from low to high frequency."""
        return self._spectrum(self._inverse.to(centred.dtype) @ centred.transpose(1, 2))

    def _spectrum(self, components: Tensor) -> Tensor:
        """Components (samples, hidden, tokens) -> coefficients, from low to high frequency."""
        height, width = self._grids()
        if height == 1:
            return components
        grid = components.reshape(*components.shape[:2], height, width)
        rows, columns = dct_matrix(height).to(components.dtype), dct_matrix(width).to(components.dtype)
        return (rows @ grid @ columns.T).flatten(2)[:, :, frequency_order(height, width)]

    def _waves(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        """Return what undoes the DCT: nothing without a grid, else one matrix, else rows, columns and inverse order."""
        height, width = self._grids()
        if height == 1:
            return ()
        order = frequency_order(height, width)
        rows, columns = dct_matrix(height), dct_matrix(width)
        if height * width <= _DENSE_TOKENS:
            return (torch.kron(rows, columns)[order].to(device, dtype),)
        return rows.to(device, dtype), columns.to(device, dtype), torch.argsort(order).to(device)

    def _constants(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        """Return mean of the tokens, basis times step, and waves."""
        key = (dtype, device)
        if key not in self._cached_constants:
            assert self.step is not None
            # Products in full precision, then rounded once.
            exact = torch.float64 if device.type == "cpu" else torch.float32
            self._cached_constants[key] = (
                self._mean_tokens(exact, device).to(dtype),
                (self._basis(exact, device) * self.step).to(dtype),
                *self._waves(dtype, device),
            )
        return self._cached_constants[key]

    @functools.cached_property
    def _cached_constants(self) -> dict[Any, tuple[Tensor, ...]]:
        return {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave derived tensors behind when copied into a worker process."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_cached_constants", "_inverse")}

    def _backward(self, coefficients: Tensor, basis: Tensor, *waves: Tensor) -> Tensor:
        """Coefficients (samples, hidden, tokens) -> (samples, tokens, hidden), in the dtype of the basis."""
        if len(waves) == 1:
            coefficients = coefficients.to(basis.dtype) @ waves[0]
        elif waves:
            rows, columns, order = waves
            ordered = coefficients.index_select(2, order).to(basis.dtype)
            grid = ordered.reshape(*ordered.shape[:2], *self._grids())
            coefficients = (rows.T @ (grid @ columns)).flatten(2)
        return coefficients.to(basis.dtype).transpose(1, 2) @ basis.T

    def _mean_tokens(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """(tokens, hidden)."""
        assert self.mean is not None
        assert self.step is not None
        wide = torch.promote_types(dtype, torch.float32)
        coefficients = self.mean.to(device, wide).T[None] * (self.step / _MEAN_QUANTA)
        return self._backward(coefficients, self._basis(wide, device), *self._waves(wide, device))[0].to(dtype)

    # ---- The codec ----

    def encoded_specs(self, spec: ArraySpec) -> dict[str, ArraySpec]:
        """See base class.

        ``values`` (samples, hidden, patches) int16; ``prefix`` (samples, prefix tokens, hidden) fp16; ``exact_index``
        (tokens stored as they are, 1) int32, and ``exact`` (the same, hidden) in the dtype of the states.
        """
        self._check_fitted()
        assert self.basis is not None
        assert self.grid is not None
        if len(spec.shape) != 3:
            raise ValueError(f"transform takes (samples, tokens, hidden), got {spec.shape}")
        samples, tokens, hidden = spec.shape
        expected = (self.prefix_tokens + math.prod(self.grid), len(self.basis))
        if (tokens, hidden) != expected:
            raise ValueError(f"transform was fitted for (tokens, hidden) = {expected}, got {(tokens, hidden)}")
        return {
            "values": ArraySpec((samples, hidden, tokens - self.prefix_tokens), torch.int16),
            "prefix": ArraySpec((samples, self.prefix_tokens, hidden), torch.float16),
            "exact_index": ArraySpec((samples * tokens, 1), torch.int32, ragged=True),
            "exact": ArraySpec((samples * tokens, hidden), spec.dtype, ragged=True),
        }

    def check(self, tokens: int, hidden: int) -> None:
        """See base class."""
        self._check_fitted()
        height, width = self._grids()
        patches = height * width
        # Matrices of the DCT take the square of a side: no more than the states themselves, some times over.
        if self.prefix_tokens + patches != tokens or (height > 1 and max(height, width) ** 2 > 4 * patches * hidden):
            raise ValueError(
                f"{self.prefix_tokens} prefix tokens and a grid of {height} x {width} make no {tokens} tokens"
            )
        shapes = {
            "basis": ((hidden, hidden), torch.int8),
            "scale": ((hidden,), torch.float32),
            "mean": ((patches, hidden), torch.int32),
        }
        tensors = self.tensors()
        for name, (shape, dtype) in shapes.items():
            tensor = tensors.get(name)
            if tensor is None or tuple(tensor.shape) != shape or tensor.dtype != dtype:
                found = None if tensor is None else (tuple(tensor.shape), tensor.dtype)
                raise ValueError(f"the transform's {name} is {found}, expected {(shape, dtype)}")
        # Not finite, or so large that fp32 arithmetic would overflow on the largest integers.
        if not self._peak(_LARGEST + 1, hidden) < torch.finfo(torch.float32).max:
            raise ValueError("the transform's scale, step or mean is not finite, or far too large")

    @functools.cached_property
    def _lengths(self) -> tuple[float, float]:
        """Return the longest row of the basis times the step, and the largest absolute value of the mean."""
        assert self.step is not None
        basis = self._basis(torch.float64, torch.device("cpu"))
        mean = self._mean_tokens(torch.float64, torch.device("cpu"))
        return float(basis.square().sum(1).sqrt().max()) * self.step, largest_value(mean)

    def _peak(self, largest: float, hidden: int) -> float:
        # By Cauchy and Schwarz: the DCT keeps the length of a sample's coefficients.
        longest, mean = self._lengths
        return 1.01 * (longest * largest * math.sqrt(math.prod(self._grids()) * hidden) + mean)

    def abs_bound(self, arrays: Mapping[str, Tensor], largest: float) -> float:
        """See base class."""
        bounds = [self._peak(largest, arrays["prefix"].shape[2]), largest_value(arrays["prefix"])]
        if "exact" in arrays:
            bounds.append(largest_value(arrays["exact"]))
        return math.nan if any(math.isnan(bound) for bound in bounds) else max(bounds)

    def encode(self, array: Tensor) -> dict[str, Tensor]:
        """See base class."""
        self.encoded_specs(ArraySpec(tuple(array.shape), array.dtype))
        check_finite(array)
        assert self.step is not None
        wide = torch.float64 if array.dtype == torch.float64 else torch.float32
        mean, *maps = self._constants(wide, torch.device("cpu"))
        prefix = array[:, : self.prefix_tokens].to(torch.float16)
        centred = array[:, self.prefix_tokens :].to(wide) - mean
        components = self._inverse.to(wide) @ centred.transpose(1, 2)
        # A coefficient of a grid of n tokens is at most sqrt(n) times the largest value of its component.
        limit = self.step * _LARGEST / math.sqrt(centred.shape[1]) / 1.01
        fits = components.abs().amax(1) < limit if array.numel() else torch.ones(centred.shape[:2], dtype=torch.bool)
        exact = torch.zeros(array.shape[:2], dtype=torch.bool)
        exact[:, : self.prefix_tokens] = ~torch.isfinite(prefix).all(2)
        exact[:, self.prefix_tokens :] = ~fits
        prefix = prefix.masked_fill(exact[:, : self.prefix_tokens, None], 0)
        values = torch.round(self._spectrum(components.masked_fill(~fits[:, None], 0)) / self.step).to(torch.int16)
        # What arithmetic lost of extreme inputs (1e30 beside 1) must not break the bound, nor values round to infinity. In
        # ordinary samples it stays below the hundredth of the bound that is kept for it.
        peak = torch.finfo(array.dtype).max / 4
        extreme = array.flatten(1).abs().amax(1) if array.numel() else array.new_zeros(len(array))
        reach = extreme.to(wide).clamp_min(float(mean.abs().max()))
        check = ((reach > _ORDINARY * self.step) | (extreme > peak)).nonzero()[:, 0]
        if len(check):
            given, skip = array[check, self.prefix_tokens :], exact[check, self.prefix_tokens :]
            decoded = (self._backward(values[check], *maps) + mean).to(array.dtype).to(wide)
            skip = skip | ~torch.isfinite(decoded).all(2)
            error = (decoded - given.to(wide)).masked_fill(skip[..., None], 0)
            excess = ~(error.double().square().mean((1, 2)).sqrt() <= self.error_bound(array[check]))
            exact[check, self.prefix_tokens :] = skip | excess[:, None]
        index = exact.flatten().nonzero()
        return {
            "values": values,
            "prefix": prefix,
            "exact_index": index.to(torch.int32),
            "exact": array.reshape(-1, array.shape[-1])[index[:, 0]],
        }

    def collatable(self, arrays: dict[str, Tensor], spec: ArraySpec) -> dict[str, Tensor]:
        """See base class. Where no token of the chunk is stored as it is, those two arrays are left out."""
        index, exact = arrays["exact_index"][:, 0].long(), arrays["exact"]
        samples, tokens, hidden = spec.shape
        if len(index) != len(exact) or (len(index) and not (index.min() >= 0 and index.max() < samples * tokens)):
            raise ValueError(f"{len(index)} places of tokens stored as they are, {len(exact)} tokens")
        collated = {"values": arrays["values"], "prefix": arrays["prefix"]}
        if len(index):
            states = torch.zeros(samples * tokens, hidden, dtype=spec.dtype)
            mask = torch.zeros(samples * tokens, dtype=torch.bool)
            states[index], mask[index] = exact, True
            collated["exact"] = states.reshape(samples, tokens, hidden)
            collated["is_exact"] = mask.reshape(samples, tokens)
        return collated

    def decode(self, arrays: Mapping[str, Tensor], dtype: torch.dtype, compute_dtype: torch.dtype | None) -> Tensor:
        """See base class."""
        values, prefix = arrays["values"], arrays["prefix"]
        wide = compute_dtype or (torch.float64 if dtype == torch.float64 else torch.float32)
        mean, *maps = self._constants(wide, values.device)
        patches = self._backward(values, *maps)
        states = patches.new_empty((len(values), self.prefix_tokens + len(mean), len(maps[0])), dtype=dtype)
        states[:, : self.prefix_tokens] = prefix
        states[:, self.prefix_tokens :] = patches + mean
        if "exact" in arrays:
            states = torch.where(arrays["is_exact"][..., None], arrays["exact"], states)
        return states

    @functools.cached_property
    def _gain(self) -> float:
        return float(torch.linalg.matrix_norm(self._basis(torch.float64, torch.device("cpu")), 2))

    def error_bound(self, array: Tensor) -> Tensor:
        """See base class: half a step times the largest singular value of the basis, plus 1% for arithmetic, and the rounding
        of the result.

        Coefficients are wrong by at most half a step; the DCT keeps root-mean-square values, and the basis stretches them
        by at most its largest singular value. fp16 rounds prefix tokens to 11 bits.
        """
        self._check_fitted()
        assert self.step is not None
        largest = array.flatten(1).abs().amax(1).double() if array.numel() else torch.zeros(len(array)).double()
        rounding = largest * (torch.finfo(array.dtype).eps + 2.0**-11) + 2.0**-25
        return self.step / 2 * self._gain * 1.01 + rounding


def _weights(gradients: Tensor, power: float) -> Tensor:
    """Return the symmetric (hidden, hidden) weights of directions."""
    moment = gradients.T @ gradients / len(gradients)
    values, axes = torch.linalg.eigh(moment)
    if float(values[-1]) <= 0:
        raise ValueError("all gradients are zero: they cannot weigh directions; use gradient_weight=0")
    values = values.clamp_min(float(values[-1]) * _LEAST_WEIGHT).pow(power / 2)
    return (axes * (values / values.mean())) @ axes.T


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of tensors with their names, dtypes and shapes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
