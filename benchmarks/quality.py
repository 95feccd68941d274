"""Methods of linear attention under one protocol: as converted, after stage 1, after stages 1 and 2.

    python -m benchmarks.quality --protocol dense --methods "hedgehog" "hedgehog + mixing" --seeds 0 1 --jobs 2
    python -m benchmarks.quality --protocol dense --without-stage-1

A cell is a method and a seed; `--without-stage-1` asks for another one, with stage 2 alone for as many images as both
stages see. Finished cells are skipped, and so is a stage 1 that another method has trained alike, so that a killed run
goes on where it was. `python -m benchmarks.quality_page` makes docs/quality.md of the results.
"""

import argparse
import functools
import hashlib
import inspect
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
from safetensors.torch import load_model, save_model
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from modeling_adala.inspection.towers import patch_size
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
from .counterparts import COUNTERPARTS
from .methods import METHODS, Method
from .protocols import PROTOCOLS, Evaluate, Protocol

STUDENTS = SMOKE / "stage-1"
QUIET: dict[str, Any] = {"disable_tqdm": True, "report_to": "none", "save_strategy": "no", "logging_steps": 50}
SMOKE_BUDGET, SMOKE_IMAGES = {"max_steps": 1, "per_device_train_batch_size": 8, "calibration_images": 8}, 20


def main() -> None:
    """Run the cells that the command line names."""
    arguments = parse()
    alone = arguments.without_stage_1
    cells = [
        (arguments.protocol, method, seed, alone, arguments.smoke)
        for seed, method in product(arguments.seeds, arguments.methods)
        if arguments.smoke or not path_of(arguments.protocol, method, seed, alone).exists()
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
    options.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD", help="default: all")
    options.add_argument("--seeds", nargs="+", type=int, default=[0])
    options.add_argument("--without-stage-1", action="store_true", help="stage 2 alone, as many images as both stages")
    options.add_argument("--jobs", type=int, default=1, help="processes of one thread each; 1 takes all threads")
    arguments = options.parse_args()
    chosen_later = [name for name, method in METHODS.items() if arguments.without_stage_1 and method.auto]
    arguments.methods = arguments.methods or [name for name in METHODS if name not in chosen_later]
    wrong = [name for name in arguments.methods if name in chosen_later]
    if wrong:
        options.error(f"--without-stage-1: softmax layers are chosen after stage 1; leave out {', '.join(wrong)}")
    return arguments


@functools.cache
def opened(protocol: str, eval_images: int | None) -> tuple[PreTrainedModel, DataModule, Evaluate]:
    """Return teacher, data and evaluation of a protocol, the same for all cells of a process."""
    return PROTOCOLS[protocol].open(eval_images)


def path_of(protocol: str, method: str, seed: int, alone: bool = False) -> Path:
    """Return the file of a cell's result; `alone` is that of stage 2 alone."""
    return RESULTS / "quality" / protocol / f"{slug(method)}-{seed}{'-stage-2' if alone else ''}.json"


def slug(method: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in method).split())


def run_cell(name: str, method_name: str, seed: int, alone: bool = False, smoke: bool = False) -> Path:
    """Train and evaluate one method, and return the file of its result."""
    transformers_logging.disable_progress_bar()
    protocol, method = PROTOCOLS[name], METHODS[method_name]
    if smoke:
        settings = {stage: getattr(protocol, stage) | SMOKE_BUDGET for stage in ("stage_1", "stage_2")}
        protocol = replace(protocol, **settings)
    budget = budget_of(protocol, method)
    if alone:
        budget["stage_2_alone"] = budget["stage_2"] | {"max_steps": steps_alone(**budget)}
    rows = list(stages_of(protocol, method, seed, budget, *opened(name, SMOKE_IMAGES if smoke else None)))
    facts: dict[str, Any] = {
        "protocol": name,
        "method": method_name,
        "about": method.about,
        "seed": seed,
        "metric": protocol.metric,
    }
    facts |= {"budget": budget, "options": method.options, "bf16": has_fast_bf16()}
    facts |= {} if method.counterpart is None else {"counterpart": method.counterpart}
    path = path_of(name, method_name, seed, alone)
    path = write_result(f"quality-{path.stem}", rows, smoke=smoke, output=None if smoke else path, **facts)
    print(path)
    print(
        f"{name}: {method_name}, seed {seed}:", ", ".join(f"{r['row']} {100 * r[protocol.metric]:.2f}" for r in rows)
    )
    return path


def budget_of(protocol: Protocol, method: Method) -> dict[str, dict[str, Any]]:
    """Return the settings of both stages."""
    return {"stage_1": protocol.stage_1 | method.stage_1, "stage_2": protocol.stage_2 | method.stage_2}


def steps_alone(stage_1: dict[str, Any], stage_2: dict[str, Any]) -> int:
    """Return the steps of a stage 2 that sees the images of both stages."""
    images = [stage["max_steps"] * stage["per_device_train_batch_size"] for stage in (stage_1, stage_2)]
    return sum(images) // stage_2["per_device_train_batch_size"]


def stages_of(
    protocol: Protocol,
    method: Method,
    seed: int,
    budget: dict[str, Any],
    teacher: PreTrainedModel,
    data: DataModule,
    evaluate: Evaluate,
    kept: Path | None = None,
) -> Iterator[Row]:
    """Yield the figures of the converted student, after stage 1, and after stages 1 and 2; or of stage 2 alone.

    `kept` holds the students of stage 1, by default those of all runs.
    """
    torch.manual_seed(seed)
    rows, columns = (side // pixels for side, pixels in zip(data.image_size, patch_size(teacher.config), strict=True))
    student = method.student(teacher, (rows, columns), seed)
    settings: dict[str, Any] = {**QUIET, "seed": seed}

    def stage_2(budget: dict[str, Any]) -> float:
        with tempfile.TemporaryDirectory() as folder:
            args = FeatureAlignmentConfig(output_dir=folder, **budget, **settings)
            trainer = FeatureAlignmentTrainer(student, teacher, args, train_dataset=data.train_dataset(seed))
            start = time.perf_counter()
            trainer.train()
            return time.perf_counter() - start

    if "stage_2_alone" in budget:
        seconds = stage_2(budget["stage_2_alone"])
        yield {"row": "stage 2 alone", "seconds": seconds, **evaluate(student)}
        return
    yield {"row": "converted", "seconds": 0.0, **evaluate(student)}
    one = budget["stage_1"]

    def align(folder: Path) -> tuple[PreTrainedModel, AttentionAlignmentTrainer]:
        args = AttentionAlignmentConfig(output_dir=str(folder), **one, **settings)
        return student, AttentionAlignmentTrainer(student, teacher, args, train_dataset=data.train_dataset(seed))

    facts = [protocol.teacher, protocol.data, method.options, one, seed, has_fast_bf16()]
    if method.counterpart is not None:
        facts += [method.counterpart, Path(inspect.getfile(COUNTERPARTS[method.counterpart])).read_text()]
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    student, trainer, seconds = stage_1(align, (kept or STUDENTS) / key)
    chosen: dict[str, Any] = {}
    if method.auto:
        start = time.perf_counter()
        batches = trainer.calibration_batches()
        layers, ranking, _ = choose_softmax_layers(student, teacher, batches, method.auto)
        chosen = {"softmax_layers": layers, "ranking": {str(layer): error for layer, error in ranking.items()}}
        chosen["ranking_seconds"] = time.perf_counter() - start
    yield {"row": "stage 1", "seconds": seconds, **chosen, **evaluate(student)}
    seconds += stage_2(budget["stage_2"])
    yield {"row": "stages 1+2", "seconds": seconds, **evaluate(student)}


def stage_1(
    align: Callable[[Path], tuple[PreTrainedModel, AttentionAlignmentTrainer]], kept: Path
) -> tuple[PreTrainedModel, AttentionAlignmentTrainer, float]:
    """Return the student of stage 1, its trainer and its seconds, from `kept` if a method before it trained alike."""
    kept.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{kept}.lock"), tempfile.TemporaryDirectory() as folder:
        student, trainer = align(Path(folder))
        clock, weights = kept / "seconds.json", str(kept / "model.safetensors")
        if clock.exists():
            load_model(student, weights)
            return student, trainer, json.loads(clock.read_text())
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        save_model(student, weights)  # a rival has no place in a checkpoint of ours
        clock.write_text(json.dumps(seconds))
    return student, trainer, seconds


if __name__ == "__main__":
    main()
