"""Inputs, feature maps and comparisons for the tests of linear attention."""

import torch

from modeling_adala import FEATURE_MAPS, build_feature_map
from modeling_adala.linear_attention import _in_pytorch as linear_attention_torch

MAPS = sorted(FEATURE_MAPS)
LEARNED = [name for name in MAPS if FEATURE_MAPS[name].learned]


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
    """The PyTorch implementation, which compilers and devices without kernels run."""
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
