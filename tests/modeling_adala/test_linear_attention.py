"""The operator against its quadratic twin: values, gradients, layouts, precision, compilers."""

import pytest
import torch
import torch._dynamo.testing
from attention_helpers import (
    MAPS,
    assert_same,
    feature_map_of,
    heads_view,
    in_one_piece,
    relative_error,
    values_and_gradients,
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from modeling_adala import attention_weights, build_feature_map, linear_attention, linear_attention_reference

OPTIONS = [{}, {"scale": 0.5}, {"center_keys": True}, {"scale": 2.0, "center_keys": True}]
token_counts = st.one_of(st.integers(1, 8), st.integers(1, 80), st.integers(1, 1000))


@pytest.mark.parametrize("name", MAPS)
@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
)
@given(
    tokens=token_counts,
    query_tokens=st.one_of(st.none(), st.integers(1, 50)),
    dim=st.sampled_from([64, 72, 80, 96]),
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    mask=st.sampled_from([None, "some", "first image fully"]),
    options=st.sampled_from(OPTIONS),
    seed=st.integers(0, 99),
)
@example(tokens=1, query_tokens=None, dim=64, batch=1, heads=1, mask=None, options={}, seed=0)
@example(tokens=1, query_tokens=7, dim=72, batch=2, heads=2, mask="first image fully", options={}, seed=0)
@example(tokens=1000, query_tokens=1000, dim=80, batch=1, heads=1, mask=None, options={}, seed=0)
@example(tokens=1000, query_tokens=3, dim=96, batch=2, heads=3, mask="some", options={"center_keys": True}, seed=0)
def test_values_and_all_gradients_equal_the_quadratic_reference(
    name, tokens, query_tokens, dim, batch, heads, mask, options, seed
):
    torch.manual_seed(seed)
    query = heads_view(batch, heads, query_tokens or min(tokens, 100), dim)
    key, value = heads_view(batch, heads, tokens, dim, shift=0.5), heads_view(batch, heads, tokens, dim)
    feature_map = feature_map_of(name, heads, dim, **options)
    key_mask = None
    if mask is not None:
        key_mask = torch.rand(batch, tokens) < 0.7
        key_mask[:, 0] = True
        key_mask[0] &= mask != "first image fully"
    expected = values_and_gradients(linear_attention_reference, query, key, value, feature_map, key_mask)
    assert expected["output"].dtype == torch.float64
    for operator in (linear_attention, in_one_piece):
        assert_same(values_and_gradients(operator, query, key, value, feature_map, key_mask), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_memory_layout_of_the_inputs_does_not_matter(dtype):
    feature_map = build_feature_map("elu", 3, 64)
    inputs = [heads_view(2, 3, 20, 64).to(dtype) for _ in range(3)]
    expected = linear_attention(*inputs, feature_map)
    for contiguous in ([True] * 3, [True, False, False], [False, True, False], [False, False, True]):
        mixed = [x.contiguous() if flag else x for x, flag in zip(inputs, contiguous)]
        torch.testing.assert_close(linear_attention(*mixed, feature_map), expected, rtol=1e-3, atol=1e-10)
    fused = torch.stack(inputs, dim=2).transpose(2, 3).flatten(3).chunk(3, dim=-1)  # one projection for q, k and v
    torch.testing.assert_close(linear_attention(*fused, feature_map), expected, rtol=1e-3, atol=1e-10)


# --- precision -------------------------------------------------------------------------------------------------------

BOUNDS = {torch.float16: 2e-2, torch.bfloat16: 2e-2, torch.float32: 1e-5}


@pytest.mark.parametrize("factor", [1, 100])
@pytest.mark.parametrize("name", MAPS)
@torch.no_grad()
def test_low_precision_stays_close_to_float64_at_65536_tokens(name, factor):
    """Keys are offset by 5. Truth is float64 from the same rounded inputs; queries are fewer to save time."""
    exact = [heads_view(1, 1, tokens, 64, torch.float32) * factor for tokens in (8_192, 65_536, 65_536)]
    exact[1] += 5 * factor
    feature_map, errors = build_feature_map(name, 1, 64), {}
    for dtype in BOUNDS:
        query, key, value = (x.to(dtype) for x in exact)
        truth = linear_attention(query.double(), key.double(), value.double(), feature_map)
        output = linear_attention(query, key, value, feature_map)
        assert output.dtype == dtype
        assert output.isfinite().all()
        errors[dtype] = relative_error(output, truth)
    assert all(errors[dtype] < bound for dtype, bound in BOUNDS.items()), errors


@pytest.mark.parametrize("dtype", BOUNDS)
def test_relu_gives_zeros_to_queries_without_a_positive_coordinate(dtype):
    query = heads_view(1, 1, 65_536, 64).abs().neg().to(dtype)
    key, value = heads_view(1, 1, 65_536, 64, shift=5.0).to(dtype), heads_view(1, 1, 65_536, 64).to(dtype)
    assert torch.equal(linear_attention(query, key, value, build_feature_map("relu", 1, 64)), torch.zeros_like(value))


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("name", MAPS)
def test_gradients_are_finite_in_low_precision(name, dtype):
    query, key, value = (heads_view(1, 2, 256, 64).mul(30).to(dtype).requires_grad_() for _ in range(3))
    feature_map = build_feature_map(name, 2, 64)
    linear_attention(query, key, value, feature_map).float().sum().backward()
    for tensor in (query, key, value, *feature_map.parameters()):
        assert tensor.grad.isfinite().all()


@pytest.mark.parametrize("name", MAPS)
def test_autocast_changes_nothing(name):
    query, key, value = (heads_view(1, 2, 100, 64, torch.float32) for _ in range(3))
    feature_map = feature_map_of(name, 2, 64).float()
    mask = torch.rand(1, 100) < 0.8

    def results() -> list[torch.Tensor]:
        output = linear_attention(query, key, value, feature_map, mask)
        return [output, attention_weights(query, key, feature_map, mask)]

    outside = results()
    with torch.autocast("cpu", torch.bfloat16):
        assert (query @ key.transpose(2, 3)).dtype == torch.bfloat16  # autocast is on
        inside = results()
    for a, b in zip(inside, outside):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


# --- compiling and exporting -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "masked"), [*((name, True) for name in MAPS), ("elu", False)])
def test_compiles_whole_and_once_for_all_numbers_of_tokens(name, masked):
    torch._dynamo.reset()
    feature_map = build_feature_map(name, 2, 64)
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(linear_attention, backend=counter, fullgraph=True)
    for tokens in (50, 70, 130):
        inputs = [heads_view(2, 2, tokens, 64, torch.float32) for _ in range(3)]
        for tensor in inputs:
            torch._dynamo.mark_dynamic(tensor, 2)
        mask = torch.rand(2, tokens) < 0.8 if masked else None
        if masked:
            torch._dynamo.mark_dynamic(mask, 1)
        torch.testing.assert_close(
            compiled(*inputs, feature_map, mask), linear_attention(*inputs, feature_map, mask), rtol=1e-6, atol=1e-6
        )
    assert counter.frame_count == 1


def test_compiles_with_gradients():
    torch._dynamo.reset()
    query, key, value = (heads_view(2, 2, 50, 64) for _ in range(3))
    feature_map = feature_map_of("hedgehog", 2, 64)
    compiled = torch.compile(linear_attention, backend="aot_eager", fullgraph=True)
    expected = values_and_gradients(linear_attention, query, key, value, feature_map, None)
    assert_same(values_and_gradients(compiled, query, key, value, feature_map, None), expected)


def test_exports_with_dynamic_batch_and_tokens():
    class Operator(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.feature_map = build_feature_map("hedgehog", 2, 64)

        def forward(self, query, key, value, mask):
            return linear_attention(query, key, value, self.feature_map, mask)

    def inputs(batch, tokens):
        return (*(heads_view(batch, 2, tokens, 64, torch.float32) for _ in range(3)), torch.rand(batch, tokens) < 0.8)

    operator = Operator()
    batch, tokens = torch.export.Dim("batch", min=1), torch.export.Dim("tokens", min=2)
    dynamic = ({0: batch, 2: tokens}, {0: batch, 2: tokens}, {0: batch, 2: tokens}, {0: batch, 1: tokens})
    exported = torch.export.export(operator, inputs(2, 50), dynamic_shapes=dynamic).module()
    for shape in ((1, 7), (3, 130)):
        example_inputs = inputs(*shape)
        torch.testing.assert_close(exported(*example_inputs), operator(*example_inputs), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value_dtype", [torch.bfloat16, torch.float16])
def test_value_of_another_dtype(value_dtype):
    """As DINOv3 hands it over under autocast: its rotary positions turn query and key into float32."""
    query, key = torch.randn(2, 2, 3, 17, 8)
    value = torch.randn(2, 3, 17, 8, dtype=value_dtype)
    phi = build_feature_map("elu", 3, 8)
    output = linear_attention(query, key, value, phi)
    assert output.dtype == value_dtype
    expected = linear_attention_reference(query.double(), key.double(), value.double(), phi)
    torch.testing.assert_close(output.double(), expected, rtol=2e-2, atol=2e-2)
