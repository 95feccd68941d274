"""The operator beside SDPA, plain PyTorch and a peer library, and its distance to the floor.

    python -m benchmarks.operator            some minutes; on a GPU the shapes of a GPU, into operator-cuda.json
    python -m benchmarks.operator --smoke    seconds

On a CPU, one layer of a ViT-B, on a GPU of a ViT-L or ViT-H. Everything that is compared at a shape runs in turns.
"CUDA graph" is the time of the GPU alone: a graph of ten calls, divided by ten.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from modeling_adala import build_feature_map
from modeling_adala.feature_maps import FeatureMap
from trainers.base_config import has_fast_bf16
from trainers.runs.timing import time_in_turns
from vit_adala.benchmark.cases import LINEAR, graph_of, timing_columns
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

from .common import (
    Row,
    Run,
    device,
    dtype_name,
    floor_columns,
    floor_facts,
    measure_all,
    one_line,
    parser,
    prepare_all,
    run_script,
)

GRAPH = ", CUDA graph"
# the peer with the work of ours, and with features that were computed before; its kernels want them contiguous
PEER, PEER_BARE = "flash_bla", "flash_bla, features given"
FORWARD, BACKWARD = "forward", "forward and backward"
GRAPH_CALLS = 10
# of 144 of each kernel, which it would compile and time anew for each number of tokens, for minutes
PEER_TILES: dict[str, Any] = {"BL": (64, 128), "num_warps": (2, 4), "num_stages": (2, 4)}


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

    def __str__(self) -> str:
        sizes = f"{self.batch}x{self.heads}x{self.tokens}x{self.head_dim}"
        beside = f", beside {PEER}" if PEER in self.names else ""
        return f"{sizes} {dtype_name(self.dtype)} {self.feature_map} {self.passes}{beside}"


def cpu_shapes() -> list[Shape]:
    """Return the default map, what it is when it is folded into the projections, and the map of the paper."""
    dtypes = (torch.bfloat16, torch.float32) if has_fast_bf16() else (torch.float32,)
    return [
        Shape(batch, 12, tokens, 64, dtype, (LINEAR, PLAIN, SDPA), name, passes)
        for dtype in dtypes
        for name in ("power", "relu", "elu")
        for passes in (FORWARD, BACKWARD)
        for batch, tokens in ((1, 197), (1, 1025), (1, 4097), (8, 197))
    ]


def gpu_shapes() -> list[Shape]:
    """Return what was asked for first, then what the time is enough for."""

    def shape(batch: int, tokens: int, passes: str = FORWARD, head_dim: int = 64, name: str = "elu") -> Shape:
        captured = (LINEAR + GRAPH, SDPA + GRAPH) if passes == FORWARD else ()
        names = (LINEAR, PLAIN, SDPA, *captured)
        return Shape(batch, 16, tokens, head_dim, torch.bfloat16, names, name, passes)

    tokens = (16384, 1024, 4096, 2048, 8192, 32768)
    both = (FORWARD, BACKWARD)
    shapes = [shape(batch, count, passes) for count in tokens for batch in (8, 1) for passes in both]
    peer = [Shape(8, 16, 16384, 64, torch.bfloat16, (LINEAR, PEER), passes=passes) for passes in both]
    shapes[2:2] = peer  # beside the figures that it is asked to be compared with
    shapes += [shape(batch, 4096, passes, name="power") for batch in (1, 8) for passes in both]
    shapes += [shape(8, count, passes, dim) for dim in (80, 72) for count in (4096, 16384) for passes in both]
    return shapes


def smoke_shapes() -> list[Shape]:
    names = (LINEAR, PLAIN, SDPA)
    return [
        Shape(1, 2, 17, 8, torch.bfloat16, names),
        Shape(1, 2, 33, 8, torch.float32, names, passes=BACKWARD),
        Shape(1, 2, 17, 8, torch.bfloat16, names, "hedgehog"),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    args = parser(__doc__).parse_args(argv)
    where = device()
    shapes = smoke_shapes() if args.smoke else gpu_shapes() if where == "cuda" else cpu_shapes()
    scale, seconds = (0.05, 0.02) if args.smoke else (1.0, 0.3 if where == "cpu" else 0.1)
    peer, why_not = load_peer(where)
    if peer is None:
        shapes = [shape for shape in shapes if PEER not in shape.names]
    floors = {dtype: measure_floor(dtype, where, scale) for dtype in dict.fromkeys(shape.dtype for shape in shapes)}
    measure_all(
        "operator",
        shapes,
        lambda shape: measure(shape, where, floors[shape.dtype], peer, seconds),
        args,
        subject=f"Attention without its projections; peer library {why_not}",
        bounds={dtype_name(dtype): bound for dtype, bound in BOUNDS.items()},
        floors=floor_facts({dtype_name(dtype): floor for dtype, floor in floors.items()}),
        floor_definition=DEFINITION,
    )


def measure(shape: Shape, device: str, floor: Floor, peer: Operator | None, seconds: float) -> list[Row]:
    """Return one row per operator that can run at this shape. Ours is checked first, values and gradients."""
    backward = shape.passes == BACKWARD
    phi = build_feature_map(shape.feature_map, shape.heads, shape.head_dim).to(device)
    inputs = operator_inputs(
        shape.batch, shape.heads, shape.tokens, shape.head_dim, shape.dtype, device, requires_grad=backward
    )
    chosen = _operators(shape, phi, peer)
    errors: dict[str, float] = {}

    def prepare(name: str) -> Run:
        if name == LINEAR:
            errors[name] = check_operator(chosen[name], inputs, phi, backward)
        run = pass_of(chosen[name], inputs, backward)
        if device == "cuda":
            run()  # memory may not suffice, the peer may not compile
        return run

    def prepare_bare(peer: Operator) -> Run:
        given = (x.to(shape.dtype).contiguous() for x in (*phi(inputs[0], inputs[1]), inputs[2]))
        return pass_of(peer, tuple(x.detach().requires_grad_(backward) for x in given), backward)

    variants: dict[str, Callable[[], Run]] = {name: partial(prepare, name) for name in chosen}
    captured = [name for name in shape.names if name.endswith(GRAPH)]
    for name in captured:
        run = pass_of(chosen[name.removesuffix(GRAPH)], inputs)
        variants[name] = partial(graph_of, run, GRAPH_CALLS)
    if peer is not None and PEER in chosen:
        variants[PEER_BARE] = partial(prepare_bare, peer)
    runs, rows = prepare_all(variants)
    timings = time_in_turns(runs, device, seconds) if runs else {}
    timings |= {name: timings[name].share(GRAPH_CALLS) for name in captured if name in timings}
    for name, timing in timings.items():
        features = (
            shape.tokens if name.startswith(SDPA) else phi(inputs[0][:, :, :1], inputs[1][:, :, :1])[0].shape[-1]
        )
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


def load_peer(device: str) -> tuple[Operator | None, str]:
    """Return fla-org/flash-bidirectional-linear-attention where it is importable, and a word on why not."""
    if device != "cuda":
        return None, "not compared: it needs CUDA"
    try:
        from flash_bla.ops.linear_attn import fused
    except Exception as error:  # of the peer's, which must not end a run
        return None, f"not compared: {one_line(error)}"
    few = [fewer_tiles(kernel) for kernel in (fused.fused_fwd_kernel_s_km, fused.fused_fwd_kernel_o)]
    return fused.linear_attention, f"compared, each kernel at the best of {few[0]} tiles"


def fewer_tiles(kernel: Any) -> int:
    """Leave an autotuned kernel of the peer those of its tiles that `PEER_TILES` allows, and return how many."""
    kernel.configs = [
        config
        for config in kernel.configs
        if all(config.all_kwargs()[name] in allowed for name, allowed in PEER_TILES.items())
    ]
    return len(kernel.configs)


def _operators(shape: Shape, phi: FeatureMap, peer: Operator | None) -> dict[str, Operator]:
    chosen = {name: operator for name, operator in operators(phi).items() if name in shape.names}
    if peer is not None and PEER in shape.names:

        def with_peer(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            features = phi(query, key)
            return peer(*(x.to(value.dtype).contiguous() for x in (*features, value)))

        chosen[PEER] = with_peer
    return chosen


if __name__ == "__main__":
    run_script(main)
