"""Transform coding: decorrelates across channels and across the token grid, then rounds to one uniform step size."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from typing_extensions import override

from ..model.tokens import take_tokens
from .base import FLOATS, INTEGERS, ArraySpec, ArrayStep, check_tensors, digest, largest_of_samples, largest_value
from .basis import fit_basis
from .cast import check_finite
from .dct import Inverse, inverse_dct, to_frequencies, to_states

__all__ = ["Transform"]

#: Quanta of the stored mean per step. The mean is known to both sides, so this costs no error, only residual variance:
#: a quarter of a step leaves at most (1/8)**2 of a step squared.
_MEAN_QUANTA = 4
#: Step size where nobody asks for a rate or a distortion, in units of the root-mean-square of the centred states.
_DEFAULT_RELATIVE_STEP_SIZE = 0.5
#: Largest integer that is stored.
_LARGEST = 32767
#: Samples with values within so many steps are not decoded to check the bound: 400 such products in fp32 err by 0.003 steps.
_ORDINARY = 128


@dataclass(frozen=True)
class Transform(ArrayStep):
    """Removes the mean per token position, applies a basis across channels and a DCT over the token grid, and rounds.

    With patch tokens ``x`` (tokens, hidden), mean ``m``, basis ``B`` (hidden, hidden) and orthonormal 2-D DCT ``C``, the
    stored integers are ``round(C (x - m) B^-T / step)``. ``B`` is ``W^-1 V``: ``W`` weighs directions, and the columns of
    ``V`` are the principal axes of ``W (x - m)``. Unweighted, ``B`` is orthonormal up to the rounding of its storage
    (8 bits; the encoder inverts what is stored), so the error of the coefficients is the error of the states.

    Prefix tokens are stored in fp16. A token whose coefficients might outgrow 16 bits is stored as it is, and so is a prefix
    token beyond fp16: nothing is clipped.

    Attributes:
        step: Step size in the units of the (weighted) states. ``None`` lets ``fit`` choose half the root-mean-square of the
            centred states.
        gradient_weight: ``W`` is the second moment of the loss gradients to the power of half this number, scaled to a
            mean eigenvalue of 1. With 0 all directions count alike. With 0.5 the square root of the second moment is the metric.
        prefix_tokens: Number of leading tokens that are no patches. Set by ``fit``.
        grid: (height, width) of the patches; (1, tokens) if they form no known grid, then there is no DCT. Set by ``fit``.
        state: SHA-256 of the fitted tensors. Set by ``fit``.
        basis: (hidden, hidden) int8, columns in units of ``scale``. Set by ``fit``.
        scale: (hidden,) float32. Set by ``fit``.
        mean: (tokens, hidden) int32: mean in the transform domain, in units of ``step / 4``. Set by ``fit``.
    """

    name: ClassVar[str] = "transform"
    takes: ClassVar[frozenset[str]] = frozenset({FLOATS})
    gives: ClassVar[str] = INTEGERS
    has_step_size: ClassVar[bool] = True
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

    @override
    def configuration(self) -> dict[str, Any]:
        return {**super().configuration(), "grid": None if self.grid is None else list(self.grid)}

    @override
    def tensors(self) -> dict[str, Tensor]:
        if self.basis is None or self.scale is None or self.mean is None:
            return {}
        return {"basis": self.basis, "scale": self.scale, "mean": self.mean}

    # ---- Fitting ----

    @property
    @override
    def needs_fit(self) -> bool:
        return self.basis is None

    @property
    @override
    def needs_gradients(self) -> bool:
        return self.gradient_weight > 0

    @override
    def fit(
        self,
        sample: Tensor,
        prefix_tokens: int = 0,
        grid: tuple[int, int] | None = None,
        gradients: Tensor | None = None,
        rotate: bool = True,
    ) -> Transform:
        """Fit mean and basis, and the step size if there is none; see ``ArrayStep.fit``.

        A sample smaller than the hidden size, and constant channels, are fine: directions without variance get a basis
        vector like all others. With ``rotate=False`` the components are the channels themselves, not principal axes.

        Raises:
            ValueError: Fewer than two samples, NaN or infinite values, a grid that does not fit, or no gradients.
        """
        if sample.dim() != 3 or len(sample) < 2:
            raise ValueError(
                f"a basis is fitted on at least 2 samples of (tokens, hidden), got shape {tuple(sample.shape)}"
            )
        tokens = sample.shape[1] - prefix_tokens
        grid = grid or (1, tokens)
        if tokens < 1 or math.prod(grid) != tokens:
            raise ValueError(
                f"{sample.shape[1]} tokens with {prefix_tokens} prefix tokens do not form a grid of {grid[0]} x {grid[1]}"
            )
        check_finite(sample)
        patch_gradients = None if gradients is None else gradients[:, prefix_tokens:]
        basis = fit_basis(sample[:, prefix_tokens:], patch_gradients, self.gradient_weight, rotate)
        step = self.step or _DEFAULT_RELATIVE_STEP_SIZE * (basis.spread or float(basis.mean.abs().max()) or 1.0)
        # The mean comes last: it is stored in units of the step size and goes through the basis as it is stored.
        no_mean = torch.zeros(0, dtype=torch.int32)
        tensors: dict[str, Any] = {"basis": basis.columns, "scale": basis.scale, "mean": no_mean}
        fitted = dataclasses.replace(
            self, step=step, prefix_tokens=prefix_tokens, grid=grid, state=digest(tensors), **tensors
        )
        return fitted._with_mean(basis.mean)

    @property
    @override
    def step_size(self) -> float | None:
        return self.step

    @override
    def with_step_size(self, step_size: float) -> Transform:
        """Return the same fit with another step size.

        Raises:
            ValueError: The step size is not a positive number or too fine for the mean, or nothing has been fitted.
        """
        self._check_fitted()
        mean = self._mean_tokens(torch.float64, torch.device("cpu"))
        return dataclasses.replace(self, step=step_size)._with_mean(mean)

    def _with_mean(self, mean: Tensor) -> Transform:
        assert self.step is not None
        quanta = torch.round(self._forward(mean[None])[0] * (_MEAN_QUANTA / self.step))
        if float(quanta.abs().max()) > 2**31 - 1:
            raise ValueError(
                f"a step of {self.step:.3g} is too fine for states whose mean reaches {float(mean.abs().max()):.3g}"
            )
        tensors = {**self.tensors(), "mean": quanta.T.contiguous().to(torch.int32)}
        return dataclasses.replace(self, mean=tensors["mean"], state=digest(tensors))

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

    @property
    def _grid(self) -> tuple[int, int]:
        assert self.grid is not None
        return self.grid

    def _forward(self, centred: Tensor) -> Tensor:
        """(samples, tokens, hidden) -> coefficients (samples, hidden, tokens) from low to high frequency."""
        return to_frequencies(self._inverse.to(centred.dtype) @ centred.transpose(1, 2), self._grid)

    def constants(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Inverse]:
        """Return the mean of the tokens, the basis times the step size, and what undoes the DCT."""
        key = (dtype, device)
        if key not in self._cached_constants:
            assert self.step is not None
            # Products in full precision, then rounded once.
            exact = torch.float64 if device.type == "cpu" else torch.float32
            self._cached_constants[key] = (
                self._mean_tokens(exact, device).to(dtype),
                (self._basis(exact, device) * self.step).to(dtype),
                inverse_dct(self._grid, dtype, device),
            )
        return self._cached_constants[key]

    @functools.cached_property
    def _cached_constants(self) -> dict[Any, tuple[Tensor, Tensor, Inverse]]:
        return {}

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without derived tensors, which a worker process computes anew."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_cached_constants", "_inverse")}

    def _backward(self, values: Tensor, basis: Tensor, inverse: Inverse, kept: Tensor | None = None) -> Tensor:
        """Coefficients (samples, hidden, tokens) -> (samples, tokens, hidden), in the dtype of the basis."""
        return to_states(values.to(basis.dtype), basis.T, self._grid, inverse, kept)

    def mean_coefficients(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the mean in the transform domain, (hidden, tokens) from low to high frequency, in steps."""
        return cast(Tensor, self.mean).to(device, dtype).T / _MEAN_QUANTA

    def _mean_tokens(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """(tokens, hidden)."""
        wide, step = torch.promote_types(dtype, torch.float32), self.step or 0.0
        coefficients, inverse = self.mean_coefficients(wide, device) * step, inverse_dct(self._grid, wide, device)
        return self._backward(coefficients[None], self._basis(wide, device), inverse)[0].to(dtype)

    # ---- The codec ----

    @override
    def encoded_specs(self, spec: ArraySpec) -> dict[str, ArraySpec]:
        """Return the specs of four arrays.

        ``values`` (samples, hidden, patches) int16; ``prefix`` (samples, prefix tokens, hidden) fp16; ``exact_index``
        (tokens stored as they are, 1) int32, and ``exact`` (the same, hidden) in the dtype of the states.
        """
        self._check_fitted()
        assert self.basis is not None
        if len(spec.shape) != 3:
            raise ValueError(f"transform takes (samples, tokens, hidden), got {spec.shape}")
        samples, tokens, hidden = spec.shape
        expected = (self.prefix_tokens + math.prod(self._grid), len(self.basis))
        if (tokens, hidden) != expected:
            raise ValueError(f"transform was fitted for (tokens, hidden) = {expected}, got {(tokens, hidden)}")
        return {
            "values": ArraySpec((samples, hidden, tokens - self.prefix_tokens), torch.int16),
            "prefix": ArraySpec((samples, self.prefix_tokens, hidden), torch.float16),
            "exact_index": ArraySpec((samples * tokens, 1), torch.int32, ragged=True),
            "exact": ArraySpec((samples * tokens, hidden), spec.dtype, ragged=True),
        }

    @override
    def check(self, tokens: int, hidden: int) -> None:
        self._check_fitted()
        height, width = self._grid
        patches = height * width
        # Matrices of the DCT take the square of a side: no more than the states themselves, some times over.
        if self.prefix_tokens + patches != tokens or (height > 1 and max(height, width) ** 2 > 4 * patches * hidden):
            raise ValueError(
                f"{self.prefix_tokens} prefix tokens and a grid of {height} x {width} make no {tokens} tokens"
            )
        specs = {
            "basis": ArraySpec((hidden, hidden), torch.int8),
            "scale": ArraySpec((hidden,), torch.float32),
            "mean": ArraySpec((patches, hidden), torch.int32),
        }
        check_tensors("the transform", self.tensors(), specs)
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
        return 1.01 * (longest * largest * math.sqrt(math.prod(self._grid) * hidden) + mean)

    @override
    def abs_bound(self, arrays: Mapping[str, Tensor], largest: float) -> float:
        bounds = [self._peak(largest, arrays["prefix"].shape[2]), largest_value(arrays["prefix"])]
        if "exact" in arrays:
            bounds.append(largest_value(arrays["exact"]))
        return math.nan if any(math.isnan(bound) for bound in bounds) else max(bounds)

    @override
    def encode(self, array: Tensor) -> dict[str, Tensor]:
        self.encoded_specs(ArraySpec(tuple(array.shape), array.dtype))
        check_finite(array)
        assert self.step is not None
        wide = torch.float64 if array.dtype == torch.float64 else torch.float32
        mean, basis, inverse = self.constants(wide, torch.device("cpu"))
        prefix = array[:, : self.prefix_tokens].to(torch.float16)
        centred = array[:, self.prefix_tokens :].to(wide) - mean
        components = self._inverse.to(wide) @ centred.transpose(1, 2)
        # A coefficient of a grid of n tokens is at most sqrt(n) times the largest value of its component.
        limit = self.step * _LARGEST / math.sqrt(centred.shape[1]) / 1.01
        fits = torch.maximum(components.amax(1), -components.amin(1)) < limit
        exact = torch.zeros(array.shape[:2], dtype=torch.bool)
        exact[:, : self.prefix_tokens] = ~torch.isfinite(prefix).all(2)
        exact[:, self.prefix_tokens :] = ~fits
        prefix = prefix.masked_fill(exact[:, : self.prefix_tokens, None], 0)
        if not bool(fits.all()):
            components = components.masked_fill(~fits[:, None], 0)
        values = to_frequencies(components, self._grid).div_(self.step).round_().to(torch.int16)  # new pages take time
        # What arithmetic lost of extreme inputs (1e30 beside 1) must not break the bound, nor values round to infinity. In
        # ordinary samples it stays below the hundredth of the bound that is kept for it.
        peak = torch.finfo(array.dtype).max / 4
        extreme = largest_of_samples(array)
        reach = extreme.to(wide).clamp_min(float(mean.abs().max()))
        check = ((reach > _ORDINARY * self.step) | (extreme > peak)).nonzero()[:, 0]
        if len(check):
            states, skip = array[check, self.prefix_tokens :], exact[check, self.prefix_tokens :]
            decoded = (self._backward(values[check], basis, inverse) + mean).to(array.dtype).to(wide)
            skip = skip | ~torch.isfinite(decoded).all(2)
            error = (decoded - states.to(wide)).masked_fill(skip[..., None], 0)
            excess = ~(error.double().square().mean((1, 2)).sqrt() <= self.error_bound(array[check]))
            exact[check, self.prefix_tokens :] = skip | excess[:, None]
        index = exact.flatten().nonzero()
        exact_states = array.reshape(-1, array.shape[-1])[index[:, 0]]
        return {"values": values, "prefix": prefix, "exact_index": index.to(torch.int32), "exact": exact_states}

    @override
    def collatable(self, arrays: dict[str, Tensor], spec: ArraySpec) -> dict[str, Tensor]:
        """Return ``values``, ``prefix``, and ``exact`` and ``is_exact`` if any token of the chunk is stored as it is.

        ``exact`` is (samples, tokens, hidden) in the dtype of the states, and ``is_exact`` (samples, tokens) bool.

        Raises:
            ValueError: Places and tokens are not equally many, or a place lies outside the chunk.
        """
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

    @override
    def decode_kept(self, arrays: Mapping[str, Tensor], positions: Tensor, dtype: Any, compute_dtype: Any) -> Tensor:
        return self.decode(arrays, dtype, compute_dtype, positions.to(arrays["values"].device))

    @override
    def decode(
        self, arrays: Mapping[str, Tensor], dtype: torch.dtype, compute_dtype: Any, positions: Tensor | None = None
    ) -> Tensor:
        values, prefix = arrays["values"], arrays["prefix"]
        wide = compute_dtype or (torch.float64 if dtype == torch.float64 else torch.float32)
        mean, basis, inverse = self.constants(wide, values.device)
        kept = None if positions is None else positions[:, self.prefix_tokens :] - self.prefix_tokens
        patches = self._backward(values, basis, inverse, kept).add_(mean if kept is None else mean[kept])
        states = patches.new_empty((len(values), self.prefix_tokens + patches.shape[1], len(basis)), dtype=dtype)
        states[:, : self.prefix_tokens] = prefix
        states[:, self.prefix_tokens :] = patches
        if "exact" in arrays:
            beside = (arrays["is_exact"][..., None], arrays["exact"])
            is_exact, exact = beside if positions is None else (take_tokens(array, positions) for array in beside)
            states = torch.where(is_exact, exact, states)
        return states

    @functools.cached_property
    def _gain(self) -> float:
        return float(torch.linalg.matrix_norm(self._basis(torch.float64, torch.device("cpu")), 2))

    @override
    def error_bound(self, array: Tensor) -> Tensor:
        """Return the bound of each sample, (samples,), float64.

        Coefficients are wrong by at most half a step. The DCT keeps root-mean-square values, and the basis stretches them by at
        most its largest singular value. Added are 1% for arithmetic and the rounding of the result, of prefix tokens to fp16.
        """
        self._check_fitted()
        assert self.step is not None
        rounding = largest_of_samples(array) * (torch.finfo(array.dtype).eps + 2.0**-11) + 2.0**-25
        return self.step / 2 * self._gain * 1.01 + rounding
