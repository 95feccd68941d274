"""Time and peak memory of the operator from 4,096 to 1,048,576 tokens.

    python -m benchmarks.scaling            some minutes
    python -m benchmarks.scaling --smoke    seconds, up to 1,024 tokens

Peak memory is measured in a fresh process per N (see trainers/runs/memory.py), above query, key and value.
"""

import math
import statistics
from typing import Any

import torch

from modeling_adala import build_feature_map
from modeling_adala.errors import AdaLAError
from trainers.runs.memory import peak_of
from trainers.runs.timing import time_in_turns
from vit_adala.benchmark.cases import LINEAR, Settings, timing_columns
from vit_adala.benchmark.operators import check_operator, operator_inputs, operators, pass_of, prepare_operator

from .common import parser, progress, write_result

HEADS, HEAD_DIM, DTYPE, FEATURE_MAP = 12, 64, torch.bfloat16, "elu"
TOKENS = tuple(2**power for power in range(12, 21))
SMOKE_TOKENS = (256, 512, 1024)


def main() -> None:
    options = parser(__doc__)
    args = options.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    counts = SMOKE_TOKENS if args.smoke else TOKENS
    phi = build_feature_map(FEATURE_MAP, HEADS, HEAD_DIM).to(device)
    rows: list[dict[str, Any]] = []
    for tokens in progress(list(counts), "scaling"):
        inputs = operator_inputs(1, HEADS, tokens, HEAD_DIM, DTYPE, device)
        operator = operators(phi)[LINEAR]
        error = check_operator(operator, inputs, phi)
        timing = time_in_turns({LINEAR: pass_of(operator, inputs)}, device, 0.05 if args.smoke else 2.0)[LINEAR]
        input_bytes = sum(x.numel() * x.element_size() for x in inputs)
        del inputs
        shape, settings = (1, HEADS, tokens, HEAD_DIM), Settings(DTYPE, device)
        peak = peak_of(prepare_operator, LINEAR, phi, shape, settings, device=device)
        rows.append(
            {
                "name": LINEAR,
                "tokens": tokens,
                **timing_columns(timing),
                "nanoseconds_per_token": 1e9 * timing.median / tokens,
                "peak_bytes": peak,
                "input_bytes": input_bytes,
                "relative_error": error,
            }
        )
    write_result(
        "scaling",
        rows,
        smoke=args.smoke,
        output=args.output,
        device=device,
        subject=f"Operator, batch 1, {HEADS} heads of {HEAD_DIM}, bfloat16, {FEATURE_MAP}",
        time_exponent=exponent(rows, "milliseconds"),
        memory_exponent=exponent(rows, "peak_bytes"),
    )


def exponent(rows: list[dict[str, Any]], column: str) -> float | None:
    """Return the exponent of the power law of `column` over tokens (1 is linear); `None` if it was not measured."""
    points = [(math.log(row["tokens"]), math.log(row[column])) for row in rows if row[column]]
    if len(points) < 2:
        return None
    tokens, values = zip(*points, strict=True)
    return statistics.linear_regression(tokens, values).slope


if __name__ == "__main__":
    try:
        main()
    except AdaLAError as error:
        raise SystemExit(f"scaling: {error}") from error
