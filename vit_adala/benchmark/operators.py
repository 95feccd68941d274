"""The attention operators that are timed side by side, and the check of ours."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from modeling_adala.errors import AdaLAError
from modeling_adala.feature_maps import FeatureMap
from modeling_adala.linear_attention import linear_attention, linear_attention_reference

from .cases import LINEAR, Settings

Operator = Callable[[Tensor, Tensor, Tensor], Tensor]

PLAIN, SDPA = "plain PyTorch", "SDPA"
# largest relative error against the reference in float64, ‖difference‖ / ‖reference‖
BOUNDS = {torch.float16: 2e-2, torch.bfloat16: 2e-2, torch.float32: 1e-5}
# N x N weights that the reference may form
_REFERENCE_WEIGHTS = 2**22
PLAIN_EPS = 1e-6


def operator_inputs(
    batch: int,
    heads: int,
    tokens: int,
    head_dim: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    requires_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return random query, key and value, `(batch, heads, tokens, head_dim)` with strides as projections give them."""
    generator = torch.Generator(device).manual_seed(0)  # drawn there: a CPU takes seconds for what a GPU has at once
    query, key, value = (
        torch.randn(batch, tokens, heads, head_dim, generator=generator, device=device)
        .to(dtype)
        .requires_grad_(requires_grad)
        .transpose(1, 2)
        for _ in range(3)
    )
    return query, key, value


def plain_attention(query: Tensor, key: Tensor, value: Tensor, feature_map: FeatureMap) -> Tensor:
    """Compute linear attention as a user would write it, no care for strides, masks or overflow.

    Like the others, it leaves the output as a projection reads it, `(batch, tokens, heads, head_dim)` in memory.
    """
    query, key = feature_map(query.float(), key.float())
    state, normalizer = key.transpose(2, 3) @ value.float(), key.sum(dim=2)[..., None]
    output = ((query @ state) / (query @ normalizer + PLAIN_EPS)).to(value.dtype)
    return output.transpose(1, 2).contiguous().transpose(1, 2)


def operators(feature_map: FeatureMap) -> dict[str, Operator]:
    """Return the operators by name, ours first; `feature_map` is that of the linear ones."""
    return {
        LINEAR: lambda q, k, v: linear_attention(q, k, v, feature_map),
        PLAIN: lambda q, k, v: plain_attention(q, k, v, feature_map),
        SDPA: lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
    }


def pass_of(operator: Operator, inputs: tuple[Tensor, Tensor, Tensor], backward: bool = False) -> Callable[[], Any]:
    """Return one pass of an operator; with `backward`, also the gradients for a fixed gradient of the output."""
    if backward:
        query, value = inputs[0], inputs[2]
        batch, heads, tokens, _ = query.shape
        incoming = value.new_ones(batch, tokens, heads, value.shape[3]).transpose(1, 2)  # as from the projection
        return lambda: torch.autograd.grad(operator(*inputs), inputs, incoming)

    def forward() -> Tensor:
        with torch.no_grad():
            return operator(*inputs)

    return forward


def prepare_operator(
    name: str, feature_map: FeatureMap, shape: tuple[int, int, int, int], settings: Settings
) -> Callable[[], Any]:
    """Return one pass of an operator, warmed up by a few tokens, for a fresh process."""
    operator, (batch, heads, tokens, width) = operators(feature_map)[name], shape
    few, all_of_them = (
        operator_inputs(batch, heads, count, width, settings.dtype, settings.device, settings.backward)
        for count in (16, tokens)
    )
    pass_of(operator, few, settings.backward)()
    return pass_of(operator, all_of_them, settings.backward)


def check_operator(
    operator: Operator, inputs: tuple[Tensor, Tensor, Tensor], feature_map: FeatureMap, backward: bool = False
) -> float:
    """Return the relative error of an operator against the quadratic reference in float64, known to be small.

    All keys count, but only as many queries, heads and images, spread evenly, as keep the reference small.

    Args:
        operator (`Callable`): Operator to check.
        inputs (`tuple[Tensor, Tensor, Tensor]`): Query, key, value, which need gradients if `backward`.
        feature_map (`FeatureMap`): phi.
        backward (`bool`, *optional*, defaults to `False`): Also compare the gradients of query, key and value.

    Returns:
        `float`: Largest of the errors, each ‖difference‖ / ‖reference‖.

    Raises:
        AdaLAError: If it exceeds the bound of the dtype in `BOUNDS`, or is not a number.
    """
    query, key, value = inputs
    batch, heads, tokens, _ = query.shape
    images, some = sorted({0, batch - 1}), sorted({0, heads - 1})
    count = max(1, min(tokens, _REFERENCE_WEIGHTS // (len(images) * len(some) * key.shape[2])))
    rows = torch.linspace(0, tokens - 1, count).long()

    def part(x: Tensor) -> Tensor:
        return x.detach()[images][:, some].double()

    leaves = [x.requires_grad_(backward) for x in (part(query)[:, :, rows], part(key), part(value))]
    query64, key64, value64 = leaves
    expected = linear_attention_reference(query64, key64, value64, _in_float64(feature_map, some))
    with torch.set_grad_enabled(backward):
        output = operator(*inputs)
    pairs = [(part(output)[:, :, rows], expected.detach())]
    if backward:
        weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(output)
        incoming = torch.zeros_like(output)
        where = torch.tensor(images)[:, None, None], torch.tensor(some)[:, None], rows
        incoming[where] = weight
        exact = torch.autograd.grad(expected, leaves, weight.double())
        ours = torch.autograd.grad(output, inputs, incoming)
        pairs += list(zip([part(ours[0])[:, :, rows], part(ours[1]), part(ours[2])], exact, strict=True))
    errors, bound = torch.tensor([relative_error(actual, wanted) for actual, wanted in pairs]), BOUNDS[query.dtype]
    error = errors.max().item()  # NaN if one of them is, unlike `max`
    if not error <= bound:
        shape, dtype = "x".join(map(str, query.shape)), str(query.dtype).removeprefix("torch.")
        raise AdaLAError(
            f"operator on {shape} ({dtype}): relative error {error:.1e} against the reference exceeds {bound:.0e}; no"
            " speed is given for a wrong result. Please report this."
        )
    return error


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return ‖actual - expected‖ / ‖expected‖; 0 if both are zero, NaN if either holds NaN."""
    difference = (actual.double() - expected.double()).norm()
    return 0.0 if difference == 0 else (difference / expected.double().norm()).item()


def _in_float64(feature_map: FeatureMap, heads: list[int]) -> FeatureMap:
    """Return a copy in float64 of some of the heads."""
    exact = copy.deepcopy(feature_map).double()
    exact.num_heads = len(heads)
    for parameter in exact.parameters():
        parameter.data = parameter.data[heads]
    return exact
