"""Time and peak memory of the operator from 4,096 to 1,048,576 tokens.

    python -m benchmarks.scaling            some minutes
    python -m benchmarks.scaling --smoke    seconds, up to 1,024 tokens

Peak memory is measured in a fresh process per N (see trainers/runs/memory.py), above query, key and value.
"""

import math
import statistics
from collections.abc import Sequence

import torch

from modeling_adala import build_feature_map
from trainers.base_config import evaluation_dtype
from trainers.runs.timing import time_in_turns
from vit_adala.benchmark.cases import LINEAR, Settings, timing_columns
from vit_adala.benchmark.operators import check_operator, operator_inputs, operators, pass_of, prepare_operator

from .common import Row, device, dtype_name, measure_all, parser, peak_bytes, run_script

HEADS, HEAD_DIM, FEATURE_MAP = 12, 64, "power"
TOKENS = tuple(2**power for power in range(12, 21))
SMOKE_TOKENS = (256, 512, 1024)
SECONDS = {"cpu": 2.0, "cuda": 0.2}


def main(argv: Sequence[str] | None = None) -> None:
    args, dtype = parser(__doc__).parse_args(argv), evaluation_dtype() or torch.float32
    measure_all(
        "scaling",
        SMOKE_TOKENS if args.smoke else TOKENS,
        lambda tokens: [measure(tokens, device(), dtype, args.smoke)],
        args,
        summary=lambda rows: {
            "time_exponent": exponent(rows, "milliseconds"),
            "memory_exponent": exponent(rows, "peak_bytes"),
        },
        subject=f"Operator, batch 1, {HEADS} heads of {HEAD_DIM}, {dtype_name(dtype)}, {FEATURE_MAP}",
    )


def measure(tokens: int, device: str, dtype: torch.dtype, smoke: bool) -> Row:
    """Return the row of a number of tokens. The operator is checked first."""
    phi = build_feature_map(FEATURE_MAP, HEADS, HEAD_DIM).to(device)
    inputs = operator_inputs(1, HEADS, tokens, HEAD_DIM, dtype, device)
    operator = operators(phi)[LINEAR]
    error = check_operator(operator, inputs, phi)
    seconds = 0.05 if smoke else SECONDS[device]
    timing = time_in_turns({LINEAR: pass_of(operator, inputs)}, device, seconds)[LINEAR]
    input_bytes = sum(x.numel() * x.element_size() for x in inputs)
    del inputs
    shape, settings = (1, HEADS, tokens, HEAD_DIM), Settings(dtype, device)
    return {
        "name": LINEAR,
        "tokens": tokens,
        **timing_columns(timing),
        "nanoseconds_per_token": 1e9 * timing.median / tokens,
        "peak_bytes": peak_bytes(smoke, prepare_operator, LINEAR, phi, shape, settings),
        "input_bytes": input_bytes,
        "relative_error": error,
    }


def exponent(rows: list[Row], column: str) -> float | None:
    """Return the exponent of the power law of `column` over tokens (1 is linear); `None` if it was not measured."""
    points = [(math.log(row["tokens"]), math.log(row[column])) for row in rows if row[column]]
    if len(points) < 2:
        return None
    tokens, values = zip(*points, strict=True)
    return statistics.linear_regression(tokens, values).slope


if __name__ == "__main__":
    run_script(main)
