"""Forward pass of whole models with the options of each method of benchmarks/quality.py, beside the softmax teacher.

    python -m benchmarks.latency

One run, all in turns, batch 1, on one thread: what docs/quality.md shows beside the quality.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modeling_adala import convert, load_teacher
from modeling_adala.inspection.towers import forward_features, patch_size
from trainers.base_config import evaluation_autocast, has_fast_bf16
from trainers.runs.timing import time_in_turns

from .common import parser, progress, write_result
from .methods import METHODS, Method
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
    models = {"softmax": teacher} | {name: student_of(teacher, method) for name, method in METHODS.items()}
    sides = SIDES[:1] if arguments.smoke else SIDES
    rows = [row for side in progress(list(sides), "latency") for row in measure(models, side, arguments.smoke)]
    facts: dict[str, Any] = {"subject": f"{teacher.config.num_hidden_layers} layers, batch 1", "bf16": has_fast_bf16()}
    print(write_result("latency", rows, smoke=arguments.smoke, output=arguments.output, **facts))


def student_of(teacher: PreTrainedModel, method: Method) -> PreTrainedModel:
    """Return an untrained student with the options of a method."""
    layers = list(SOFTMAX_LAYERS[: method.auto])
    return convert(teacher, check_parity=False, **{"softmax_layers": layers, **method.options})


@torch.inference_mode()
def measure(models: dict[str, PreTrainedModel], side: int, smoke: bool) -> list[dict[str, Any]]:
    """Return a row per model for a square image of `side` patches."""
    height, width = (side * pixels for pixels in patch_size(models["softmax"].config))
    images = torch.randn(1, models["softmax"].config.num_channels, height, width)

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
