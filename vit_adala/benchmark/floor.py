"""The floor: what the machine itself allows, measured on it in the same run.

    floor = max(bytes moved / copy bandwidth, FLOPs / matrix throughput)

The operator must read query, key and value and write the output once; its FLOPs are its two matrix products. For a
whole model the FLOPs alone count. Copy bandwidth is that of a copy too large for any cache, its bytes read and written
both counted, so a case that fits a cache can beat it; matrix throughput is the best of a few square products.
"""

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
_PRODUCT_SECONDS = 1.0
_MATRIX_SIDES = {"cpu": (512, 1024, 2048), "cuda": (2048, 4096, 8192)}


@dataclass(frozen=True)
class Floor:
    """What a machine can do at best.

    Args:
        bandwidth (`float`): Bytes per second of a large copy, read and written counted.
        throughput (`float`): FLOPs per second of the best square matrix product in `dtype`.
        dtype (`str`): Such as `"bfloat16"`.
    """

    bandwidth: float
    throughput: float
    dtype: str

    def seconds(self, flops: float, bytes_moved: float = 0.0) -> float:
        """Shortest time in which that much can be done."""
        return max(flops / self.throughput, bytes_moved / self.bandwidth)

    def __str__(self) -> str:
        return (
            f"copy bandwidth {self.bandwidth / 1e9:.1f} GB/s, matrix throughput {self.throughput / 1e9:,.0f} GFLOP/s"
            f" in {self.dtype}"
        )


@dataclass(frozen=True)
class OperatorWork:
    """What an attention operator with a linear state has to do at least; see `DEFINITION`.

    Args:
        flops (`int`): Of matrix products.
        bytes_moved (`int`): Between memory and processor.
    """

    flops: int
    bytes_moved: int

    @classmethod
    def of(cls, query: torch.Tensor, value: torch.Tensor, features: int, backward: bool) -> "OperatorWork":
        """Of `(batch, heads, tokens, head_dim)` tensors, key like query, and `features` per head after the map."""
        product = 2 * query[..., 0].numel() * features * value.shape[-1]
        products, tensors = (6, 11) if backward else (2, 4)
        return cls(products * product, tensors * query.numel() * query.element_size())


def measure_floor(dtype: torch.dtype, device: torch.device | str = "cpu", scale: float = 1.0) -> Floor:
    """Measures both, which takes some seconds.

    Args:
        dtype (`torch.dtype`): Of the matrix product.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`).
        scale (`float`, *optional*, defaults to 1): Below 1, smaller copies and products: for tests.
    """
    kind = torch.device(device).type
    source = torch.ones(int(_COPY_BYTES[kind] * scale), dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    copied = time_in_turns({"copy": lambda: target.copy_(source)}, device, seconds=1.0)["copy"]
    throughput = 0.0
    for side in _MATRIX_SIDES[kind]:
        side = max(16, int(side * scale))
        left, right = torch.randn(2, side, side, device=device).to(dtype)
        # the best quartile and not the median: a floor that noise has raised would flatter us
        seconds = time_in_turns({"product": partial(torch.matmul, left, right)}, device, seconds=0.3)["product"].lower
        throughput = max(throughput, 2 * side**3 / seconds)
        if 8 * seconds > _PRODUCT_SECONDS:  # the next one; a dtype without hardware of its own (float16 on most CPUs)
            break
    return Floor(2 * source.numel() / copied.lower, throughput, str(dtype).removeprefix("torch."))
