"""What a user sees of a run while it goes on, and what is kept of it."""

import json
import os
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from hub_cards.records import read_metrics

from .checkpoints import whole_file


class CompactProgressCallback(ProgressCallback):
    """The stock progress bar with the time left, its log line shrunk to the loss: the rest is in `metrics.jsonl`."""

    def __init__(self, description: str):
        super().__init__()
        self.description = description

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.description)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.4f}")


class MetricsFileCallback(TrainerCallback):
    """Appends every log of a stage to `metrics.jsonl`, one JSON object a line.

    A resumed run first drops the lines that it is about to write again, and one cut short by a kill, so that the file
    has the lines of a run which was never interrupted. Figures that are means over a logging window count only the
    steps since the resume in the window that spans it.
    """

    def __init__(self, path: str | Path, stage: str):
        self.path, self.stage = Path(path), stage
        self.start = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()
        if not state.is_world_process_zero:
            return
        kept = [line for line in read_metrics(self.path) if not self._will_return(line, state.global_step)]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole_file(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs:
            seconds = round(time.perf_counter() - self.start, 2)
            append_metrics(self.path, {"stage": self.stage, "step": state.global_step, "seconds": seconds, **logs})

    def _will_return(self, line: dict[str, Any], step: int) -> bool:
        # the summary of a run that ended, but was killed before its result was written
        return line.get("stage") == self.stage and (line.get("step", step + 1) > step or "train_runtime" in line)


def append_metrics(path: str | Path, values: dict[str, Any]) -> None:
    """Adds one line, apart from what a kill may have left of the line before."""
    with Path(path).open("a+b") as file:
        torn = False
        if file.tell():
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
        file.write(b"\n" * torn + json.dumps(values).encode() + b"\n")
