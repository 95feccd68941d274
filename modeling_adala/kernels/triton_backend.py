"""Linear attention on a GPU with the kernels of `triton_kernels.py`, as one operator that compilers see whole.

Next to `fla-org/flash-bidirectional-linear-attention`:

- the feature map, its scale, the mask and the division run in registers, and strides are taken as they come: each pass
  reads its inputs and writes its outputs once, two launches forward and two backward, and copies nothing;
- tokens are cut into as many parts as the card has room for, so that batch 1 fills it; tiles do not depend on the
  number of tokens, and kernels take that at run time: nothing is compiled or tuned again for another resolution;
- scratch is one float32 record of the state per part (`features x value_dim`), forward and backward, for any N;
- any head dim: tiles are the next power of two and loads are masked. At 72 to 96 that is idle arithmetic, but no idle
  traffic, and traffic bounds these kernels (a 128 x 128 tile at 72: about 110 operations per byte, of the 295 that an
  H100 can do meanwhile);
- state, normalizer and division in float32. Products of 16-bit values run in bfloat16, float16 included, because
  features and gradients outgrow the range of float16; those of float32 values in three tf32 products each;
- key-padding masks, packed sequences, Nq != Nk, other value dims, `torch.compile`, `torch.export`, CUDA graphs.

Nothing here has been timed on a GPU yet: tiles and numbers of parts follow from the arithmetic above and from what
`ptxas` says of registers and shared memory.
"""

import functools
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

PHI = ("elu", "relu", "relu2", "relu3", "relu4", "identity")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

WAVES = 2
"""Programs per multiprocessor that a launch has at most, unless images and heads alone are more. It holds one or two
at a time, by the registers: one program more would run alone, after all others. Many more would read and write more
records than they hide latency."""

MAX_PARTS = 64

# For products in 16 and in 32 bits: features at most; numbers in a tile of the state; tokens in a block; warps; stages
# of the pipeline. `ptxas` then spills hardly a register, and shared memory fits the smallest cards (99 KB).
TILES: dict[str, dict[int, tuple[tuple[int, ...], ...]]] = {
    "forward": {
        16: ((64, 64 * 64, 64, 4, 3), (128, 128 * 128, 64, 8, 3), (512, 128 * 128, 32, 8, 2)),
        32: ((128, 64 * 64, 32, 4, 2), (256, 64 * 64, 16, 8, 2)),
    },
    "backward": {
        16: ((64, 64 * 64, 64, 8, 3), (128, 128 * 128, 32, 8, 2), (512, 128 * 128, 16, 8, 2)),
        32: ((64, 64 * 64, 32, 8, 2), (128, 64 * 64, 16, 8, 2), (256, 64 * 64, 16, 8, 1)),
    },
}


@functools.cache
def _kernels() -> SimpleNamespace:
    """Return the kernels, imported at the first use: triton is optional, and takes its time."""
    from .triton_kernels import key_gradient_kernel, output_kernel, query_gradient_kernel, state_kernel, tl

    return SimpleNamespace(
        state=state_kernel,
        output=output_kernel,
        query_gradient=query_gradient_kernel,
        key_gradient=key_gradient_kernel,
        bfloat16=tl.bfloat16,
        float32=tl.float32,
    )


@functools.cache
def interpreted() -> bool:
    """Return whether Triton's interpreter runs the kernels (`TRITON_INTERPRET=1` when triton was imported)."""
    return type(_kernels().state).__name__ == "InterpretedFunction"


@functools.cache
def unavailable(device_type: str = "cuda") -> str | None:
    """Return why the kernels cannot run on this kind of device, in words, or `None` if they can."""
    try:
        _kernels()
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    if interpreted():
        return None
    if device_type != "cuda":
        return f"Triton has no code for {device_type}"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return "the GPU is older than Ampere, and has no bfloat16"
    return None


def unsupported(query: Tensor, key: Tensor, value: Tensor, phi: str) -> str | None:
    """Return what the kernels do not support in this call, in words, or `None`; from shapes and dtypes alone."""
    if phi not in PHI:
        return f"the feature map {phi!r}"
    widest = 256 if value.dtype == torch.float32 else 512
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dtype not in DTYPES:
            return f"{name} in {x.dtype}"
        if x.shape[-1] > widest:
            return f"{name} of width {x.shape[-1]} (at most {widest}) with value in {value.dtype}"
    return None


def linear_attention_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    phi: str,
    scale: float,
    key_mask: Tensor | None,
    eps: float,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Return linear attention, differentiable once. Autocast leaves it alone: inputs keep the dtypes they have.

    Args:
        query (`Tensor`): `(batch, heads, query_tokens, features)`, any strides.
        key (`Tensor`): `(batch, heads, tokens, features)`.
        value (`Tensor`): `(batch, heads, tokens, value_dim)`. Its dtype decides that of the products.
        phi (`str`): One of `PHI`. With `"identity"`, query and key are features already.
        scale (`float`): Factor on query and key before phi.
        key_mask (`Tensor`, *optional*): `(batch, tokens)` bool, True for real tokens. An image without any gets zeros.
        eps (`float`): Added to the normalizer.
        cu_seqlens (`Tensor`, *optional*): `(sequences + 1,)` int32, from 0 to `tokens`: where packed sequences begin
            and end. The batch is 1, and attention stays within each sequence.

    Returns:
        `Tensor`: `(batch, heads, query_tokens, value_dim)` in the dtype of `value`, a view of `(batch, query_tokens,
        heads, value_dim)` memory.
    """
    output, _ = linear_attention_op(query, key, value, phi, scale, key_mask, eps, cu_seqlens)
    return output


@torch.library.custom_op("adala::linear_attention", mutates_args=())
def linear_attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    phi: str,
    scale: float,
    key_mask: Tensor | None,
    eps: float,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the output, and one record per image and head, which the backward pass reads."""
    plan = _Plan(query, value, phi, cu_seqlens, "forward")
    output, totals = _empty_outputs(query, value, plan.images)
    heads, query_tokens, tokens = query.shape[1], query.shape[2], key.shape[2]
    splits = plan.parts(tokens, plan.chunks)
    parts = plan.parts(query_tokens, plan.chunks, splits)
    records = plan.records(splits)
    if totals.numel() == 0:
        return output, totals
    with torch.cuda.device_of(query):
        _kernels().state[plan.images * heads, splits, plan.chunks](
            *(key, value, key_mask, cu_seqlens, records, scale, tokens, heads, splits),
            *plan.strides(key, value, key_mask),
            **plan.options,
        )
        _kernels().output[plan.images * heads, parts, plan.chunks](
            *(query, cu_seqlens, records, totals, output, scale, eps, query_tokens, heads, splits, parts),
            *plan.strides(query, output),
            **plan.options,
        )
    return output, totals


@torch.library.custom_op("adala::linear_attention_backward", mutates_args=())
def linear_attention_backward_op(
    output_gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    totals: Tensor,
    phi: str,
    scale: float,
    key_mask: Tensor | None,
    eps: float,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value."""
    plan = _Plan(query, value, phi, cu_seqlens, "backward")
    query_gradient, key_gradient, value_gradient = (_empty_like(x) for x in (query, key, value))
    heads, query_tokens, tokens = query.shape[1], query.shape[2], key.shape[2]
    splits = plan.parts(query_tokens)
    parts = plan.parts(tokens, readers_of=splits)
    records = plan.records(splits)
    if totals.numel() > 0:
        with torch.cuda.device_of(query):
            _kernels().query_gradient[plan.images * heads, splits](
                *(query, output_gradient, cu_seqlens, totals, records, query_gradient),
                *(scale, eps, query_tokens, heads, splits),
                *plan.strides(query, output_gradient, query_gradient),
                **plan.options,
                CHUNKS=plan.chunks,
                FUSED=plan.fused,
            )
            _kernels().key_gradient[plan.images * heads, parts](
                *(key, value, key_mask, cu_seqlens, totals, records, key_gradient, value_gradient),
                *(scale, tokens, heads, splits, parts),
                *plan.strides(key, value, key_mask, key_gradient, value_gradient),
                **plan.options,
                CHUNKS=plan.chunks,
            )
    return query_gradient, key_gradient, value_gradient


@linear_attention_op.register_fake
def _(query, key, value, phi, scale, key_mask, eps, cu_seqlens):
    return _empty_outputs(query, value, query.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1)


@linear_attention_backward_op.register_fake
def _(output_gradient, query, key, value, totals, phi, scale, key_mask, eps, cu_seqlens):
    return _empty_like(query), _empty_like(key), _empty_like(value)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    query, key, value, ctx.phi, ctx.scale, key_mask, ctx.eps, cu_seqlens = inputs
    ctx.save_for_backward(query, key, value, output[1], key_mask, cu_seqlens)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, output_gradient: Tensor | None, _: Tensor | None) -> tuple:
    if output_gradient is None:
        return (None,) * 8
    query, key, value, totals, key_mask, cu_seqlens = ctx.saved_tensors
    gradients = linear_attention_backward_op(
        output_gradient, query, key, value, totals, ctx.phi, ctx.scale, key_mask, ctx.eps, cu_seqlens
    )
    return *gradients, None, None, None, None, None


linear_attention_op.register_autograd(_backward, setup_context=_save)


def _empty_outputs(query: Tensor, value: Tensor, images: int) -> tuple[Tensor, Tensor]:
    batch, heads, query_tokens, features = query.shape
    output = value.new_empty(batch, query_tokens, heads, value.shape[-1]).transpose(1, 2)
    return output, value.new_empty(images, heads, record_numel(features, value.shape[-1]), dtype=torch.float32)


def _empty_like(x: Tensor) -> Tensor:
    """Return `(batch, heads, tokens, dim)` as a view of `(batch, tokens, heads, dim)`, as projections read it."""
    batch, heads, tokens, dim = x.shape
    return x.new_empty(batch, tokens, heads, dim).transpose(1, 2)


def record_numel(features: int, value_dim: int) -> int:
    """Return the size of a record (see `triton_kernels.py`). The count takes four, which keeps records aligned."""
    return features * value_dim + features + value_dim + 4


class _Plan:
    """Tiles and parts of a call."""

    def __init__(self, query: Tensor, value: Tensor, phi: str, cu_seqlens: Tensor | None, direction: str):
        self.device, self.packed = query.device, cu_seqlens is not None
        self.images = query.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.heads, self.features, self.value_dim = query.shape[1], query.shape[-1], value.shape[-1]
        self.record = record_numel(self.features, self.value_dim)
        bits = 32 if value.dtype == torch.float32 else 16
        block_f, block_v = (max(_power_of_two(width), 16) for width in (self.features, self.value_dim))
        _, tile, self.block_n, warps, stages = next(t for t in TILES[direction][bits] if block_f <= t[0])
        block_v = max(min(block_v, tile // block_f), 16)
        self.chunks = -(-self.value_dim // block_v)
        self.options = {
            "PHI": phi,
            "F": self.features,
            "V": self.value_dim,
            "RECORD": self.record,
            "DOT": _kernels().float32 if bits == 32 else _kernels().bfloat16,
            "INTERPRETED": interpreted(),
            "BLOCK_N": self.block_n,
            "BLOCK_F": block_f,
            "BLOCK_V": block_v,
            "num_warps": warps,
            "num_stages": stages,
        }
        # where a warp reads operands from registers, two products in one loop need more of them than there are
        self.fused = bits == 16 and block_f <= (128 if _wgmma(self.device) else 64)

    def parts(self, tokens: int, chunks: int = 1, readers_of: int = 1) -> int:
        """Return into how many parts to cut the tokens of an image, for up to `WAVES` programs per multiprocessor.

        A part is worth its record: it reads more than it writes, and than it reads of `readers_of` records.
        """
        if self.packed:
            tokens = tokens // max(self.images, 1)  # on average; how many each has, the GPU alone knows
        programs = self.images * self.heads * chunks
        wanted = WAVES * _multiprocessors(self.device) // max(programs, 1)
        return max(min(wanted, tokens // max(self.features * max(4, readers_of // 2), self.block_n), MAX_PARTS), 1)

    def records(self, splits: int) -> Tensor:
        shape = (self.images * self.heads * splits, self.record)
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def strides(self, *tensors: Tensor | None) -> list[int]:
        """Return all strides; 0 for the sequences of a packed batch, whose tokens `cu_seqlens` finds."""
        strides: list[int] = []
        for x in tensors:
            own = (0, 0) if x is None else x.stride()
            strides += (0, *own[1:]) if self.packed else own
        return strides


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    """Return the multiprocessors of a card; few for the interpreter, to cut even its small inputs into parts."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


@functools.cache
def _wgmma(device: torch.device) -> bool:
    """Return whether products read their operands from shared memory (Hopper, and Blackwell in data centers)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10)
