"""Forward pass of whole models with each method of benchmarks/quality.py, beside the softmax teacher.

    python -m benchmarks.latency

One run, all in turns, batch 1, on one thread: what docs/quality.md shows beside the quality. Methods that differ in
their training alone are one row.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modeling_adala import load_teacher
from modeling_adala.conversion.folding import fold_feature_maps
from modeling_adala.inspection.towers import forward_features, patch_size
from trainers.base_config import evaluation_autocast, has_fast_bf16
from trainers.runs.timing import time_in_turns

from .common import parser, progress, write_result
from .methods import METHODS, timed_as
from .protocols import DINOV2

SIDES = (32, 64)  # patches: 1,025 and 4,097 tokens
# their place does not show in the time
SOFTMAX_LAYERS = (3, 7)


def main() -> None:
    """Measure all methods."""
    options = parser(__doc__)
    options.add_argument("--teacher", default=DINOV2)
    arguments = options.parse_args()
    torch.set_num_threads(1)
    teacher = load_teacher(arguments.teacher)
    sides = SIDES[:1] if arguments.smoke else SIDES
    rows = [row for side in progress(list(sides), "latency") for row in measure(teacher, side, arguments.smoke)]
    facts: dict[str, Any] = {"subject": f"{teacher.config.num_hidden_layers} layers, batch 1", "bf16": has_fast_bf16()}
    print(write_result("latency", rows, smoke=arguments.smoke, output=arguments.output, **facts))


@torch.inference_mode()
def measure(teacher: PreTrainedModel, side: int, smoke: bool) -> list[dict[str, Any]]:
    """Return a row per computation for a square image of `side` patches."""
    height, width = (side * pixels for pixels in patch_size(teacher.config))
    images = torch.randn(1, teacher.config.num_channels, height, width)
    models = {"softmax": teacher}
    for name, method in METHODS.items():
        if timed_as(name) == name:
            models[name] = method.student(teacher, (side, side), softmax_layers=list(SOFTMAX_LAYERS[: method.auto]))
            fold_feature_maps(models[name])  # as stage 2 does

    def run(model: PreTrainedModel) -> Tensor:
        with evaluation_autocast("cpu"):
            return forward_features(model.eval(), images)

    runs = {name: partial(run, model) for name, model in models.items()}
    timings = time_in_turns(runs, torch.device("cpu"), seconds=0.01 if smoke else 3.0)
    softmax = timings["softmax"].median
    return [
        {
            "name": name,
            "tokens": side * side + 1,
            "milliseconds": 1000 * timing.median,
            "lower_milliseconds": 1000 * timing.lower,
            "upper_milliseconds": 1000 * timing.upper,
            "speedup": softmax / timing.median,
        }
        for name, timing in timings.items()
    ]


if __name__ == "__main__":
    main()
