"""A codec step of one's own: one class and one entry of ``STEPS``, and everything works with it, fits and searches too."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from hf_freezecache.cache.codec_state import CodecState, load_state, save_state
from hf_freezecache.codecs import STEPS, Cast, Codec, Pack, Zstd, codec_from_dict, make_codec
from hf_freezecache.codecs.base import FLOATS, INTEGERS, ArraySpec, ArrayStep, largest_of_samples
from hf_freezecache.compression.distortion import DistortionMeter
from hf_freezecache.compression.step_search import calibrate, fit_codec
from hf_freezecache.errors import UnsupportedSetupError

GRID, PREFIX, HIDDEN = (2, 3), 1, 4


@dataclass(frozen=True)
class Round(ArrayStep):
    """Rounds to multiples of a step size that gradients make smaller, around a fitted mean."""

    name: ClassVar[str] = "round"
    takes: ClassVar[frozenset[str]] = frozenset({FLOATS})
    gives: ClassVar[str] = INTEGERS
    has_step_size: ClassVar[bool] = True
    #: What ``fit`` was given last.
    fitted_on: ClassVar[list[Any]] = []
    size: float | None = None
    centre: Tensor | None = field(default=None, repr=False, compare=False, metadata={"stored": False})

    def tensors(self) -> dict[str, Tensor]:
        return {} if self.centre is None else {"centre": self.centre}

    @property
    def needs_fit(self) -> bool:
        return self.centre is None

    @property
    def needs_gradients(self) -> bool:
        return True

    def fit(self, sample, prefix_tokens, grid, gradients):
        self.fitted_on[:] = [sample, prefix_tokens, grid, gradients]
        if not torch.isfinite(sample).all():
            raise ValueError("not finite")
        size = float(sample.std() / (1 + gradients.abs().mean()))
        return dataclasses.replace(self, size=self.size or size, centre=sample.float().mean((0, 1)))

    @property
    def step_size(self) -> float | None:
        return self.size

    def with_step_size(self, step_size: float) -> Round:
        if step_size < 1e-6:
            raise ValueError("too fine")
        return dataclasses.replace(self, size=step_size)

    def encoded_specs(self, spec: ArraySpec) -> dict[str, ArraySpec]:
        return {"values": ArraySpec(spec.shape, torch.int16), "factor": ArraySpec((spec.shape[0],), torch.float32)}

    def encode(self, array: Tensor) -> dict[str, Tensor]:
        values = torch.round((array.float() - self.centre) / self.size).to(torch.int16)
        return {"values": values, "factor": torch.full((len(array),), self.size)}

    def decode(self, arrays, dtype, compute_dtype) -> Tensor:
        return (arrays["values"] * arrays["factor"][:, None, None] + self.centre).to(dtype)

    def error_bound(self, array: Tensor) -> Tensor:
        return self.size / 2 + largest_of_samples(array) * 1e-5


@pytest.fixture(autouse=True)
def _registered(monkeypatch) -> None:
    monkeypatch.setitem(STEPS, "round", Round)


def states_of(samples: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, PREFIX + 6, HIDDEN, generator=generator) + torch.arange(HIDDEN)


def fitted(codec: str = '["round", "pack", "zstd"]') -> Codec:
    states = states_of(20)
    return fit_codec(make_codec(codec), states, PREFIX, GRID, torch.ones_like(states))


def test_it_is_asked_for_fitted_and_told_from_a_fitted_one() -> None:
    asked = make_codec('["round", "pack", "zstd"]')
    assert asked == Codec((Round(), Pack(), Zstd()))
    assert (asked.needs_fit, asked.needs_gradients, asked.has_step_size, asked.step_size) == (True, True, True, None)
    codec = fitted()
    assert (codec.needs_fit, codec.needs_gradients) == (False, False)
    assert codec.tensors().keys() == {"0.centre"}
    sample, prefix_tokens, grid, gradients = Round.fitted_on
    assert torch.equal(sample, states_of(20))
    assert (prefix_tokens, grid) == (PREFIX, GRID)
    assert torch.equal(gradients, torch.ones_like(sample))
    assert fit_codec(codec, states_of(20, 1), PREFIX, GRID) is codec
    assert codec.with_step_size(0.25).step_size == 0.25
    with pytest.raises(UnsupportedSetupError, match="could not be fitted: not finite"):
        fit_codec(asked, torch.full((2, 7, 4), torch.nan), PREFIX, GRID, torch.ones(2, 7, 4))


def test_it_is_fitted_to_what_the_step_before_gives() -> None:
    codec = fitted('[{"name": "cast", "configuration": {"dtype": "BF16"}}, "round", "pack", "zstd"]')
    assert torch.equal(Round.fitted_on[0], Cast("BF16").encode(states_of(20))["values"])
    assert codec.steps[0] == Cast("BF16")
    assert codec.tensors().keys() == {"1.centre"}


def test_it_encodes_within_its_bound_and_comes_back_from_a_file(tmp_path) -> None:
    codec, states = fitted(), states_of(5, 7)
    frames = codec.encode(states)
    error = (codec.decode(frames, states.shape, states.dtype) - states).double().square().mean((1, 2)).sqrt()
    assert bool((error <= codec.error_bound(states)).all())
    assert make_codec(list(codec.steps)).encode(states) == frames
    assert codec_from_dict(json.loads(json.dumps(codec.to_dict())), codec.tensors()).encode(states) == frames
    save_state(tmp_path / "codec.safetensors", "0" * 64, CodecState(codec, {}))
    assert load_state(tmp_path / "codec.safetensors").codec.encode(states) == frames


@pytest.mark.parametrize("target", [{"budget": 0.05}, {"target_bits": 5.0}])
def test_its_step_size_is_searched_for(target) -> None:
    meter = DistortionMeter(states_of(30, 3), lambda states: (torch.zeros(len(states), 1), states.flatten(1)))
    codec, report = calibrate(fitted(), meter, 20, chunk_size=30, **target)
    assert report.trials > 1
    assert codec.step_size != fitted().step_size
    if "budget" in target:
        assert 0.8 * 0.05 <= report.distortion <= 0.05
    else:
        assert 4 <= report.bits_per_element <= 5
