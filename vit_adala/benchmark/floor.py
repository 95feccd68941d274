"""Floor of a machine: the shortest time that it allows, measured on it in the same run; see `DEFINITION`."""

from dataclasses import dataclass
from functools import partial

import torch

from trainers.runs.timing import time_in_turns

DEFINITION = (
    "floor = max(bytes / copy bandwidth, FLOPs / matrix throughput), both measured in this run. Operator: query, key,"
    " value read and output written once, and its two matrix products (backward pass: query, key, value and the"
    " gradient of the output read, three gradients written, and four more products). Whole model: FLOPs alone, of"
    " matrix products and convolutions (backward pass: twice as many). Bandwidth is that of a copy too large for a"
    " cache; a case that fits one can beat it."
)
_COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}
_PRODUCT_SECONDS = 1.0  # a dtype without hardware of its own, such as float16 on most CPUs, would take minutes
_MATRIX_SIDES = {"cpu": (512, 1024, 2048), "cuda": (2048, 4096, 8192)}


@dataclass(frozen=True)
class Floor:
    """Peak rates of a machine.

    Args:
        bandwidth (`float`): Bytes per second of a large copy, bytes read and written both counted.
        throughput (`float`): FLOPs per second of the best square matrix product in `dtype`.
        dtype (`str`): Such as `"bfloat16"`.
    """

    bandwidth: float
    throughput: float
    dtype: str

    def seconds(self, flops: float, bytes_moved: float = 0.0) -> float:
        """Return the shortest time in which that much work can be done."""
        return max(flops / self.throughput, bytes_moved / self.bandwidth)

    def __str__(self) -> str:
        return (
            f"copy bandwidth {self.bandwidth / 1e9:.1f} GB/s, matrix throughput {self.throughput / 1e9:,.0f} GFLOP/s"
            f" in {self.dtype}"
        )


def operator_work(query: torch.Tensor, value: torch.Tensor, features: int, backward: bool) -> tuple[int, int]:
    """Return the least FLOPs and bytes moved of an attention operator with a linear state; see `DEFINITION`.

    Args:
        query (`torch.Tensor`), value (`torch.Tensor`): `(batch, heads, tokens, head_dim)`; the key is like the query.
        features (`int`): Features per head after the feature map.
        backward (`bool`): Count forward and backward pass.
    """
    product = 2 * query[..., 0].numel() * features * value.shape[-1]
    products, tensors = (6, 11) if backward else (2, 4)
    return products * product, tensors * query.numel() * query.element_size()


def measure_floor(dtype: torch.dtype, device: torch.device | str = "cpu", scale: float = 1.0) -> Floor:
    """Measure bandwidth and throughput, which takes some seconds.

    Args:
        dtype (`torch.dtype`): Type of the matrix product.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): Device to measure.
        scale (`float`, *optional*, defaults to 1): Size and time of copies and products, below 1 for tests.
    """
    kind = torch.device(device).type
    source = torch.ones(int(_COPY_BYTES[kind] * scale), dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    copied = time_in_turns({"copy": lambda: target.copy_(source)}, device, seconds=scale)["copy"]
    throughput = 0.0
    for side in _MATRIX_SIDES[kind]:
        side = max(16, int(side * scale))
        left, right = torch.randn(2, side, side, device=device).to(dtype)
        # the best quartile and not the median: a floor that noise has raised would flatter us
        seconds = time_in_turns({"product": partial(torch.matmul, left, right)}, device, 0.3 * scale)["product"].lower
        throughput = max(throughput, 2 * side**3 / seconds)
        if 8 * seconds > _PRODUCT_SECONDS:  # the next one
            break
    return Floor(2 * source.numel() / copied.lower, throughput, str(dtype).removeprefix("torch."))
