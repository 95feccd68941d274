"""The attention operators that are timed beside each other, and the proof that what is timed is right.

The plain ones are what a user would write: no care for strides, masks or overflow.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from modeling_adala.errors import AdaLAError
from modeling_adala.feature_maps import EluFeatureMap, FeatureMap, ReluFeatureMap
from modeling_adala.linear_attention import linear_attention, linear_attention_reference

Operator = Callable[[Tensor, Tensor, Tensor], Tensor]

# largest relative error against the reference in float64, ‖difference‖ / ‖reference‖
BOUNDS = {torch.float16: 2e-2, torch.bfloat16: 2e-2, torch.float32: 1e-5}
# of the N x N weights that the reference may form
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
    """Random query, key, value `(batch, heads, tokens, head_dim)`: views of `(batch, tokens, heads, head_dim)`, which
    is what projections write."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(batch, tokens, heads, head_dim, generator=generator)
        .to(device, dtype)
        .requires_grad_(requires_grad)
        .transpose(1, 2)
        for _ in range(3)
    )
    return query, key, value


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, feature_map: FeatureMap, low_precision: bool = False
) -> Tensor:
    """Linear attention in five lines of PyTorch; in float32 as the formula asks, or all in the dtype of the input."""
    output_dtype = value.dtype
    if not low_precision:
        query, key, value = query.float(), key.float(), value.float()
    query, key = _plain_features(query, key, feature_map)
    state, normalizer = key.transpose(2, 3) @ value, key.sum(dim=2)[..., None]
    return ((query @ state) / (query @ normalizer + PLAIN_EPS)).to(output_dtype)


def eager_softmax(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention with the N x N weights in memory."""
    scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
    return scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype) @ value


def operators(feature_map: FeatureMap, names: tuple[str, ...] | None = None) -> dict[str, Operator]:
    """What is timed, by name; ours first.

    Args:
        feature_map (`FeatureMap`): phi of the linear ones.
        names (`tuple[str, ...]`, *optional*): Those wanted. Default: all.
    """
    everything: dict[str, Operator] = {
        "linear": lambda q, k, v: linear_attention(q, k, v, feature_map),
        "plain PyTorch": lambda q, k, v: plain_attention(q, k, v, feature_map),
        "plain PyTorch, input dtype": lambda q, k, v: plain_attention(q, k, v, feature_map, low_precision=True),
        "SDPA": lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
        "eager softmax": eager_softmax,
    }
    return everything if names is None else {name: everything[name] for name in names}


def eager_bytes(query: Tensor) -> int:
    """What `eager_softmax` needs for its weights: scores, their softmax in float32, and that in the input dtype."""
    batch, heads, tokens, _ = query.shape
    return batch * heads * tokens**2 * (2 * query.element_size() + 4)


def forward_of(operator: Operator, inputs: tuple[Tensor, Tensor, Tensor]) -> Callable[[], Tensor]:
    """One pass without gradients."""

    def forward() -> Tensor:
        with torch.no_grad():
            return operator(*inputs)

    return forward


def forward_backward_of(operator: Operator, inputs: tuple[Tensor, Tensor, Tensor]) -> Callable[[], object]:
    """One pass and the gradients with respect to the inputs, for a fixed gradient of the output."""
    query, value = inputs[0], inputs[2]
    batch, heads, tokens, _ = query.shape
    incoming = torch.ones(batch, tokens, heads, value.shape[3], dtype=value.dtype, device=value.device)
    return lambda: torch.autograd.grad(operator(*inputs), inputs, incoming.transpose(1, 2))


def check_operator(
    operator: Operator, inputs: tuple[Tensor, Tensor, Tensor], feature_map: FeatureMap, backward: bool = False
) -> float:
    """`operator_error`, where it is within the bound of the dtype in `BOUNDS`.

    Raises:
        AdaLAError: if it exceeds the bound, or is no number.
    """
    error, query = operator_error(operator, inputs, feature_map, backward), inputs[0]
    bound = BOUNDS[query.dtype]
    if not error <= bound:
        shape, dtype = "x".join(map(str, query.shape)), str(query.dtype).removeprefix("torch.")
        raise AdaLAError(
            f"operator on {shape} ({dtype}): relative error {error:.1e} against the reference exceeds {bound:.0e}; no"
            " speed is given for a wrong result. Please report this."
        )
    return error


def operator_error(
    operator: Operator, inputs: tuple[Tensor, Tensor, Tensor], feature_map: FeatureMap, backward: bool = False
) -> float:
    """Relative error of an operator against the quadratic reference in float64, gradients included if asked for.

    All keys count, but only so many queries, heads and images, spread evenly, that the reference stays small.

    Args:
        operator (`Callable`): To be judged.
        inputs (`tuple[Tensor, Tensor, Tensor]`): Query, key, value, which need gradients if `backward`.
        feature_map (`FeatureMap`): phi.
        backward (`bool`, *optional*, defaults to `False`): Compare the gradients of query, key and value, too.

    Returns:
        `float`: the largest of the errors, each ‖difference‖ / ‖reference‖.
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
    return max(relative_error(actual, wanted) for actual, wanted in pairs)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual - expected‖ / ‖expected‖; 0 where both vanish, not a number where either holds none."""
    difference = (actual.double() - expected.double()).norm()
    return 0.0 if difference == 0 else (difference / expected.double().norm()).item()


def _plain_features(query: Tensor, key: Tensor, feature_map: FeatureMap) -> tuple[Tensor, Tensor]:
    # as textbooks have them: ours are written for accuracy, which may cost or save time
    plain: dict[type, Callable[[Tensor], Tensor]] = {EluFeatureMap: lambda x: F.elu(x) + 1, ReluFeatureMap: F.relu}
    phi = plain.get(type(feature_map))
    if phi is None or feature_map.scale != 1.0 or feature_map.center_keys:
        return feature_map(query, key)
    return phi(query), phi(key)


def _in_float64(feature_map: FeatureMap, heads: list[int]) -> FeatureMap:
    """A copy in float64 of some of the heads."""
    exact = copy.deepcopy(feature_map).double()
    exact.num_heads = len(heads)
    for parameter in exact.parameters():
        parameter.data = parameter.data[heads]
    return exact
