"""Names of packed arrays and of fitted tensors: what makes them and what takes them apart agree."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_freezecache.codecs.array_names import (
    BASE,
    COPY,
    GEOMETRY,
    IS_COPY,
    is_packed,
    join_groups,
    main_array,
    side_array,
    side_arrays,
    split_groups,
)

NAMES = st.text("abcdefghij_.0123456789", min_size=1, max_size=8)


def marked(number: int) -> torch.Tensor:
    return torch.tensor(number)


@given(st.sets(st.tuples(st.sampled_from([BASE, COPY]), st.integers(0, 120), NAMES), max_size=20))
def test_each_step_finds_its_own_arrays_again_and_no_other(sides) -> None:
    arrays = {side_array(*side): marked(number) for number, side in enumerate(sorted(sides))}
    assert len(arrays) == len(sides)
    arrays |= {main_array(BASE): marked(-1), main_array(COPY): marked(-2), GEOMETRY: marked(-3), IS_COPY: marked(-4)}
    assert len(arrays) == len(sides) + 4
    assert all(is_packed(name) for name in arrays)
    for view in (BASE, COPY):
        for step in range(121):
            numbers = {name: int(array) for name, array in side_arrays(arrays, view, step).items()}
            expected = {n: number for number, (v, s, n) in enumerate(sorted(sides)) if (v, s) == (view, step)}
            assert numbers == expected


def test_entries_of_a_batch_that_are_no_packed_arrays() -> None:
    for name in ("labels", "hidden_states", "view_geometry", "packed", "unpacked.values", "base.values", "geometry"):
        assert not is_packed(name)


@given(st.dictionaries(st.from_regex(r"[a-z0-9]+", fullmatch=True), st.dictionaries(NAMES, st.integers(), max_size=3)))
def test_groups_of_tensors_come_back(numbers) -> None:
    groups = {group: {name: marked(n % 2**31) for name, n in tensors.items()} for group, tensors in numbers.items()}
    again = split_groups(join_groups(groups))
    assert again == {group: tensors for group, tensors in groups.items() if tensors}
    nested = split_groups(join_groups({"codec": join_groups(groups)}))
    assert split_groups(nested.get("codec", {})) == again


def test_a_tensor_without_a_group_is_refused() -> None:
    with pytest.raises(ValueError, match="'basis' has no group"):
        split_groups({"basis": marked(0)})
