"""Feature maps phi, whose dot products replace the softmax kernel in linear attention.

Each map is an affine part (centering, scale, a learned projection) and then one nonlinearity of `NONLINEARITIES`,
which backends may run inside their own kernels.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .configuration_adala import check_feature_map
from .errors import UsageError
from .upstream import init


def elu_plus_one(x: Tensor) -> Tensor:
    """elu(x) + 1 (Katharopoulos et al. 2020, arXiv 2006.16236, eq. 7)."""
    # F.elu(x) + 1 would round exp(x) - 1 and lose the negative tail; torch.where is 20 times as slow on a CPU
    return torch.exp(x.clamp(max=0)) + F.relu(x)


def softmax_pair(x: Tensor) -> Tensor:
    """[softmax(x), softmax(-x)] over the features (Hedgehog, arXiv 2402.04347), twice as many."""
    return torch.softmax(torch.stack((x, -x), dim=-2), dim=-1).flatten(-2)


NONLINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": elu_plus_one,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "relu3": lambda x: F.relu(x).pow(3),
    "relu4": lambda x: F.relu(x).square().square(),  # pow(4) would take logarithms
    "softmax_pair": softmax_pair,
    "identity": lambda x: x,
}


class FeatureMap(nn.Module):
    """Map of queries and keys to the non-negative features whose dot products replace the softmax kernel.

    Query and key are `(batch, heads, tokens, head_dim)`, their features `(batch, heads, tokens, features)`.

    Args:
        num_heads (`int`): Number of heads; learned maps hold weights per head.
        head_dim (`int`): Width of one head.
        scale (`float`, *optional*): Factor on queries and keys. Default: 1.
        center_keys (`bool`, *optional*, defaults to `False`): Subtract each image's mean key first. Softmax does not
            see a shift that all keys share, but phi does.
    """

    nonlinearity: str
    learned = False
    eps = 1e-6
    power = 1

    def __init__(self, num_heads: int, head_dim: int, scale: float | None = None, center_keys: bool = False):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.scale = 1.0 if scale is None else scale
        self.center_keys = center_keys

    def forward(self, query: Tensor, key: Tensor, key_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the features of queries and keys. `key_mask` is `(batch, tokens)`, True for real tokens."""
        query, key, scale = self.affine(query, key, key_mask)
        if scale != 1.0:
            query, key = query * scale, key * scale
        nonlinearity = NONLINEARITIES[self.nonlinearity]
        return nonlinearity(query), nonlinearity(key)

    def affine(self, query: Tensor, key: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor, float]:
        """Return queries and keys before the nonlinearity, and the factor on both that is still to be applied."""
        return query, self.centered(key, key_mask), self.scale

    def centered(self, key: Tensor, key_mask: Tensor | None) -> Tensor:
        """Return the keys, less their mean if `center_keys`."""
        if not self.center_keys:
            return key
        wide = key.to(accumulation_dtype(key))
        if key_mask is None:
            return (wide - wide.mean(dim=2, keepdim=True)).to(key.dtype)
        weight = key_mask[:, None, :, None].to(wide.dtype)
        mean = (wide * weight).sum(dim=2, keepdim=True) / weight.sum(dim=2, keepdim=True).clamp(min=1)
        return (wide - mean).to(key.dtype)

    def raise_to(self, power: int) -> None:
        """Take a power of relu, and an eps that acts on queries and keys of the same size as without it."""
        self.power, self.eps = power, FeatureMap.eps**power
        self.nonlinearity = "relu" if power == 1 else f"relu{power}"

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set learned parameters to their neutral value."""


class EluFeatureMap(FeatureMap):
    """phi(x) = elu(x) + 1 (Katharopoulos et al. 2020, eq. 7)."""

    nonlinearity = "elu"


class ReluFeatureMap(FeatureMap):
    """phi(x) = max(x, 0)^power (EfficientViT, arXiv 2205.14756). A query that is all negative attends to nothing."""

    def __init__(self, num_heads: int, head_dim: int, power: int = 1, **kwargs):
        super().__init__(num_heads, head_dim, **kwargs)
        self.raise_to(power)


class SoftmaxPairFeatureMap(FeatureMap):
    """phi(x) = [softmax(x), softmax(-x)] over the features, twice as many: `hedgehog` without its projection."""

    nonlinearity = "softmax_pair"


class _ProjectedFeatureMap(FeatureMap):
    """Learned projection per head, separate for queries and keys, that starts at the identity."""

    learned = True
    use_bias = False
    weight_q: nn.Parameter
    weight_k: nn.Parameter
    bias_q: nn.Parameter | None
    bias_k: nn.Parameter | None

    def __init__(self, num_heads: int, head_dim: int, feature_dim: int | None = None, **kwargs):
        super().__init__(num_heads, head_dim, **kwargs)
        self.feature_dim = head_dim if feature_dim is None else feature_dim
        for name in ("q", "k"):
            weight = torch.empty(num_heads, head_dim, self.feature_dim)
            bias = torch.empty(num_heads, 1, self.feature_dim) if self.use_bias else None
            self.register_parameter(f"weight_{name}", nn.Parameter(weight))
            self.register_parameter(f"bias_{name}", None if bias is None else nn.Parameter(bias))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for weight, bias in ((self.weight_q, self.bias_q), (self.weight_k, self.bias_k)):
            init.copy_(weight, torch.eye(self.head_dim, self.feature_dim).expand_as(weight))
            if bias is not None:
                init.zeros_(bias)

    def affine(self, query: Tensor, key: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor, float]:
        query = _project(query, self.weight_q, self.bias_q, self.scale)
        return query, _project(self.centered(key, key_mask), self.weight_k, self.bias_k, self.scale), 1.0


class HedgehogFeatureMap(_ProjectedFeatureMap):
    """phi(x) = [softmax(Wx), softmax(-Wx)] over the features (Hedgehog, arXiv 2402.04347), twice as many."""

    nonlinearity = "softmax_pair"


class T2RFeatureMap(_ProjectedFeatureMap):
    """phi(x) = relu(Wx + b) (T2R, arXiv 2103.13076). Deviates: W starts at the identity and not at random."""

    nonlinearity = "relu"
    use_bias = True


class PowerFeatureMap(T2RFeatureMap):
    """phi(x) = relu(Wx + b)^power. The power sharpens the weights as softmax does, with half of hedgehog's features.

    The power of FLatten (arXiv 2308.00442, eq. 6), without its norms: those of queries cancel, those of keys are kept.
    """

    def __init__(self, num_heads: int, head_dim: int, power: int = 3, **kwargs):
        super().__init__(num_heads, head_dim, **kwargs)
        self.raise_to(power)


FEATURE_MAPS: dict[str, type[FeatureMap]] = {
    "elu": EluFeatureMap,
    "relu": ReluFeatureMap,
    "softmax_pair": SoftmaxPairFeatureMap,
    "hedgehog": HedgehogFeatureMap,
    "t2r": T2RFeatureMap,
    "power": PowerFeatureMap,
}


def build_feature_map(name: str, num_heads: int, head_dim: int, **kwargs) -> FeatureMap:
    """Return a feature map by its name.

    Args:
        name (`str`): One of `FEATURE_MAPS`.
        num_heads (`int`), head_dim (`int`): Shape of the attention it serves.
        kwargs: Options of that map, such as `scale`, `center_keys`, `feature_dim`.

    Raises:
        UsageError: for an unknown name or option, or a value that an option cannot have.

    Example:

    ```python
    feature_map = build_feature_map("hedgehog", num_heads=12, head_dim=64)
    query, key, value = torch.randn(3, 2, 12, 197, 64)
    output = linear_attention(query, key, value, feature_map)
    ```
    """
    check_feature_map(name, kwargs)
    return FEATURE_MAPS[name](num_heads, head_dim, **kwargs)


def check_mapped(feature_map: nn.Module, inputs: tuple[Tensor, Tensor], mapped: tuple[Tensor, Tensor]) -> None:
    """Raise `UsageError` where a feature map changes more of query and key than the last size, of both alike."""
    before, after = ([tuple(x.shape) for x in pair] for pair in (inputs, mapped))
    if [shape[:-1] for shape in after] != [shape[:-1] for shape in before] or after[0][-1] != after[1][-1]:
        raise UsageError(
            f"feature_map {type(feature_map).__name__} turns query and key of {before[0]} and {before[1]} into"
            f" {after[0]} and {after[1]}; it may change the last size alone, and of both alike."
        )


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of features, state and normalizer of `x`: float32, or float64 if it is."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _project(x: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """`(batch, heads, tokens, head_dim)` times the scale and a weight per head, `(heads, head_dim, features)`."""
    if weight.device != x.device:  # what comes of "meta" has no memory that a backend could read
        raise UsageError(
            f"feature_map has weights on {weight.device} and gets queries and keys on {x.device}; load them, or move"
            " the model there."
        )
    if scale != 1.0:  # the smaller of the two factors
        weight = weight.to(accumulation_dtype(x)) * scale
    x = torch.einsum("bhnd,hdf->bhnf", x, weight.to(x.dtype))
    return x if bias is None else x + bias.to(x.dtype)
