"""locked_dropout.py and embed_regularize.py."""

import pytest
import torch
from torch import nn

from embed_regularize import embedded_dropout
from locked_dropout import LockedDropout


def test_locked_dropout_is_the_same_at_every_time_step():
    torch.manual_seed(0)
    x = torch.rand(9, 40, 50) + 1
    mask = LockedDropout()(x, 0.4) / x
    assert torch.equal(mask[0].expand_as(mask).round(decimals=4), mask.round(decimals=4))
    kept = mask[0] != 0
    torch.testing.assert_close(mask[0][kept], torch.full_like(mask[0][kept], 1 / 0.6))
    assert abs(kept.float().mean().item() - 0.6) < 0.03
    # The mask differs between columns and between features.
    assert not (kept == kept[:1]).all()
    assert not (kept == kept[:, :1]).all()


def test_locked_dropout_off():
    x = torch.randn(3, 2, 4)
    assert LockedDropout()(x, 0.0) is x
    assert LockedDropout().eval()(x, 0.5) is x


def test_embedded_dropout_drops_whole_words_everywhere():
    torch.manual_seed(0)
    embed = nn.Embedding(200, 6)
    words = torch.randint(200, (50, 20))
    output = embedded_dropout(embed, words, 0.25)
    dropped = (output == 0).all(dim=2)
    kept = ~dropped
    torch.testing.assert_close(output[kept], embed(words)[kept] / 0.75)
    for word in words.unique():
        assert dropped[words == word].unique().numel() == 1
    share = dropped.float().mean().item()
    assert abs(share - 0.25) < 0.1


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_embedded_dropout_gradient_carries_the_mask_to_every_word(dropout):
    # The original passes padding_idx=-1, so the last word never gets a gradient from the input.
    torch.manual_seed(2)
    embed = nn.Embedding(50, 3)
    words = torch.cat([torch.arange(50), torch.tensor([49] * 5)]).view(11, 5)
    output = embedded_dropout(embed, words, dropout)
    output.sum().backward()
    times = words.flatten().bincount() / (1 - dropout)
    dropped = (output == 0).all(dim=2).flatten()[:50]
    expected = torch.where(dropped, 0.0, times).unsqueeze(1).expand(50, 3)
    torch.testing.assert_close(embed.weight.grad, expected)


def test_embedded_dropout_honours_a_padding_index():
    embed = nn.Embedding(5, 3, padding_idx=1)
    embedded_dropout(embed, torch.tensor([[0, 1]]), 0.0).sum().backward()
    assert not embed.weight.grad[1].any()
    assert embed.weight.grad[0].all()


@pytest.mark.parametrize("size", [1, 3])
def test_embedded_dropout_scale(size):
    embed = nn.Embedding(5, 3)
    words = torch.tensor([[0, 1], [4, 4]])
    scale = torch.rand(5, size)
    expected = (scale * embed.weight)[words]
    torch.testing.assert_close(embedded_dropout(embed, words, 0.0, scale), expected)
