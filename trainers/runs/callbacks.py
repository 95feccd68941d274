"""Callbacks of the trainers: the progress bar, `metrics.jsonl`, and the time and memory that a training takes."""

import contextlib
import json
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from hub_cards.records import append_metrics, number, read_metrics, write_text

from .memory import peak_memory, reset_peak_memory

logger = logging.getLogger(__name__)

# workers start, kernels are chosen, memory is first touched
WARM_UP_STEPS = 2
# fewer say nothing
WARNED_FROM_STEPS = 10
WARNED_ABOVE = 0.2


class CompactProgressCallback(ProgressCallback):
    """Stock progress bar with the time left, its log line shrunk to the loss: the rest is in `metrics.jsonl`."""

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
    """Callback that appends every log of a stage to `metrics.jsonl`, one JSON object per line.

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
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs:
            seconds = round(time.perf_counter() - self.start, 2)
            append_metrics(self.path, {"stage": self.stage, "step": state.global_step, "seconds": seconds, **logs})

    def _will_return(self, line: dict[str, Any], step: int) -> bool:
        # the summary of a run that ended, but was killed before its result was written
        return line.get("stage") == self.stage and (line.get("step", step + 1) > step or "train_runtime" in line)


class TrainingCost(TrainerCallback):
    """Callback that measures the cost of a training for its log lines.

    - `data_wait_share`, 0 to 1: how much of the steps' time passes in waiting for the data loader. A step lasts from
      the request of its batches to the end of the optimizer's update; logging, evaluation and checkpoints do not
      count, nor do the first `WARM_UP_STEPS` steps. In the last line, that of the whole training.
    - `peak_memory_mib`, in the last line: see `peak_memory`.
    """

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self.steps = 0
        self.requested = self.received = 0.0
        self.window, self.whole = _Waiting(), _Waiting()
        self.has_warned = False

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Measure the request of the batches of one step, as a context."""
        self.requested = time.perf_counter()
        yield
        self.received = time.perf_counter()

    def on_train_begin(self, args, state, control, **kwargs):
        self._start()
        reset_peak_memory(args.device)

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1
        if self.steps > WARM_UP_STEPS:
            for waiting in (self.window, self.whole):
                waiting.waited += self.received - self.requested
                waiting.seconds += time.perf_counter() - self.requested

    def add_to(self, logs: dict[str, float], args: TrainingArguments) -> None:
        """Complete a log line of the training, and warn once where images come too slowly."""
        is_last = "train_runtime" in logs
        share = (self.whole if is_last else self.window).share
        if share is not None:
            logs["data_wait_share"] = round(share, 4)
        self.window = _Waiting()
        if is_last and (peak := peak_memory(args.device)) is not None:
            logs["peak_memory_mib"] = round(peak / 2**20)
        share = self.whole.share or 0.0
        if share > WARNED_ABOVE and self.steps >= WARNED_FROM_STEPS and not self.has_warned:
            self.has_warned = True
            logger.warning(
                "%.0f %% of the training time passes in waiting for images; raise dataloader_num_workers (now %d).",
                100 * share,
                args.dataloader_num_workers,
            )


@dataclass
class _Waiting:
    """Seconds spent waiting, and in all."""

    waited: float = 0.0
    seconds: float = 0.0

    @property
    def share(self) -> float | None:
        return self.waited / self.seconds if self.seconds else None


def cost_in_words(values: Mapping[str, Any]) -> str:
    """Return such as ", 2 % of them waiting for images, at most 1.3 GiB of memory", from a log line or a manifest."""
    share, peak = number(values.get("data_wait_share")), number(values.get("peak_memory_mib"))
    waiting = "" if share is None else f", {100 * share:.0f} % of them waiting for images"
    return waiting + ("" if peak is None else f", at most {peak / 1024:.1f} GiB of memory")
