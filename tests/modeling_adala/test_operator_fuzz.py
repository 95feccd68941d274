"""Calls of the operator with random arguments: refused in one line, or equal to the formula in float64."""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_adala import FEATURE_MAPS, UsageError, build_feature_map, linear_attention

BOUNDS = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 4e-2}
MASK_DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.float32,
    torch.float64,
]
size = st.integers(0, 4)


@dataclass
class Call:
    """The arguments of a call that fit each other; `phi` is the same feature map in float64."""

    query: Any
    key: Any
    value: Any
    feature_map: Any
    key_mask: Any
    eps: Any
    cu_seqlens: Any
    backend: Any
    phi: Any


# --- right calls -----------------------------------------------------------------------------------------------------


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same numbers with other strides."""
    if layout == "heads":  # as projections write them
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "turned":
        return x.mT.contiguous().mT
    if layout == "gaps":
        return x.repeat_interleave(2, dim=-1)[..., ::2]
    if layout == "offset":
        return torch.nn.functional.pad(x, (3, 2, 1, 1))[:, :, 1:-1, 3:-2]
    if layout == "expanded":
        return x[:, :, :, :1].expand_as(x)
    if layout == "negated":  # not in memory: PyTorch remembers the sign
        return torch._neg_view(-x)
    return x


layouts = st.sampled_from(["plain", "heads", "turned", "gaps", "offset", "expanded", "negated"])


@st.composite
def right_calls(draw) -> Call:
    torch.manual_seed(draw(st.integers(0, 99)))
    packed = draw(st.booleans())
    batch, heads = 1 if packed else draw(st.integers(0, 3)), draw(st.integers(1, 3))
    tokens = draw(st.one_of(st.integers(0, 3), st.integers(1, 150)))
    query_tokens = tokens if packed else draw(st.sampled_from([tokens, 0, 1, 7]))
    dim, value_dim = draw(st.sampled_from([1, 3, 8, 16, 24])), draw(st.sampled_from([1, 5, 16, 64]))
    name = draw(st.sampled_from(sorted(FEATURE_MAPS)))
    options = {"center_keys": draw(st.booleans()), "scale": draw(st.sampled_from([None, 0.7]))}
    feature_map = build_feature_map(name, heads, dim, **options)
    for parameter in feature_map.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    phi = build_feature_map(name, heads, dim, **options).double()
    phi.load_state_dict(feature_map.state_dict())
    if not feature_map.learned and draw(st.booleans()):
        feature_map, phi = name, build_feature_map(name, heads, dim)
    elif draw(st.integers(0, 3)) == 0:  # hooks on everything
        feature_map.register_forward_hook(lambda *args: None)
    dtype = draw(st.sampled_from(list(BOUNDS)))
    dtypes = [dtype, dtype, draw(st.sampled_from([dtype, dtype, torch.float32]))]
    shapes = [(batch, heads, query_tokens, dim), (batch, heads, tokens, dim), (batch, heads, tokens, value_dim)]
    query, key, value = (
        laid_out(torch.randn(shape).to(dtype), draw(layouts)) for shape, dtype in zip(shapes, dtypes, strict=True)
    )
    key_mask, cu_seqlens = None, None
    if draw(st.booleans()):
        key_mask = (torch.rand(batch, tokens) < draw(st.sampled_from([0, 0.5, 1]))).to(
            draw(st.sampled_from(MASK_DTYPES))
        )
        key_mask = draw(st.sampled_from([key_mask, key_mask.mT.contiguous().mT, key_mask[:1].expand_as(key_mask)]))
    if packed:
        inner = sorted(draw(st.lists(st.integers(0, tokens), max_size=4)))
        cu_seqlens = torch.tensor([0, *inner, tokens], dtype=draw(st.sampled_from([torch.int32, torch.int64])))
        cu_seqlens = draw(st.sampled_from([cu_seqlens, cu_seqlens.repeat_interleave(2)[::2]]))
    # where all but nothing of a query's features is left of them, only eps keeps its gradient from exploding
    eps = draw(st.sampled_from([1e-3, 1] if phi.nonlinearity.startswith("relu") else [None, 1e-3, 1]))
    backend = draw(st.sampled_from([None, "torch", "reference"]))
    return Call(query, key, value, feature_map, key_mask, eps, cu_seqlens, backend, phi)


def attend(call: Call, *inputs: torch.Tensor) -> torch.Tensor:
    options = {"cu_seqlens": call.cu_seqlens, "backend": call.backend}
    return linear_attention(*inputs, call.feature_map, call.key_mask, call.eps, **options)


def formula(call: Call, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """In float64, image by image, from the keys that count."""
    output = []
    bounds = [0, key.shape[2]] if call.cu_seqlens is None else call.cu_seqlens.tolist()
    for image in range(len(query)):
        parts = [value.new_zeros(query.shape[1], 0, value.shape[-1])]
        for first, last in pairwise(bounds):
            q = query[image] if call.cu_seqlens is None else query[image, :, first:last]
            k, v = key[image, :, first:last], value[image, :, first:last]
            if call.key_mask is not None:
                real = call.key_mask[image, first:last] == 1
                k, v = k[:, real], v[:, real]
            if k.shape[1] == 0 or q.shape[1] == 0:
                parts.append(0 * q.sum(-1, keepdim=True) * v.sum(1, keepdim=True))
                continue
            phi_q, phi_k = (x[0] for x in call.phi(q[None], k[None]))
            scores = phi_q @ phi_k.mT / k.shape[1]
            parts.append(
                scores @ v / (scores.sum(-1, keepdim=True) + (call.phi.eps if call.eps is None else call.eps))
            )
        output.append(torch.cat(parts, dim=1))
    return torch.stack(output) if output else query[..., :1] * value[:, :, :0].sum(2, keepdim=True)


def check_against_the_formula(call: Call) -> None:
    inputs = [call.query, call.key, call.value]
    leaves = [x.detach().clone().double().requires_grad_() for x in inputs]
    expected = formula(call, *leaves)
    weight = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).reshape(expected.shape)
    gradients = torch.autograd.grad((expected * weight).sum(), leaves, materialize_grads=True)
    expected = [expected.detach(), *gradients]
    scale = max(x.abs().max().item() if x.numel() else 0 for x in (*inputs, weight))
    bound = max(BOUNDS[x.dtype] for x in inputs) * max(scale, 1)
    with torch.no_grad():
        without_gradients = attend(call, *inputs)
    leaves = [x.detach().requires_grad_() for x in inputs]
    output = attend(call, *leaves)
    actual = [output.detach(), *torch.autograd.grad((output * weight).sum(), leaves)]
    assert output.dtype == call.value.dtype
    for name, ours, truth in zip(
        ["no_grad", "output", "query", "key", "value"], [without_gradients, *actual], [expected[0], *expected]
    ):
        assert ours.shape == truth.shape, name
        if call.phi.nonlinearity.startswith("relu") and bound > 1e-2 and name in ("query", "key"):
            continue  # rounding to 16 bits moves inputs across the bend, where the gradient jumps
        error = (ours.double() - truth).norm() / truth.norm().clamp(min=truth.numel() ** 0.5 / 100)
        assert not truth.numel() or error < bound, f"{name} is off by {error:.1e}"


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(right_calls())
def test_what_fits_equals_the_formula(call):
    check_against_the_formula(call)


# --- wrong calls -----------------------------------------------------------------------------------------------------


def other_shape(draw, x: torch.Tensor) -> torch.Tensor:
    """One size more, less or changed, or an axis more or less, or anything."""
    sizes, axis = list(x.shape), draw(st.integers(0, x.ndim - 1))
    change = draw(st.sampled_from(["one more", "one less", "drop", "add", "swap", "anything"]))
    if change == "one more":
        sizes[axis] += 1
    elif change == "one less":
        sizes[axis] = max(sizes[axis] - 1, 0)
    elif change == "drop":
        sizes.pop(axis)
    elif change == "add":
        sizes.insert(axis, 1)
    elif change == "swap":
        sizes.reverse()
    else:
        sizes = draw(st.lists(size, max_size=5))
    return torch.ones(sizes, dtype=x.dtype)


def fits(call: Call) -> bool:
    """The contract, said once more."""
    q, k, v = call.query, call.key, call.value
    if not q.ndim == k.ndim == v.ndim == 4 or 0 in (q.shape[3], k.shape[3], v.shape[3]):
        return False
    if q.shape[:2] != k.shape[:2] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        return False
    if call.phi.learned and (call.phi.num_heads, call.phi.head_dim) != (q.shape[1], q.shape[3]):
        return False
    if call.key_mask is not None and call.key_mask.shape != (k.shape[0], k.shape[2]):
        return False
    if call.cu_seqlens is not None:
        bounds = call.cu_seqlens
        if bounds.ndim != 1 or not len(bounds) or len(q) != 1 or q.shape[2] != k.shape[2]:
            return False
        return bounds[0] == 0 and bounds[-1] == k.shape[2] and bool((bounds.diff() >= 0).all())
    return True


@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_other_shapes_are_refused_unless_they_fit_too(data):
    call = data.draw(right_calls())
    names = [name for name in ("query", "key", "value", "key_mask", "cu_seqlens") if getattr(call, name) is not None]
    for name in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=2)):
        if getattr(call, name).ndim:
            call = replace(call, **{name: other_shape(data.draw, getattr(call, name))})
    if fits(call):
        check_against_the_formula(call)
        return
    with pytest.raises(UsageError) as refusal:
        attend(call, call.query, call.key, call.value)
    assert "\n" not in str(refusal.value)


def integers(call, draw):
    name = draw(st.sampled_from(["query", "key", "value"]))
    dtype = draw(st.sampled_from([torch.int64, torch.bool, torch.complex64, torch.uint8, torch.float8_e4m3fn]))
    return {name: torch.ones(getattr(call, name).shape).to(dtype)}


def elsewhere(call, draw):
    name = draw(st.sampled_from(["query", "key", "value"]))
    return {name: getattr(call, name).to("meta")}


def no_tensor(call, draw):
    name = draw(st.sampled_from(["query", "key", "value", "key_mask", "cu_seqlens"]))
    return {name: draw(st.sampled_from(["text", 3, [[1.0]], object()]))}


def sparse(call, draw):
    name = draw(st.sampled_from(["query", "key", "value"]))
    return {name: getattr(call, name).detach().to_sparse()}


def strange_mask(call, draw):
    shape, dtype = (call.key.shape[0], call.key.shape[2]), draw(st.sampled_from(MASK_DTYPES[1:]))
    if 0 in shape:
        return {"key_mask": torch.ones(5, 5)}
    mask = torch.ones(shape, dtype=dtype)
    mask[-1, -1] = draw(
        st.sampled_from([2, 3, 100] + ([-1.0, 0.5, float("nan"), -float("inf")] * dtype.is_floating_point))
    )
    return {"key_mask": draw(st.sampled_from([mask, mask.to("meta"), mask.to(torch.complex64)]))}


def strange_bounds(call, draw):
    tokens = call.key.shape[2]
    bounds = draw(
        st.sampled_from(
            [
                [0],
                [],
                [tokens],
                [0, tokens + 1],
                [-1, tokens],
                [1, tokens],
                [0, tokens + 1, tokens],
                [0, 2**40],
                [5, 0],
            ]
        )
    )
    if tokens == 0 and bounds in ([0], [tokens]):
        bounds = []
    dtype = draw(st.sampled_from([torch.int64, torch.float32, torch.bool]))
    return {"cu_seqlens": torch.tensor(bounds, dtype=dtype)}


def strange_eps(call, draw):
    return {"eps": draw(st.sampled_from([-1e-6, float("nan"), float("inf"), -float("inf"), "small", 1j]))}


def strange_feature_map(call, draw):
    heads, dim = call.query.shape[1], call.query.shape[3]
    choices = ["hedgehog", "t2r", "gelu", "", torch.nn.Linear(dim, dim), torch.exp, None]
    choices += [build_feature_map("hedgehog", heads + 1, dim), build_feature_map("t2r", heads, dim + 1)]
    choices += [build_feature_map("hedgehog", heads, dim).to("meta")]
    return {"feature_map": draw(st.sampled_from(choices))}


def strange_backend(call, draw):
    return {"backend": draw(st.sampled_from(["cuda", "", "TORCH", 3]))}


CHANGES = [integers, elsewhere, no_tensor, sparse, strange_mask, strange_bounds, strange_eps, strange_feature_map]


@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_what_does_not_fit_is_refused(data):
    call = data.draw(right_calls())
    change = data.draw(st.sampled_from([*CHANGES, strange_backend]))
    call = replace(call, **change(call, data.draw))
    with pytest.raises(UsageError) as refusal:
        attend(call, call.query, call.key, call.value)
    assert "\n" not in str(refusal.value)
