"""Which tokens a step sees: drawn by sample, view and epoch, and by nothing else."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny import TinyTransform

from hf_freezecache.data.collators import CheckedCollator
from hf_freezecache.data.kept_tokens import KEPT_TOKENS, EpochKeys, KeptTokensCollator, KeptTokensViews, TokenSubset
from hf_freezecache.data.layout import ChunkLayout
from hf_freezecache.data.sampler import ChunkSampler
from hf_freezecache.data.views import ViewDataset

TOKENS = TokenSubset(seed=3, prefix_tokens=1, num_patches=196, token_keep=0.5)


@given(prefix=st.integers(0, 5), patches=st.integers(1, 40), keep=st.floats(0.001, 1.0), row=st.integers(0, 2**40))
def test_all_prefix_tokens_and_equally_many_patches_are_kept_in_order(prefix, patches, keep, row) -> None:
    tokens = TokenSubset(-1, prefix, patches, keep)
    positions = tokens.positions(row, 0, 7)
    assert positions.dtype == torch.int64
    assert len(positions) == tokens.num_kept == prefix + max(1, round(keep * patches))
    assert positions[:prefix].tolist() == list(range(prefix))
    assert sorted(set(positions.tolist())) == positions.tolist()
    assert positions[-1] < tokens.num_tokens


def test_tokens_depend_on_seed_sample_view_and_epoch_alone() -> None:
    keys = [(5, 1, 2), (6, 1, 2), (5, 0, 2), (5, 1, 3)]
    drawn = [TOKENS.positions(*key).tolist() for key in keys]
    drawn.append(TokenSubset(4, 1, 196, 0.5).positions(*keys[0]).tolist())
    assert len({tuple(positions) for positions in drawn}) == 5
    torch.manual_seed(9)
    assert TOKENS.positions(*keys[0]).tolist() == drawn[0]
    # Runs that are resumed with a later version draw the same.
    assert TokenSubset(0, 1, 8, 0.5).positions(1, 2, 3).tolist() == [0, 1, 3, 5, 8]


def test_over_epochs_each_patch_is_seen_about_equally_often() -> None:
    counts = torch.bincount(torch.cat([TOKENS.positions(0, 0, epoch) for epoch in range(400)]), minlength=197)
    assert counts[0] == 400
    assert counts[1:].min() > 150
    assert counts[1:].max() < 250


def test_the_collator_of_the_user_gets_examples_alone(images) -> None:
    views = ViewDataset(images.with_transform(TinyTransform(augment=True)), 0)
    sampler = ChunkSampler([ChunkLayout(50, 8, 0)], 1, 0, 2, 2)
    sampler.set_epoch(3)
    keys = list(EpochKeys(sampler))
    assert [key[:2] for key in keys] == list(sampler)
    assert {key[2] for key in keys} == {3}
    seen = []

    def collate(examples):
        seen.append([sorted(example) for example in examples])
        return {"labels": torch.tensor([example["labels"] for example in examples])}

    dataset = KeptTokensViews(views, TOKENS)
    batch = KeptTokensCollator(CheckedCollator(collate))(dataset.__getitems__(keys[:3]))
    assert seen == [[["labels", "pixel_values"]] * 3]
    assert batch[KEPT_TOKENS].tolist() == [TOKENS.positions(*key).tolist() for key in keys[:3]]
    assert torch.equal(dataset[keys[4]][1]["pixel_values"], views[keys[4][:2]]["pixel_values"])
