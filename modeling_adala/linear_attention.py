"""Non-causal linear attention: feature maps, the operator, and its quadratic twin.

Canonical form (Katharopoulos et al. 2020, arXiv 2006.16236, eq. 5), with the state written as a mean over the tokens:

    S = (1/N) phi(K)^T V        z = (1/N) phi(K)^T 1        out_i = phi(q_i) S / (phi(q_i) z + eps)

`linear_attention` costs O(N); `linear_attention_reference` computes the same from the N x N weights. It is the
documentation, the oracle of the tests and what draws attention maps.

This file travels with the weights (`trust_remote_code`): torch, transformers and flat siblings only.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .errors import UsageError


class FeatureMap(nn.Module):
    """Turns queries and keys into the non-negative features whose dot products replace the softmax kernel.

    A subclass implements `phi`. Query and key arrive in float32 (float64 if they were) as `(batch, heads, tokens,
    head_dim)` and leave as `(batch, heads, tokens, features)`.

    Args:
        num_heads (`int`): Number of heads; learned maps hold weights per head.
        head_dim (`int`): Width of one head.
        scale (`float`, *optional*): Factor on queries and keys. Default: 1, or `head_dim ** -0.25` for `exp`, where
            the product of a query and a key feature then carries softmax's `head_dim ** -0.5`.
        center_keys (`bool`, *optional*, defaults to `False`): Subtract each image's mean key first. Softmax does not
            see a shift that all keys share, but phi does.
    """

    learned = False
    eps = 1e-6

    def __init__(self, num_heads: int, head_dim: int, scale: float | None = None, center_keys: bool = False):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.scale = self.default_scale(head_dim) if scale is None else scale
        self.center_keys = center_keys

    @staticmethod
    def default_scale(head_dim: int) -> float:
        return 1.0

    def forward(self, query: Tensor, key: Tensor, key_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Features of queries and keys. `key_mask` is `(batch, tokens)`, True for real tokens; theirs alone count."""
        if self.center_keys:
            key = key - _masked_mean(key, key_mask)
        if self.scale != 1.0:
            query, key = query * self.scale, key * self.scale
        return self.features(query, key, key_mask)

    def features(self, query: Tensor, key: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.phi(query), self.phi(key)

    def phi(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Sets learned parameters to their neutral value; nothing to do where there are none."""


class EluFeatureMap(FeatureMap):
    """phi(x) = elu(x) + 1 (Katharopoulos et al. 2020, eq. 7)."""

    def phi(self, x: Tensor) -> Tensor:
        # elu(x) + 1 would round exp(x) - 1 and lose the negative tail; the minimum keeps the unused branch of the
        # gradient finite.
        return torch.where(x > 0, x + 1, torch.exp(x.clamp(max=0)))


class ReluFeatureMap(FeatureMap):
    """phi(x) = max(x, 0) (EfficientViT, arXiv 2205.14756). A query that is all negative attends to nothing."""

    def phi(self, x: Tensor) -> Tensor:
        return torch.relu(x)


class ExpFeatureMap(FeatureMap):
    """phi(x) = exp(x), stabilized so that nothing overflows and the normalizer is at least 1/N.

    With m_f the largest key in feature f, phi(k)_f = exp(k_f - m_f) and phi(q)_f = exp(q_f + m_f - c), where c is the
    query's own maximum of q_f + m_f. Both shifts cancel between numerator and normalizer.
    """

    eps = 1e-12  # the normalizer cannot vanish, and at N = 10^6 its floor is 1e-6

    @staticmethod
    def default_scale(head_dim: int) -> float:
        return head_dim**-0.25

    def features(self, query: Tensor, key: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        if key_mask is not None:
            key = key.masked_fill(~key_mask[:, None, :, None], torch.finfo(key.dtype).min)
        key_max = key.amax(dim=2, keepdim=True).detach()
        query = query + key_max
        query_max = query.amax(dim=-1, keepdim=True).detach()
        return torch.exp(query - query_max), torch.exp(key - key_max)


class _ProjectedFeatureMap(FeatureMap):
    """A learned projection per head, separate for queries and keys, that starts at the identity."""

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

    def features(self, query: Tensor, key: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        query = _project(query, self.weight_q, self.bias_q)
        return self.phi(query), self.phi(_project(key, self.weight_k, self.bias_k))


class HedgehogFeatureMap(_ProjectedFeatureMap):
    """phi(x) = [softmax(Wx), softmax(-Wx)] over the features (Hedgehog, arXiv 2402.04347), twice as many."""

    def phi(self, x: Tensor) -> Tensor:
        return torch.cat((torch.softmax(x, dim=-1), torch.softmax(-x, dim=-1)), dim=-1)


class T2RFeatureMap(_ProjectedFeatureMap):
    """phi(x) = relu(Wx + b) (T2R, arXiv 2103.13076). Deviates: W starts at the identity and not at random."""

    use_bias = True

    def phi(self, x: Tensor) -> Tensor:
        return torch.relu(x)


FEATURE_MAPS: dict[str, type[FeatureMap]] = {
    "elu": EluFeatureMap,
    "relu": ReluFeatureMap,
    "exp": ExpFeatureMap,
    "hedgehog": HedgehogFeatureMap,
    "t2r": T2RFeatureMap,
}


def build_feature_map(name: str, num_heads: int, head_dim: int, **kwargs) -> FeatureMap:
    """Builds a registered feature map.

    Args:
        name (`str`): One of `FEATURE_MAPS`.
        num_heads (`int`), head_dim (`int`): Shape of the attention it serves.
        kwargs: Options of that map, such as `scale`, `center_keys`, `feature_dim`.

    Raises:
        UsageError: for an unknown name or option.
    """
    if name not in FEATURE_MAPS:
        raise UsageError(f"feature_map={name!r} is unknown; choose one of {', '.join(sorted(FEATURE_MAPS))}.")
    try:
        return FEATURE_MAPS[name](num_heads, head_dim, **kwargs)
    except TypeError as error:
        raise UsageError(f"feature_map_kwargs={kwargs!r} does not fit feature_map={name!r}: {error}.") from None


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    feature_map: FeatureMap,
    key_mask: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """Linear attention in O(N) time and memory. Reads strided views as they come: no copy of query, key or value.

    Features, state, normalizer and division are float32 whatever the input (float64 if it is), also under autocast.

    Args:
        query (`Tensor`): `(batch, heads, query_tokens, head_dim)`, any strides.
        key (`Tensor`): `(batch, heads, tokens, head_dim)`.
        value (`Tensor`): `(batch, heads, tokens, value_dim)`.
        feature_map (`FeatureMap`): phi.
        key_mask (`Tensor`, *optional*): `(batch, tokens)`, True for real tokens. An image without any gets zeros.
        eps (`float`, *optional*): Added to the normalizer. Default: the feature map's own, 1e-6 (1e-12 for `exp`).

    Returns:
        `Tensor`: `(batch, heads, query_tokens, value_dim)` in the dtype of `value`, a view of `(batch, query_tokens,
        heads, value_dim)` memory, which is how an output projection reads it.
    """
    eps = feature_map.eps if eps is None else eps
    dtype, output_dtype = _accumulation_dtype(query), value.dtype
    with _no_autocast(query):
        # one by one: rotary positions leave query and key in float32 where autocast has value in bfloat16
        query, key, value = (_cast(x, dtype) for x in (query, key, value))
        phi_q, phi_k = feature_map(query, key, key_mask)
        phi_k, count = _mask_keys(phi_k, key_mask)
        normalizer = phi_k.sum(dim=2) / count
        state = _matmul(phi_k.transpose(2, 3), value) / count[..., None]
        # one product gives numerator and normalizer
        output = _matmul(phi_q, torch.cat((state, normalizer[..., None]), dim=-1))
        output = output[..., :-1] / (output[..., -1:] + eps)
    output = output.transpose(1, 2).to(output_dtype, memory_format=torch.contiguous_format)
    return output.contiguous().transpose(1, 2)  # `to` alone leaves a tensor that has the dtype already as it is


def linear_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    feature_map: FeatureMap,
    key_mask: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """The same as `linear_attention` from the explicit weights, O(N^2). Arguments and result are the same."""
    weights = attention_weights(query, key, feature_map, key_mask, eps)
    return (weights @ value.to(weights.dtype)).to(value.dtype)


def attention_weights(
    query: Tensor, key: Tensor, feature_map: FeatureMap, key_mask: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """The weights that linear attention applies, `(batch, heads, query_tokens, tokens)`: rows sum to just below 1."""
    eps = feature_map.eps if eps is None else eps
    with _no_autocast(query):
        dtype = _accumulation_dtype(query)
        phi_q, phi_k = feature_map(query.to(dtype), key.to(dtype), key_mask)
        phi_k, count = _mask_keys(phi_k, key_mask)
        scores = phi_q @ phi_k.transpose(2, 3) / count[..., None]
        return scores / (scores.sum(dim=-1, keepdim=True) + eps)


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    # the cast writes a new tensor anyway: in the layout that one batched product takes
    return x if x.dtype == dtype else x.to(dtype, memory_format=torch.contiguous_format)


def _no_autocast(x: Tensor) -> AbstractContextManager:
    """Autocast switched off, where the device has one ("meta" has none)."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` over `(batch, heads)` without a copy of either.

    `torch.matmul` would first copy (B, H, N, D) views of (B, N, H, D) memory, whose batch strides do not merge into
    one. Head by head they do.
    """
    if all(x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1) for x in (a, b)):
        return torch.matmul(a, b)
    heads = [torch.bmm(x, y) for x, y in zip(a.unbind(1), b.unbind(1), strict=True)]
    return torch.stack(heads, dim=2).transpose(1, 2)


def _mask_keys(phi_k: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Zeroes the features of padding and counts the real tokens, as `(batch or 1, 1, 1)`."""
    if key_mask is None:
        return phi_k, phi_k.new_ones(1, 1, 1) * phi_k.shape[2]
    count = key_mask.sum(dim=1).clamp(min=1).to(phi_k.dtype)[:, None, None]
    return phi_k.masked_fill(~key_mask[:, None, :, None], 0), count


def _masked_mean(key: Tensor, key_mask: Tensor | None) -> Tensor:
    key, count = _mask_keys(key, key_mask)
    return key.sum(dim=2, keepdim=True) / count[..., None]


def _project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`(batch, heads, tokens, head_dim)` times a weight per head, `(heads, head_dim, features)`."""
    x = torch.einsum("bhnd,hdf->bhnf", x, weight.to(x.dtype))
    return x if bias is None else x + bias.to(x.dtype)
