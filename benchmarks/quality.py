"""Methods of linear attention under one protocol: as converted, after stage 1, after stages 1 and 2.

    python -m benchmarks.quality --protocol dense --methods "hedgehog" "hedgehog + mixing" --seeds 0 1 --jobs 2

A cell is a method and a seed. Finished cells are skipped, and so is a stage 1 that another method has trained alike,
so that a killed run goes on where it was. `python -m benchmarks.quality_page` makes docs/quality.md of the results.
"""

import argparse
import functools
import hashlib
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from modeling_adala import convert, load_student
from trainers import (
    AttentionAlignmentConfig,
    AttentionAlignmentTrainer,
    FeatureAlignmentConfig,
    FeatureAlignmentTrainer,
)
from trainers.base_config import has_fast_bf16
from trainers.data.data_config import DataModule
from trainers.evaluation.softmax_layers import choose_softmax_layers

from .common import RESULTS, SMOKE, Row, parser, write_result
from .methods import METHODS, Method
from .protocols import PROTOCOLS, Evaluate, Protocol

STUDENTS = SMOKE / "stage-1"
QUIET: dict[str, Any] = {"disable_tqdm": True, "report_to": "none", "save_strategy": "no", "logging_steps": 50}
SMOKE_BUDGET, SMOKE_IMAGES = {"max_steps": 1, "per_device_train_batch_size": 8, "calibration_images": 8}, 20


def main() -> None:
    """Run the cells that the command line names."""
    arguments = parse()
    cells = [
        (arguments.protocol, method, seed, arguments.smoke)
        for seed, method in product(arguments.seeds, arguments.methods)
        if arguments.smoke or not path_of(arguments.protocol, method, seed).exists()
    ]
    if arguments.jobs == 1:
        for cell in cells:
            run_cell(*cell)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.jobs, spawn, torch.set_num_threads, (1,)) as pool:
        for future in [pool.submit(run_cell, *cell) for cell in cells]:
            future.result()


def parse() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--protocol", choices=PROTOCOLS, default="digits")
    options.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    options.add_argument("--seeds", nargs="+", type=int, default=[0])
    options.add_argument("--jobs", type=int, default=1, help="processes of one thread each; 1 takes all threads")
    return options.parse_args()


@functools.cache
def opened(protocol: str, eval_images: int | None) -> tuple[PreTrainedModel, DataModule, Evaluate]:
    """Return teacher, data and evaluation of a protocol, the same for all cells of a process."""
    return PROTOCOLS[protocol].open(eval_images)


def path_of(protocol: str, method: str, seed: int) -> Path:
    """Return the file of a cell's result."""
    return RESULTS / "quality" / protocol / f"{slug(method)}-{seed}.json"


def slug(method: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in method).split())


def run_cell(name: str, method_name: str, seed: int, smoke: bool = False) -> Path:
    """Train and evaluate one method, and return the file of its result."""
    transformers_logging.disable_progress_bar()
    protocol, method = PROTOCOLS[name], METHODS[method_name]
    if smoke:
        settings = {stage: getattr(protocol, stage) | SMOKE_BUDGET for stage in ("stage_1", "stage_2")}
        protocol = replace(protocol, **settings)
    rows = list(stages_of(protocol, method, seed, *opened(name, SMOKE_IMAGES if smoke else None)))
    facts: dict[str, Any] = {
        "protocol": name,
        "method": method_name,
        "about": method.about,
        "seed": seed,
        "metric": protocol.metric,
    }
    budget = {"stage_1": protocol.stage_1 | method.stage_1, "stage_2": protocol.stage_2 | method.stage_2}
    facts |= {"budget": budget, "options": method.options, "bf16": has_fast_bf16()}
    output = None if smoke else path_of(name, method_name, seed)
    path = write_result(f"quality-{slug(method_name)}", rows, smoke=smoke, output=output, **facts)
    print(path)
    print(
        f"{name}: {method_name}, seed {seed}:", ", ".join(f"{r['row']} {100 * r[protocol.metric]:.2f}" for r in rows)
    )
    return path


def stages_of(
    protocol: Protocol,
    method: Method,
    seed: int,
    teacher: PreTrainedModel,
    data: DataModule,
    evaluate: Evaluate,
    kept: Path | None = None,
) -> Iterator[Row]:
    """Yield the figures of the converted student, then after stage 1, then after stages 1 and 2.

    `kept` holds the students of stage 1, by default those of all runs.
    """
    torch.manual_seed(seed)
    student = convert(teacher, check_parity=False, **method.options)
    yield {"row": "converted", "seconds": 0.0, **evaluate(student)}
    settings: dict[str, Any] = {**QUIET, "seed": seed}
    one, two = protocol.stage_1 | method.stage_1, protocol.stage_2 | method.stage_2

    def align(folder: Path) -> tuple[PreTrainedModel, AttentionAlignmentTrainer]:
        args = AttentionAlignmentConfig(output_dir=str(folder), **one, **settings)
        return student, AttentionAlignmentTrainer(student, teacher, args, train_dataset=data.train_dataset(seed))

    key = json.dumps([protocol.teacher, protocol.data, method.options, one, seed, has_fast_bf16()], sort_keys=True)
    student, trainer, seconds = stage_1(align, (kept or STUDENTS) / hashlib.sha256(key.encode()).hexdigest()[:16])
    facts: dict[str, Any] = {}
    if method.auto:
        start = time.perf_counter()
        batches = trainer.calibration_batches()
        chosen, ranking, _ = choose_softmax_layers(student, teacher, batches, method.auto)
        facts = {"softmax_layers": chosen, "ranking": {str(layer): error for layer, error in ranking.items()}}
        facts["ranking_seconds"] = time.perf_counter() - start
    yield {"row": "stage 1", "seconds": seconds, **facts, **evaluate(student)}
    with tempfile.TemporaryDirectory() as folder:
        args = FeatureAlignmentConfig(output_dir=folder, **two, **settings)
        stage_2 = FeatureAlignmentTrainer(student, teacher, args, train_dataset=data.train_dataset(seed))
        start = time.perf_counter()
        stage_2.train()
        seconds += time.perf_counter() - start
    yield {"row": "stages 1+2", "seconds": seconds, **evaluate(student)}


def stage_1(
    align: Callable[[Path], tuple[PreTrainedModel, AttentionAlignmentTrainer]], kept: Path
) -> tuple[PreTrainedModel, AttentionAlignmentTrainer, float]:
    """Return the student of stage 1, its trainer and its seconds, from `kept` if a method before it trained alike."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{kept}.lock"), tempfile.TemporaryDirectory() as folder:
        student, trainer = align(Path(folder))
        clock = kept / "seconds.json"
        if clock.exists():
            student.load_state_dict(load_student(str(kept)).state_dict())
            return student, trainer, json.loads(clock.read_text())
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        student.save_pretrained(kept)
        clock.write_text(json.dumps(seconds))
    return student, trainer, seconds


if __name__ == "__main__":
    main()
