"""The operator against its quadratic twin and a hand-written formula: values, gradients, precision, memory, masks."""

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from modeling_adala import (
    FEATURE_MAPS,
    UsageError,
    attention_weights,
    build_feature_map,
    linear_attention,
    linear_attention_reference,
)
from modeling_adala.attention_interface import adala_attention_forward, adala_attention_mask
from modeling_adala.linear_attention import _in_pytorch as linear_attention_torch

MAPS = sorted(FEATURE_MAPS)
LEARNED = [name for name in MAPS if FEATURE_MAPS[name].learned]
OPTIONS = [{}, {"scale": 0.5}, {"center_keys": True}, {"scale": 2.0, "center_keys": True}]


def heads_view(batch: int, heads: int, tokens: int, dim: int, dtype=torch.float64, shift: float = 0.0) -> torch.Tensor:
    """`(batch, heads, tokens, dim)` as attention modules hand it over: a view of `(batch, tokens, heads, dim)`."""
    return (torch.randn(batch, tokens, heads, dim, dtype=dtype) + shift).transpose(1, 2)


def feature_map_of(name: str, heads: int, dim: int, randomize: bool = True, **kwargs):
    """A feature map whose learned parameters, if it has any, are not the identity."""
    feature_map = build_feature_map(name, heads, dim, **kwargs).double()
    if randomize:
        for parameter in feature_map.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    return feature_map


def in_one_piece(query, key, value, feature_map, key_mask):
    """What compilers and devices without a backend of their own get."""
    return linear_attention_torch(query, key, value, feature_map, key_mask, feature_map.eps)


def values_and_gradients(operator, query, key, value, feature_map, mask) -> dict[str, torch.Tensor]:
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    output = operator(*leaves, feature_map, mask)
    # a fixed weight per output number, so that no gradient cancels
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)
    parameters = dict(feature_map.named_parameters())
    gradients = torch.autograd.grad((output * weight).sum(), [*leaves, *parameters.values()])
    return {"output": output.detach(), **dict(zip(["query", "key", "value", *parameters], gradients))}


def assert_same(actual: dict, expected: dict, tolerance: float = 1e-10) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert actual[name].shape == expected[name].shape
        difference = (actual[name] - expected[name]).abs().max()
        assert difference <= tolerance * expected[name].abs().max().clamp(min=1), f"{name} differs by {difference:.1e}"


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """0 where both vanish."""
    difference = (actual.double() - expected).norm()
    return (difference / expected.norm()).item() if difference > 0 else 0.0


# --- against the oracle, and the oracle against the formula ----------------------------------------------------------

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


# --- memory and time -------------------------------------------------------------------------------------------------


class CopyRecorder(TorchDispatchMode):
    """Names of the operations that copy at least `threshold` numbers out of the memory of `tensors`."""

    COPIES = ("clone", "copy", "copy_", "_to_copy", "contiguous", "_reshape_copy")

    def __init__(self, tensors, threshold: int):
        super().__init__()
        self.storages = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        self.threshold, self.copies = threshold, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        reads = [x for x in args if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() in self.storages]
        is_copy = name in self.COPIES or name.endswith("_copy")
        if reads and is_copy and isinstance(output, torch.Tensor) and output.numel() >= self.threshold:
            self.copies.append(name)
        return output


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", MAPS)
def test_no_copy_of_query_key_or_value(name, batch):
    """Not even of one head of them."""
    heads, tokens, dim = 4, 128, 64
    inputs = [heads_view(batch, heads, tokens, dim, torch.float32) for _ in range(3)]
    feature_map = build_feature_map(name, heads, dim)
    with torch.no_grad(), CopyRecorder(inputs, batch * tokens * dim) as recorder:
        in_one_piece(*inputs, feature_map, None)
    assert recorder.copies == []
    with torch.no_grad(), CopyRecorder(inputs, batch * tokens * dim) as recorder:
        torch.matmul(inputs[0], inputs[1].transpose(2, 3))
    assert ("clone" in recorder.copies) == (batch > 1)  # what the recorder would have seen


def test_no_copy_inside_the_matrix_products_either():
    """The profiler also sees what a product copies on its own account, below the dispatcher."""
    query, key, value = (heads_view(2, 4, 128, 64, torch.float32) for _ in range(3))
    feature_map = build_feature_map("elu", 4, 64)

    def copied_by_bmm(function) -> list[list[int]]:
        with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            function()
        copies = []
        for event in profiler.events():
            parent = event.cpu_parent
            while event.name == "aten::copy_" and parent is not None:
                if parent.name == "aten::bmm":
                    copies.append(event.input_shapes[0])
                parent = parent.cpu_parent
        return copies

    every_second = query[:, 0, :, ::2]  # no stride of 1: a product must copy it
    assert copied_by_bmm(lambda: torch.bmm(every_second, every_second.transpose(1, 2))) != []
    assert copied_by_bmm(lambda: in_one_piece(query, key, value, feature_map, None)) == []


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_is_a_view_of_contiguous_batch_tokens_heads_dim_memory(dtype, batch):
    query, key, value = heads_view(batch, 3, 17, 64), heads_view(batch, 3, 23, 64), heads_view(batch, 3, 23, 80)
    output = linear_attention(*(x.to(dtype) for x in (query, key, value)), build_feature_map("elu", 3, 64))
    assert output.shape == (batch, 3, 17, 80)
    assert output.dtype == dtype
    assert output.transpose(1, 2).is_contiguous()


class CostRecorder(TorchDispatchMode):
    """Numbers written by all operations, the size of the largest tensor, and the products of matrix products."""

    def __init__(self):
        super().__init__()
        self.written, self.largest, self.flops = 0, 0, FlopCounterMode(display=False)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor):
            self.written += output.numel()
            self.largest = max(self.largest, output.numel())
        return output


@pytest.mark.parametrize("name", MAPS)
def test_cost_is_linear_in_the_number_of_tokens(name):
    """Count operations and sizes: unlike times, they do not depend on the load of the machine."""
    feature_map = build_feature_map(name, 2, 16)

    def cost(function, tokens: int) -> np.ndarray:
        inputs = [heads_view(1, 2, tokens, 16, torch.float32) for _ in range(3)]
        with torch.no_grad(), CostRecorder() as recorder, recorder.flops:
            function(*inputs, feature_map)
        return np.array([recorder.written, recorder.largest, recorder.flops.get_total_flops()])

    assert (cost(linear_attention, 16_384) <= 4.01 * cost(linear_attention, 4_096)).all()
    quadratic = cost(linear_attention_reference, 1_024) / cost(linear_attention_reference, 256)
    assert (quadratic > 8).all()  # what it would have seen


# --- masks and the attention interface -------------------------------------------------------------------------------


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


# --- errors ----------------------------------------------------------------------------------------------------------


def test_unknown_feature_map_names_the_choices():
    with pytest.raises(
        UsageError, match=r"feature_map='gelu' is unknown.*elu, hedgehog, power, relu, softmax_pair, t2r"
    ):
        build_feature_map("gelu", 2, 16)


@pytest.mark.parametrize(("name", "kwargs"), [("elu", {"feature_dim": 8}), ("hedgehog", {"scales": 2})])
def test_an_option_that_the_map_does_not_have_is_named(name, kwargs):
    with pytest.raises(UsageError, match=rf"feature_map_kwargs=.*{next(iter(kwargs))}.*feature_map='{name}'"):
        build_feature_map(name, 2, 16, **kwargs)


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
