"""Methods of linear attention under one protocol: as converted, after stage 1, after stages 1 and 2.

    python -m benchmarks.quality --protocol dense --methods "hedgehog" "hedgehog + mixing" --seeds 0 1 --jobs 2
    python -m benchmarks.quality --protocol dense --without-stage-1
    python -m benchmarks.quality --protocol dense --methods "power + mixing" --scale 4

A cell is a method and a seed; `--without-stage-1` asks for another one, with stage 2 alone for as many images as both
stages see. Finished cells are skipped, and so is a stage that another method has trained alike, so that a killed run
goes on where it was. `python -m benchmarks.quality_page` makes docs/quality.md of the results.
"""

import argparse
import functools
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from trainers.base_config import has_fast_bf16
from trainers.data.data_config import DataModule

from .common import RESULTS, Row, parser, write_result
from .methods import METHODS
from .protocols import PROTOCOLS, Evaluate
from .students import ALONE, STAGES, Students, Trained

SMOKE_BUDGET, SMOKE_IMAGES = {"max_steps": 1, "per_device_train_batch_size": 8, "calibration_images": 8}, 20


@dataclass(frozen=True)
class Cell:
    """Cell of the comparison.

    Args:
        protocol (`str`), method (`str`): Names in `PROTOCOLS` and `METHODS`.
        seed (`int`): Of weights and data.
        alone (`bool`): Stage 2 alone, for as many images as both stages see.
        scale (`float`): Factor on the steps of both stages.
        smoke (`bool`): One step of each.
    """

    protocol: str
    method: str
    seed: int = 0
    alone: bool = False
    scale: float = 1.0
    smoke: bool = False

    @property
    def path(self) -> Path:
        """File of its result."""
        ending = "-stage-2" * self.alone + f"-x{self.scale:g}" * (self.scale != 1)
        return RESULTS / "quality" / self.protocol / f"{slug(self.method)}-{self.seed}{ending}.json"


def main() -> None:
    """Run the cells that the command line names."""
    arguments = parse()
    shared = {"alone": arguments.without_stage_1, "scale": arguments.scale, "smoke": arguments.smoke}
    order = product(arguments.seeds, arguments.methods)
    cells = [Cell(arguments.protocol, method, seed, **shared) for seed, method in order]
    run_all([partial(run_cell, cell) for cell in cells if cell.smoke or not cell.path.exists()], arguments.jobs)


def run_all(runs: list[Callable[[], Any]], jobs: int) -> None:
    """Run calls one after the other with all threads, or `jobs` at once in processes of one thread each."""
    if jobs == 1:
        for run in runs:
            run()
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn, torch.set_num_threads, (1,)) as pool:
        for future in [pool.submit(run) for run in runs]:
            future.result()


def parse() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--protocol", choices=PROTOCOLS, default="digits")
    options.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD", help="default: all")
    options.add_argument("--seeds", nargs="+", type=int, default=[0])
    options.add_argument("--without-stage-1", action="store_true", help="stage 2 alone, as many images as both stages")
    options.add_argument("--scale", type=float, default=1.0, help="factor on the steps of both stages, for its curve")
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


def slug(method: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in method).split())


def run_cell(cell: Cell) -> Path:
    """Train and evaluate one method, and return the file of its result."""
    transformers_logging.disable_progress_bar()
    protocol, method = PROTOCOLS[cell.protocol].scaled(cell.scale), METHODS[cell.method]
    if cell.smoke:
        protocol = protocol.with_settings(SMOKE_BUDGET, SMOKE_BUDGET)
    teacher, data, evaluate = opened(cell.protocol, SMOKE_IMAGES if cell.smoke else None)
    students = Students(protocol, method, cell.seed, teacher, data)
    rows = list(rows_of(students, evaluate, cell.alone))
    facts: dict[str, Any] = {
        "protocol": cell.protocol,
        "method": cell.method,
        "about": method.about,
        "seed": cell.seed,
        "metric": protocol.metric,
    }
    budget = students.budget | ({"stage_2_alone": students.budget_alone} if cell.alone else {})
    facts |= {"budget": budget, "options": method.options, "bf16": has_fast_bf16()}
    facts |= {} if method.counterpart is None else {"counterpart": method.counterpart}
    facts |= {} if cell.scale == 1 else {"scale": cell.scale}
    output = None if cell.smoke else cell.path
    path = write_result(f"quality-{cell.path.stem}", rows, smoke=cell.smoke, output=output, **facts)
    figures = ", ".join(f"{row['row']} {row[protocol.metric]:.2%}" for row in rows)
    print(f"{path}\n{cell.protocol}: {cell.method}, seed {cell.seed}: {figures}")
    return path


def rows_of(students: Students, evaluate: Evaluate, alone: bool = False) -> Iterator[Row]:
    """Yield the figures of the converted student, after stage 1, and after stages 1 and 2; or of stage 2 alone."""

    def row(stage: str, trained: Trained) -> Row:
        return {"row": stage, "seconds": trained.seconds, **trained.chosen, **evaluate(trained.student)}

    if alone:
        yield row(ALONE, students.after_stage_2_alone())
        return
    yield row(STAGES[0], Trained(students.converted()))
    one = students.after_stage_1()
    yield row(STAGES[1], one)
    yield row(STAGES[2], students.after_stage_2(one))


if __name__ == "__main__":
    main()
