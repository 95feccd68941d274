"""Steps of stages 1 and 2 beside the passes that bound their rate, and beside hooks on everything.

    python -m benchmarks.training            some minutes: DINOv2-small at 224 px, batch 16, on a GPU ViT-B, 64
    python -m benchmarks.training --smoke    seconds, a tiny ViT

The bound of stage 1 is the rate of the teacher's forward pass alone, that of stage 2 the rate of the teacher's forward
and three times the student's; both are the stock models under the trainers' autocast, on the same batch. Steps are
whole optimizer steps. Everything of a feature map runs in turns; peak memory comes from a fresh process each (see
trainers/runs/memory.py), above weights and optimizer state. The share of waiting for images is that of a run of
`Trainer` on JPEG files of 375 x 500 pixels, cropped at random, with the default loader (no workers).
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import ViTConfig, ViTModel

from modeling_adala.conversion.convert import student_config
from modeling_adala.conversion.loading import load_teacher_config
from modeling_adala.inspection.flops import count_tokens, image_cost, linear_config
from trainers.base_config import has_fast_bf16
from trainers.runs.timing import Timing, time_in_turns
from vit_adala.benchmark.cases import timing_columns

from .common import ROOT, Row, device, measure_all, parser, peak_bytes, run_script
from .model import TINY
from .training_steps import HOOKS, STAGE_1, STAGE_2, STUDENT, TEACHER, Setting, prepare, trainer_of

MODEL = ROOT.parent / "shared" / "models" / "dinov2-small-saliency"
# the default map, and the paper's operator
FEATURE_MAPS = ("power", "elu")
NAMES = (TEACHER, STUDENT, STAGE_1, STAGE_2, HOOKS)
SECONDS = {"cpu": 20.0, "cuda": 2.0}


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument(
        "--teacher", help="softmax checkpoint. Default: see above, that of a ViT-L with random weights"
    )
    options.add_argument("--size", type=int, default=224, help="side of the images in pixels")
    options.add_argument("--batch", type=int, default=16 if device() == "cpu" else 64, help="images per step")
    args = options.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        if args.smoke:
            args.teacher, args.size, args.batch = random_teacher(folder, "tiny ViT", TINY), 32, 4
        elif args.teacher is None:
            args.teacher = random_teacher(folder, "ViT-B", {}) if device() == "cuda" else str(MODEL)
        maps = FEATURE_MAPS[-1:] if args.smoke else FEATURE_MAPS
        facts: dict[str, Any] = {}
        measure_all(
            "training",
            [Setting(args.teacher, feature_map, args.size, args.batch) for feature_map in maps],
            lambda setting: measure(setting, facts, args.smoke),
            args,
            summary=lambda rows: {**next(iter(facts.values()), {}), "by_feature_map": facts},
            subject=f"{Path(args.teacher).name}, {args.size} px, batch {args.batch},"
            f" {'bf16 autocast' if has_fast_bf16() else 'float32'}",
        )


def random_teacher(folder: str, name: str, shape: dict[str, Any]) -> str:
    """Save a ViT with random weights, which do not change what a step costs, and return its path."""
    torch.manual_seed(0)
    path = str(Path(folder) / f"{name} with random weights")
    ViTModel(ViTConfig(**shape)).save_pretrained(path)
    return path


def measure(setting: Setting, facts: dict[str, Any], smoke: bool) -> list[Row]:
    """Return rows with time and peak memory, and note in `facts` what follows for this feature map."""
    runs = {name: prepare(name, setting) for name in NAMES}
    timings = time_in_turns(runs, device(), 0.05 if smoke else SECONDS[device()])
    del runs
    rows = []
    for name, timing in timings.items():
        rows.append(
            {
                "name": name,
                "feature_map": setting.feature_map,
                **timing_columns(timing),
                "images_per_second": setting.batch / timing.median,
                "peak_bytes": peak_bytes(smoke, prepare, name, setting),
            }
        )
    waits = {name: wait_share(name, setting, 6 if smoke else 14) for name in (STAGE_1, STAGE_2)}
    facts[setting.feature_map] = (
        {"stage_1_share_by_flops": share_by_flops(setting)}
        | summary(timings)
        | {f"{name}, data_wait_share": share for name, share in waits.items()}
    )
    return rows


def summary(timings: dict[str, Timing]) -> dict[str, float]:
    """Return the shares of their bounds that the stages reach, and the gain over hooks on everything."""
    seconds = {name: timing.median for name, timing in timings.items()}
    return {
        "stage_1_share": seconds[TEACHER] / seconds[STAGE_1],
        "stage_2_share": (seconds[TEACHER] + 3 * seconds[STUDENT]) / seconds[STAGE_2],
        "stage_1_speedup": seconds[HOOKS] / seconds[STAGE_1],
    }


def wait_share(name: str, setting: Setting, steps: int) -> float | None:
    """Return `data_wait_share` of a run of `Trainer`."""
    trainer = trainer_of(name, setting, steps)
    trainer.train()
    return trainer.state.log_history[-1].get("data_wait_share")


def share_by_flops(setting: Setting) -> float:
    """Return the share that stage 1 would reach if only products took time, all of them at the same rate.

    Stage 1 runs the teacher up to its last MLP, and for the student query, key and value, the gradients of their
    weights, a product of the same size in the loss (see `alignment_loss_before_projection`), and linear attention with
    a backward pass of twice its forward. The hidden states need no gradient.
    """
    config = student_config(load_teacher_config(setting.teacher), feature_map=setting.feature_map)
    sides = (setting.size, setting.size)
    teacher, linear = image_cost(config, sides, "sdpa"), image_cost(config, sides, "linear")
    config = linear_config(config)
    product = 2 * count_tokens(config, sides) * config.hidden_size**2
    block = (teacher.flops - teacher.attention_flops) / config.num_hidden_layers
    student = config.num_hidden_layers * 7 * product + 3 * linear.attention_flops
    return teacher.flops / (teacher.flops - (block - 4 * product) + student)


if __name__ == "__main__":
    run_script(main)
