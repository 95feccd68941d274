"""Stages 1 and 2 in a given time: the embedded digits, and another teacher if one is named.

    python -m benchmarks.distillation --seconds 240 [--teacher CHECKPOINT --dataset IMAGES --image-size 224]
    python -m benchmarks.distillation --smoke    seconds

The default method, in bf16 where the hardware has it. A short run of both stages tells how many steps the time is
enough for, evaluation included; each teacher gets the same share of it.
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from modeling_adala.conversion.loading import load_image_processor
from modeling_adala.errors import AdaLAError
from trainers.base_config import has_fast_bf16

from .common import Row, device, measure_all, parser, run_script
from .methods import METHODS
from .model import TINY
from .protocols import PROTOCOLS, Protocol
from .quality import SMOKE_BUDGET, SMOKE_IMAGES, rows_of
from .students import Students
from .training import random_teacher

METHOD = "power + mixing"
# of the time for training; stage 2 is the one that the result depends on
STAGE_1_SHARE = 0.4
# steps of the short runs: the first compiles
TRIALS = (5, 30)
# a GPU takes a batch of digits faster than one process cuts it
WORKERS = {"dataloader_num_workers": 8, "dataloader_persistent_workers": True}


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--teacher", help="another softmax checkpoint")
    options.add_argument("--dataset", help="its images: a Hub id, a folder, parquet files")
    options.add_argument("--image-size", help="their size in pixels. Default: the teacher's")
    options.set_defaults(seconds=240.0)
    args = options.parse_args(argv)
    if (args.teacher is None) != (args.dataset is None):
        raise AdaLAError("--teacher and --dataset belong together; pass both, or neither.")
    transformers_logging.disable_progress_bar()
    protocols = {"digits": PROTOCOLS["digits"]}
    if args.teacher:
        data = {"dataset": args.dataset, "image_size": args.image_size}
        protocols[Path(args.teacher).name] = replace(PROTOCOLS["images"], teacher=args.teacher, data=data)
    steps: dict[str, Any] = {}
    measure_all(
        "distillation",
        list(protocols),
        lambda name: measure(name, protocols[name], steps, args.seconds / len(protocols), args.smoke),
        args,
        summary=lambda rows: {"steps": steps},
        subject=f"Stages 1 and 2, {METHOD}, {'bf16 autocast' if has_fast_bf16() else 'float32'}",
    )


def measure(name: str, protocol: Protocol, steps: dict[str, Any], seconds: float, smoke: bool) -> list[Row]:
    """Return the figures of the converted student, after stage 1, and after stage 2; note the steps of both."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        if smoke:
            protocol = protocol.with_settings(SMOKE_BUDGET, SMOKE_BUDGET)
            protocol = replace(protocol, teacher=tiny_teacher(folder, protocol))
        elif device() == "cuda":
            protocol = protocol.with_settings(WORKERS, WORKERS)
        teacher, data, evaluate = protocol.open(SMOKE_IMAGES if smoke else None)

        def run(counts: Sequence[int]) -> list[Row]:
            fitted = protocol.with_settings(*({"max_steps": count} for count in counts))
            return list(rows_of(Students(fitted, METHODS[METHOD], 0, teacher, data, Path(folder)), evaluate))

        for count in (1,) if smoke else TRIALS:
            begin = time.monotonic()
            spent = [row["seconds"] for row in run((count, count))]
        evaluation = time.monotonic() - begin - spent[-1]
        left = max(0.0, seconds - (time.monotonic() - start) - evaluation)
        rates = (spent[1] / count, (spent[2] - spent[1]) / count)
        shares = (STAGE_1_SHARE, 1 - STAGE_1_SHARE)
        steps[name] = [max(1, int(share * left / rate)) for share, rate in zip(shares, rates, strict=True)]
        if smoke:
            steps[name] = [2, 2]
        rows = run(steps[name])
    batch = [stage["per_device_train_batch_size"] for stage in (protocol.stage_1, protocol.stage_2)]
    images = [0, steps[name][0] * batch[0], sum(count * size for count, size in zip(steps[name], batch, strict=True))]
    return [{"teacher": name, **row, "images": seen} for row, seen in zip(rows, images, strict=True)]


def tiny_teacher(folder: str, protocol: Protocol) -> str:
    """Save a tiny teacher with random weights and the image processor of that of a protocol, and return its path."""
    path = random_teacher(folder, "tiny ViT", TINY | {"num_channels": 1, "image_size": 28, "patch_size": 7})
    processor: Any = load_image_processor(protocol.teacher)
    processor.save_pretrained(path)
    return path


if __name__ == "__main__":
    run_script(main)
