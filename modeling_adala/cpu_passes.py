"""What the CPU backend does to features between its matrix products: in PyTorch, and compiled (`cpu_kernels.c`).

This file travels with the weights (`trust_remote_code`): torch, transformers and flat siblings only.
"""

import ctypes
import functools
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .feature_maps import NONLINEARITIES, accumulation_dtype

TOKENS_PER_TASK = 128
logger = logging.getLogger(__name__)

LOG2_E = math.log2(math.e)


class TorchPasses:
    """The passes in PyTorch, in float32 (float64 if the input is).

    Blocks of queries and keys are `(batch, heads, tokens, dim)` of any strides. All else is by head of an image:
    features `(batch * heads, tokens, features)` in the dtype of the block, normalizers `(batch * heads, 1, features)`,
    the largest keys, which `exp` alone has, `(batch * heads, 1, dim)`.

    Args:
        nonlinearity (`str`): See `apply_nonlinearity`.
        scale (`float`): Factor on queries and keys.
        eps (`float`): Added to the normalizer's product.
    """

    def __init__(self, nonlinearity: str, scale: float, eps: float):
        self.nonlinearity, self.scale, self.eps = nonlinearity, scale, eps

    def num_features(self, dim: int) -> int:
        """How many features come of a `dim`."""
        return 2 * dim if self.nonlinearity == "softmax_pair" else dim

    def key_features(
        self, key: Tensor, key_mask: Tensor | None, key_max: Tensor | None, normalizer: Tensor | None = None
    ) -> Tensor:
        """phi(k), zero where the `(batch, tokens)` mask is; its sum over the tokens is added to the normalizer."""
        features = self._scaled(key)
        features = self._apply(features) if key_max is None else features.sub_(key_max).exp_()
        if key_mask is not None:
            features.masked_fill_(~key_mask.repeat_interleave(key.shape[1], dim=0)[..., None], 0)
        if normalizer is not None:
            normalizer += features.sum(dim=1, keepdim=True)
        return features.to(key.dtype)

    def query_features(
        self, query: Tensor, normalizer: Tensor, eps: Tensor, key_max: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """a = phi(q) / d with d = phi(q) z + eps, and 1 / d, `(batch * heads, tokens, 1)`."""
        features = self._scaled(query)
        if key_max is None:
            features = self._apply(features)
        else:
            features += key_max
            features = features.sub_(features.amax(dim=-1, keepdim=True)).exp_()
        inverse = torch.bmm(features, normalizer.mT).add_(eps).reciprocal_()
        return features.mul_(inverse).to(query.dtype), inverse

    def query_gradient(
        self,
        features: Tensor,
        inverse: Tensor,
        products: Tensor,
        normalizer: Tensor,
        normalizer_gradient: Tensor,
        out: Tensor,
    ) -> None:
        """Writes the gradient of the queries to `out` and adds to that of the normalizer.

        With G the products of the output's gradient and the state, and c = a G: the gradient of phi(q) is
        (G - c z) / d, and that of z is the sum of -c a.
        """
        a, g = features.to(inverse.dtype), products.to(inverse.dtype)
        c = (a * g).sum(dim=-1, keepdim=True)
        normalizer_gradient -= torch.bmm(c.mT, a)
        self._chain(a / inverse, (g - c * normalizer) * inverse, out)

    def key_gradient(
        self, features: Tensor, products: Tensor, normalizer_gradient: Tensor, key_mask: Tensor | None, out: Tensor
    ) -> None:
        """Writes the gradient of the keys to `out`; `products` are those of the values and the state's gradient."""
        gradient = products.to(normalizer_gradient.dtype) + normalizer_gradient
        if key_mask is not None:
            gradient = gradient * key_mask.repeat_interleave(out.shape[1], dim=0)[..., None]
        self._chain(features.to(gradient.dtype), gradient, out)

    def fuses(self, key: Tensor, value: Tensor) -> bool:
        """Whether `attention` computes the whole result in one call."""
        return False

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None,
        eps: Tensor,
        key_max: Tensor | None,
        output: Tensor,
        keep_state: bool = False,
    ) -> tuple[Tensor, Tensor] | None:
        """Writes the whole result; for those that fuse. Returns state and normalizer for `attention_gradient`."""
        raise NotImplementedError

    def attention_gradient(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None,
        eps: Tensor,
        key_max: Tensor | None,
        state: Tensor,
        normalizer: Tensor,
        gradient: Tensor,
        out: Sequence[Tensor],
    ) -> None:
        """Writes the gradients of query, key and value to `out`, given that of the output; for those that fuse."""
        raise NotImplementedError

    def by_head(self, block: Tensor) -> Tensor:
        """`(batch, heads, tokens, dim)` as `(batch * heads, tokens, dim)`."""
        return block.flatten(0, 1)

    def _scaled(self, x: Tensor) -> Tensor:
        y = torch.empty(x.shape, dtype=accumulation_dtype(x)).copy_(x).flatten(0, 1)
        # the exponential of `elu` is taken to base 2
        factor = self.scale * LOG2_E if self.nonlinearity == "elu" else self.scale
        return y if factor == 1.0 else y.mul_(factor)

    def _apply(self, y: Tensor) -> Tensor:
        if self.nonlinearity == "elu":  # exp2 is almost three times as fast as exp here
            return y.clamp(max=0).exp2_().add_(y.relu_(), alpha=1 / LOG2_E)
        return y.relu_() if self.nonlinearity == "relu" else NONLINEARITIES[self.nonlinearity](y)

    def _chain(self, phi: Tensor, gradient: Tensor, out: Tensor) -> None:
        """Writes the gradient of the input to `out`, `(batch, heads, tokens, dim)`, given that of phi."""
        if self.nonlinearity == "elu":
            gradient = gradient * phi.clamp(max=1)
        elif self.nonlinearity == "relu":
            gradient = gradient * (phi > 0)
        elif self.nonlinearity == "exp":
            gradient = gradient * phi
        elif self.nonlinearity == "softmax_pair":
            first, second = (
                s * (g - (s * g).sum(dim=-1, keepdim=True))
                for s, g in zip(phi.chunk(2, dim=-1), gradient.chunk(2, dim=-1), strict=True)
            )
            gradient = first - second
        out.copy_((gradient * self.scale).view(out.shape))


class _Rows(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        *((f"{axis}_stride", ctypes.c_int64) for axis in ("batch", "head", "token")),
    ]


class _Job(ctypes.Structure):
    """`job_t` of cpu_kernels.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "heads", "tokens", "dim", "nonlinearity", "dtype")),
        *((name, ctypes.c_int64) for name in ("tasks", "tokens_per_task")),
        ("scale", ctypes.c_float),
        *((name, _Rows) for name in ("input", "gradient")),
        *((name, ctypes.c_void_p) for name in ("features", "products", "key_max", "mask", "normalizer")),
        *((name, ctypes.c_void_p) for name in ("normalizer_gradient", "eps", "inverse", "sums", "total")),
    ]


class _Attention(ctypes.Structure):
    """`attention_t` of cpu_fused.h."""

    _fields_ = [
        ("keys", _Job),
        *((name, ctypes.c_int64) for name in ("query_tokens", "value_dim")),
        *((name, _Rows) for name in ("query", "value", "output")),
        *((name, ctypes.c_void_p) for name in ("state", "normalizer")),
        *((name, _Rows) for name in ("output_gradient", "query_gradient", "key_gradient", "value_gradient")),
        ("workspace", ctypes.c_void_p),
    ]


class CompiledPasses(TorchPasses):
    """The passes of `cpu_kernels.c`: each reads and writes memory once. In float32 and bfloat16."""

    NONLINEARITIES = {"elu": 0, "relu": 1, "exp": 2, "softmax_pair": 3, "identity": 4}
    DTYPES = {torch.float32: 0, torch.bfloat16: 1}
    MAX_FEATURES = 1024

    @classmethod
    def supports(cls, query: Tensor, nonlinearity: str, dtype: torch.dtype) -> bool:
        """Whether they take queries of this width, in this dtype; if not, a warning says so once."""
        features = (2 if nonlinearity == "softmax_pair" else 1) * query.shape[-1]
        if dtype in cls.DTYPES and features <= cls.MAX_FEATURES:
            return True
        _warn_unsupported(f"{features} features" if features > cls.MAX_FEATURES else f"{dtype}")
        return False

    def key_features(self, key, key_mask, key_max, normalizer=None):
        features = self._new_features(key)
        mask = None if key_mask is None else key_mask.contiguous()
        self._run("key_features", key, input=key, mask=mask, key_max=key_max, features=features, total=normalizer)
        return features

    def query_features(self, query, normalizer, eps, key_max):
        features = self._new_features(query)
        inverse = eps.new_empty(len(features), query.shape[2], 1)
        tensors = {"features": features, "inverse": inverse, "normalizer": normalizer, "eps": eps}
        self._run("query_features", query, input=query, key_max=key_max, **tensors)
        return features, inverse

    def query_gradient(self, features, inverse, products, normalizer, normalizer_gradient, out):
        tensors = {"features": features, "inverse": inverse, "products": products, "normalizer": normalizer}
        self._run("query_gradient", out, gradient=out, total=normalizer_gradient, **tensors)

    def key_gradient(self, features, products, normalizer_gradient, key_mask, out):
        mask = None if key_mask is None else key_mask.contiguous()
        tensors = {"features": features, "products": products, "normalizer_gradient": normalizer_gradient}
        self._run("key_gradient", out, gradient=out, mask=mask, **tensors)

    def fuses(self, key, value):
        return bool(load_library().adala_has_fused(key.shape[-1], value.shape[-1]))

    def attention(self, query, key, value, key_mask, eps, key_max, output, keep_state=False):
        kept = None
        if keep_state:
            width, columns = (-(-x.shape[-1] // 16) * 16 for x in (key, value))  # whole vectors
            num_features = self.num_features(width)
            kept = eps.new_empty(len(eps), num_features, columns), eps.new_empty(len(eps), 1, num_features)
        self._run_fused("attention", query, key, value, key_mask, eps, key_max, kept, output=output)
        return kept

    def attention_gradient(self, query, key, value, key_mask, eps, key_max, state, normalizer, gradient, out):
        names = ("output_gradient", "query_gradient", "key_gradient", "value_gradient")
        rows = dict(zip(names, (gradient, *out), strict=True))
        kept = state, normalizer
        self._run_fused("attention_gradient", query, key, value, key_mask, eps, key_max, kept, **rows)

    def _run_fused(
        self,
        name: str,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None,
        eps: Tensor,
        key_max: Tensor | None,
        kept: tuple[Tensor, Tensor] | None,
        **rows: Tensor,
    ) -> None:
        library = load_library()
        mask = None if key_mask is None else key_mask.contiguous()
        job = _Attention(self._job(key, input=key, mask=mask, key_max=key_max, eps=eps))
        job.query_tokens, job.value_dim = query.shape[2], value.shape[-1]
        for field, tensor in {"query": query, "value": value, **rows}.items():
            setattr(job, field, _rows(tensor))
        if kept is not None:
            job.state, job.normalizer = (tensor.data_ptr() for tensor in kept)
        size = library.adala_workspace(ctypes.byref(job), name == "attention_gradient")
        workspace = torch.empty(size, dtype=torch.uint8)
        job.workspace = workspace.data_ptr()
        getattr(library, f"adala_{name}")(ctypes.byref(job))

    def by_head(self, block):
        batch, heads, tokens, dim = block.shape
        if block.is_contiguous():
            return block.flatten(0, 1)
        # a product would read heads that lie between each other, and page after page for each
        gathered = block.new_empty(batch * heads, tokens, dim)
        self._run("gather", block, input=block, features=gathered)
        return gathered

    def _new_features(self, block: Tensor) -> Tensor:
        batch, heads, tokens, dim = block.shape
        return block.new_empty(batch * heads, tokens, self.num_features(dim))

    def _run(self, name: str, block: Tensor, **tensors: Tensor | None) -> None:
        if tensors.get("total") is not None:  # every task adds up on its own
            batch, heads, tokens, dim = block.shape
            tensors["sums"] = torch.empty(batch, _tasks(tokens), heads, self.num_features(dim))
        getattr(load_library(), f"adala_{name}")(ctypes.byref(self._job(block, **tensors)))

    def _job(self, block: Tensor, **tensors: Tensor | None) -> _Job:
        batch, heads, tokens, dim = block.shape
        kind, dtype, tasks = self.NONLINEARITIES[self.nonlinearity], self.DTYPES[block.dtype], _tasks(tokens)
        job = _Job(batch, heads, tokens, dim, kind, dtype, tasks, -(-tokens // tasks), self.scale)
        for field, tensor in tensors.items():
            if tensor is not None:
                setattr(job, field, _rows(tensor) if field in ("input", "gradient") else tensor.data_ptr())
        return job


def _rows(x: Tensor) -> _Rows:
    return _Rows(x.data_ptr(), *x.stride()[:3])


@functools.cache
def _warn_unsupported(what: str) -> None:
    logger.warning("the compiled passes of backend 'cpu' do not take %s; PyTorch's own run instead.", what)


def _tasks(tokens: int) -> int:
    """In how many parts of equal length the tokens of an image are shared out."""
    threads = torch.get_num_threads()
    return max(threads * -(-tokens // (TOKENS_PER_TASK * threads)), 1)


@functools.cache
def load_library() -> Any:
    """The compiled passes, a `ctypes.CDLL`; `None` where `setup.py` could not build them."""
    for path in sorted(Path(__file__).parent.glob("_cpu_kernels*.so")):
        try:
            library = ctypes.CDLL(str(path))
        except OSError:  # built for another machine
            continue
        library.adala_workspace.restype = library.adala_has_fused.restype = ctypes.c_int64
        library.adala_has_fused.argtypes = [ctypes.c_int64, ctypes.c_int64]
        library.adala_workspace.argtypes = [ctypes.c_void_p, ctypes.c_int64]
        return library
    return None
