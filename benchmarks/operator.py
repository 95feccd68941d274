"""The operator beside SDPA, plain PyTorch and a peer library, and its distance to the floor.

    python -m benchmarks.operator            some minutes; on a GPU the shapes of a GPU, into operator-cuda.json
    python -m benchmarks.operator --smoke    seconds

On a CPU, one layer of a ViT-B. Everything that is compared at a shape runs in turns.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modeling_adala import build_feature_map
from modeling_adala.errors import AdaLAError
from modeling_adala.feature_maps import FeatureMap
from trainers.runs.timing import time_in_turns
from vit_adala.benchmark.cases import LINEAR, timing_columns
from vit_adala.benchmark.floor import DEFINITION, Floor, measure_floor, operator_work
from vit_adala.benchmark.operators import (
    BOUNDS,
    PLAIN,
    SDPA,
    Operator,
    check_operator,
    operator_inputs,
    operators,
    pass_of,
)

from .common import dtype_name, floor_columns, floor_facts, parser, progress, write_result

COMPILED, PEER = "linear, compiled", "flash_bla"
# quadratic in the tokens: on a CPU, more would take most of the time of the run
SDPA_TOKENS = {("forward", torch.bfloat16): 16385}
FEWER_SDPA_TOKENS = 4097
FORWARD, BACKWARD = "forward", "forward and backward"


@dataclass(frozen=True)
class Shape:
    """One measurement, of everything in `names` side by side."""

    batch: int
    heads: int
    tokens: int
    head_dim: int
    dtype: torch.dtype
    names: tuple[str, ...]
    feature_map: str = "elu"
    passes: str = FORWARD


def cpu_shapes() -> list[Shape]:
    everything = (LINEAR, PLAIN, SDPA)
    shapes = [
        Shape(1, 12, tokens, 64, dtype, (*everything, *names), passes=passes)
        for dtype in (torch.bfloat16, torch.float32)
        for passes, names in ((FORWARD, (COMPILED,)), (BACKWARD, ()))
        for tokens in (197, 1025, 4097, 16385)
    ]
    return shapes + [
        Shape(1, 12, tokens, 64, torch.bfloat16, (LINEAR, PLAIN, SDPA), name, passes)
        for name in ("relu", "hedgehog")
        for passes in (FORWARD, BACKWARD)
        for tokens in (197, 1025, 4097)
    ]


def gpu_shapes() -> list[Shape]:
    return [
        Shape(batch, 16, tokens, head_dim, torch.bfloat16, (LINEAR, PLAIN, SDPA, PEER), passes=passes)
        for batch in (1, 8)
        for head_dim in (64, 72, 80)
        for passes in (FORWARD, BACKWARD)
        for tokens in (1024, 2048, 4096, 8192, 16384, 32768)
    ]


def smoke_shapes() -> list[Shape]:
    names = (LINEAR, PLAIN, SDPA)
    return [
        Shape(1, 2, 17, 8, torch.bfloat16, names),
        Shape(1, 2, 33, 8, torch.float32, names, passes=BACKWARD),
        Shape(1, 2, 17, 8, torch.bfloat16, (LINEAR, PLAIN, SDPA), "hedgehog"),
    ]


def main() -> None:
    options = parser(__doc__)
    args = options.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = smoke_shapes() if args.smoke else gpu_shapes() if device == "cuda" else cpu_shapes()
    scale, seconds = (0.05, 0.02) if args.smoke else (1.0, 0.3)
    floors = {dtype: measure_floor(dtype, device, scale) for dtype in dict.fromkeys(shape.dtype for shape in shapes)}
    peer, why_not = load_peer(device)
    rows = []
    for shape in progress(shapes, "operator"):
        rows += measure(shape, device, floors[shape.dtype], peer, seconds)
    write_result(
        "operator",
        rows,
        smoke=args.smoke,
        output=args.output,
        device=device,
        subject=f"Attention without its projections; peer library {why_not}",
        bounds={dtype_name(dtype): bound for dtype, bound in BOUNDS.items()},
        floors=floor_facts({dtype_name(dtype): floor for dtype, floor in floors.items()}),
        floor_definition=DEFINITION,
    )


def measure(
    shape: Shape, device: str, floor: Floor, peer: Callable[..., Tensor] | None, seconds: float
) -> list[dict[str, Any]]:
    """Return one row per operator that can run at this shape. Ours is checked first, values and gradients."""
    backward = shape.passes == BACKWARD
    phi = build_feature_map(shape.feature_map, shape.heads, shape.head_dim).to(device)
    inputs = operator_inputs(
        shape.batch, shape.heads, shape.tokens, shape.head_dim, shape.dtype, device, requires_grad=backward
    )
    chosen = _operators(shape, phi, peer)
    errors = {
        name: check_operator(chosen[name], inputs, phi, backward) for name in chosen if name in (LINEAR, COMPILED)
    }
    limit = SDPA_TOKENS.get((shape.passes, shape.dtype), FEWER_SDPA_TOKENS)
    if device == "cpu" and shape.tokens > limit:
        chosen.pop(SDPA, None)
    runs = {name: pass_of(operator, inputs, backward) for name, operator in chosen.items()}
    timings = time_in_turns(runs, device, seconds)
    rows = []
    for name, timing in timings.items():
        features = shape.tokens if name == SDPA else phi(inputs[0][:, :, :1], inputs[1][:, :, :1])[0].shape[-1]
        flops, bytes_moved = operator_work(inputs[0], inputs[2], features, backward)
        rows.append(
            {
                "name": name,
                "feature_map": shape.feature_map,
                "pass": shape.passes,
                "dtype": dtype_name(shape.dtype),
                "batch": shape.batch,
                "heads": shape.heads,
                "tokens": shape.tokens,
                "head_dim": shape.head_dim,
                **timing_columns(timing),
                **floor_columns(floor, timing, flops, bytes_moved),
                "bytes_moved": bytes_moved,
                "relative_error": errors.get(name),
            }
        )
    return rows


def load_peer(device: str) -> tuple[Callable[..., Tensor] | None, str]:
    """Return fla-org/flash-bidirectional-linear-attention where it is importable, and a word on why not."""
    if device != "cuda":
        return None, "not compared: it needs CUDA"
    try:
        from flash_bla.ops.linear_attn.fused import linear_attention
    except ImportError as error:
        return None, f"not compared: {error}"
    return linear_attention, "compared"


def _operators(shape: Shape, phi: FeatureMap, peer: Callable[..., Tensor] | None) -> dict[str, Operator]:
    chosen = {name: operator for name, operator in operators(phi).items() if name in shape.names}
    if COMPILED in shape.names:
        chosen[COMPILED] = torch.compile(chosen[LINEAR], fullgraph=True, dynamic=True)
    if PEER in shape.names and peer is not None and (shape.passes == FORWARD or shape.head_dim == 64):
        # its kernels want features, contiguous; its backward pass only takes powers of two
        def with_peer(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            features = phi(query, key)
            return peer(*(x.to(value.dtype).contiguous() for x in (*features, value)))

        chosen[PEER] = with_peer
    return chosen


if __name__ == "__main__":
    try:
        main()
    except AdaLAError as error:
        raise SystemExit(f"operator: {error}") from error
