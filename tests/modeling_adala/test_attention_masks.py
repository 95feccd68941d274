"""Padding, the forms of masks that the attention interface takes, and the weights that linear attention applies."""

import pytest
import torch
from attention_helpers import MAPS, feature_map_of, heads_view

from modeling_adala import (
    UsageError,
    attention_weights,
    build_feature_map,
    linear_attention,
    linear_attention_reference,
)
from modeling_adala.attention_interface import adala_attention_forward, adala_attention_mask


@pytest.mark.parametrize("options", [{}, {"center_keys": True}])
@pytest.mark.parametrize("name", MAPS)
def test_padding_has_no_influence_and_a_padded_batch_equals_its_images_one_by_one(name, options):
    lengths, tokens = [5, 12, 9], 12
    query, key, value = (heads_view(3, 2, tokens, 16) for _ in range(3))
    feature_map = feature_map_of(name, 2, 16, **options)
    mask = torch.arange(tokens) < torch.tensor(lengths)[:, None]
    output = linear_attention(query, key, value, feature_map, mask)
    garbage = [torch.where(mask[:, None, :, None], x, torch.tensor(1e4).double()) for x in (key, value)]
    torch.testing.assert_close(linear_attention(query, *garbage, feature_map, mask), output, rtol=1e-10, atol=1e-10)
    for image, length in enumerate(lengths):
        alone = [x[image : image + 1, :, :length] for x in (query, key, value)]
        torch.testing.assert_close(
            output[image : image + 1, :, :length], linear_attention(*alone, feature_map), rtol=1e-10, atol=1e-10
        )
    unmasked = linear_attention(query, key, value, feature_map)
    assert (unmasked - output)[0].abs().max() > 1e-3  # the mask does something
    assert torch.allclose(unmasked[1], output[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("name", MAPS)
def test_a_fully_masked_image_gives_zeros_and_finite_gradients(name, dtype):
    query, key, value = (heads_view(2, 2, 6, 16).to(dtype).requires_grad_() for _ in range(3))
    feature_map = build_feature_map(name, 2, 16, center_keys=True)
    mask = torch.tensor([[False] * 6, [True] * 6])
    output = linear_attention(query, key, value, feature_map, mask)
    assert torch.equal(output[0], torch.zeros_like(output[0]))
    assert output[1].abs().max() > 0.01
    output.sum().backward()
    for tensor in (query, key, value, *feature_map.parameters()):
        assert tensor.grad.isfinite().all()
    assert torch.equal(value.grad[0], torch.zeros_like(value.grad[0]))


def test_mask_function_hands_over_the_key_padding_mask_as_bool():
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    delivered = adala_attention_mask(2, 3, 3, attention_mask=mask)
    assert delivered.dtype == torch.bool
    assert delivered[:, 0, 0].tolist() == [[True, True, False], [False, True, True]]
    assert adala_attention_mask(2, 3, 3) is None


class PlainModule(torch.nn.Module):
    """An attention module that knows nothing of AdaLA."""


@pytest.mark.parametrize("kind", ["2d int", "4d bool", "4d additive"])
def test_interface_accepts_every_form_of_key_padding_mask(kind):
    query, key, value = (heads_view(2, 2, 6, 16) for _ in range(3))
    keep = torch.rand(2, 6) < 0.5
    keep[:, 0] = True
    mask = {
        "2d int": keep.long(),
        "4d bool": keep[:, None, None],
        "4d additive": torch.where(keep, 0.0, torch.finfo(torch.float32).min)[:, None, None],
    }[kind]
    output, weights = adala_attention_forward(PlainModule(), query, key, value, mask, dropout=0.0, scaling=0.25)
    expected = linear_attention_reference(query, key, value, build_feature_map("elu", 2, 16), keep)
    torch.testing.assert_close(output, expected.transpose(1, 2), rtol=1e-10, atol=1e-10)
    assert weights is None


@pytest.mark.parametrize("shape", [(2, 1, 6, 6), (2, 2, 6, 6), (2, 6, 6)])
def test_interface_refuses_a_mask_of_token_pairs(shape):
    query, key, value = (heads_view(2, 2, 6, 16) for _ in range(3))
    with pytest.raises(UsageError, match=r"attention_mask of shape \(2, .*key-padding mask.*sdpa"):
        adala_attention_forward(PlainModule(), query, key, value, torch.ones(shape, dtype=torch.bool))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", MAPS)
def test_attention_weights_sum_to_one_and_reproduce_the_output(name, masked):
    query, key, value = heads_view(2, 2, 9, 16), heads_view(2, 2, 30, 16), heads_view(2, 2, 30, 24)
    feature_map = feature_map_of(name, 2, 16)
    mask = torch.arange(30) < torch.tensor([[30], [11]]) if masked else None
    weights = attention_weights(query, key, feature_map, mask)
    assert weights.shape == (2, 2, 9, 30)
    assert weights.min() >= 0
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 9).double(), rtol=0, atol=1e-3)
    assert weights.sum(-1).max() <= 1 + 1e-12
    if masked:
        assert weights[1, :, :, 11:].abs().max() == 0
    output = linear_attention(query, key, value, feature_map, mask)
    torch.testing.assert_close(weights @ value, output, rtol=1e-10, atol=1e-10)
