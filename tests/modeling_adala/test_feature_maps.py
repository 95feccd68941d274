"""The feature maps: their formulas written out by hand, learned projections, options, errors."""

import numpy as np
import pytest
import torch
from attention_helpers import LEARNED, MAPS, assert_same, feature_map_of, heads_view, values_and_gradients

from modeling_adala import UsageError, build_feature_map, linear_attention, linear_attention_reference


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x) / np.exp(x).sum()


PHI = {
    "elu": lambda x, d: np.array([e + 1 if e > 0 else np.exp(e) for e in x]),
    "relu": lambda x, d: np.maximum(x, 0),
    "hedgehog": lambda x, d: np.concatenate([softmax(x), softmax(-x)]),
    "softmax_pair": lambda x, d: np.concatenate([softmax(x), softmax(-x)]),
    "t2r": lambda x, d: np.maximum(x, 0),
    "power": lambda x, d: np.maximum(x, 0) ** 3,
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", MAPS)
def test_reference_equals_the_formula_written_out_in_numpy(name, masked):
    batch, heads, query_tokens, tokens, dim = 2, 2, 3, 4, 5
    query, key = heads_view(batch, heads, query_tokens, dim), heads_view(batch, heads, tokens, dim, shift=0.5)
    value = heads_view(batch, heads, tokens, dim)
    mask = torch.tensor([[True, False, True, True], [True, True, False, False]]) if masked else None
    feature_map = build_feature_map(name, heads, dim)
    output = linear_attention_reference(query, key, value, feature_map, mask).detach().numpy()
    assert output.shape == (batch, heads, query_tokens, dim)
    for b, h, i in np.ndindex(batch, heads, query_tokens):
        real = [j for j in range(tokens) if mask is None or mask[b, j]]
        phi_q = PHI[name](query[b, h, i].numpy(), dim)
        scores = [phi_q @ PHI[name](key[b, h, j].numpy(), dim) / len(real) for j in real]
        total = sum(scores) + (1e-18 if name == "power" else 1e-6)
        expected = sum(s * value[b, h, j].numpy() for s, j in zip(scores, real)) / total
        np.testing.assert_allclose(output[b, h, i], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("feature_dim", [16, 64, 100])
@pytest.mark.parametrize("name", LEARNED)
def test_learned_maps_with_any_feature_dim_equal_the_reference(name, feature_dim):
    query, key, value = (heads_view(2, 3, 40, 64) for _ in range(3))
    feature_map = feature_map_of(name, 3, 64, feature_dim=feature_dim, scale=0.7, center_keys=True)
    phi_q, phi_k = feature_map(query, key)
    assert phi_q.shape[-1] == phi_k.shape[-1] == (2 * feature_dim if name == "hedgehog" else feature_dim)
    expected = values_and_gradients(linear_attention_reference, query, key, value, feature_map, None)
    assert expected["weight_q"].abs().max() > 0 and expected["weight_k"].abs().max() > 0
    assert_same(values_and_gradients(linear_attention, query, key, value, feature_map, None), expected)


@pytest.mark.parametrize("name", LEARNED)
def test_learned_maps_keep_queries_keys_and_heads_apart(name):
    query, key, value = (heads_view(1, 2, 10, 16) for _ in range(3))
    feature_map = feature_map_of(name, 2, 16, randomize=False)
    neutral = linear_attention(query, key, value, feature_map)
    with torch.no_grad():
        feature_map.weight_k[1].mul_(3)
    changed = linear_attention(query, key, value, feature_map)
    assert torch.equal(changed[:, 0], neutral[:, 0])
    assert (
        name in ("power", "t2r") or (changed[:, 1] - neutral[:, 1]).abs().max() > 1e-3
    )  # relu does not see a positive factor
    with torch.no_grad():
        feature_map.weight_q[0].copy_(feature_map_of(name, 2, 16).weight_q[0])
    assert (linear_attention(query, key, value, feature_map)[:, 0] - neutral[:, 0]).abs().max() > 1e-3


@pytest.mark.parametrize("name", MAPS)
def test_scale_multiplies_queries_and_keys(name):
    query, key, value = (heads_view(1, 2, 20, 16) for _ in range(3))
    scaled = linear_attention(query, key, value, build_feature_map(name, 2, 16, scale=0.3).double())
    by_hand = linear_attention(query * 0.3, key * 0.3, value, build_feature_map(name, 2, 16, scale=1.0))
    torch.testing.assert_close(scaled, by_hand, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", MAPS)
def test_center_keys_removes_a_shift_that_all_keys_share_and_ignores_padding(name):
    query, key, value = (heads_view(2, 2, 20, 16) for _ in range(3))
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[0, 12:] = False
    shift = torch.randn(2, 2, 1, 16, dtype=torch.float64) * 5
    centered, plain = (build_feature_map(name, 2, 16, center_keys=flag).double() for flag in (True, False))
    output = linear_attention(query, key, value, centered, mask)
    torch.testing.assert_close(
        linear_attention(query, key + shift, value, centered, mask), output, rtol=1e-9, atol=1e-9
    )
    mean = key[:1, :, :12].mean(dim=2, keepdim=True)
    by_hand = linear_attention(query[:1], key[:1, :, :12] - mean, value[:1, :, :12], plain)
    torch.testing.assert_close(output[:1], by_hand, rtol=1e-10, atol=1e-10)


def test_unknown_feature_map_names_the_choices():
    with pytest.raises(
        UsageError, match=r"feature_map='gelu' is unknown.*elu, hedgehog, power, relu, softmax_pair, t2r"
    ):
        build_feature_map("gelu", 2, 16)


@pytest.mark.parametrize(("name", "kwargs"), [("elu", {"feature_dim": 8}), ("hedgehog", {"scales": 2})])
def test_an_option_that_the_map_does_not_have_is_named(name, kwargs):
    with pytest.raises(UsageError, match=rf"feature_map_kwargs=.*{next(iter(kwargs))}.*feature_map='{name}'"):
        build_feature_map(name, 2, 16, **kwargs)
