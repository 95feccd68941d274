"""Memory, files and threads stay flat over the steps of stages 1 and 2."""

import gc
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from test_trainers import ATTENTION, FEATURES, student_of, trainer_of
from training_helpers import NoiseImages, tiny_vit
from transformers import TrainerCallback

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="reads /proc")

STEPS, WARM_UP = 500, 100
MOST_PER_STEP = 20 * 1024


class Watch(TrainerCallback):
    """Keeps resident memory in bytes, open files and threads after each step."""

    def __init__(self):
        self.memory: list[int] = []
        self.files: list[int] = []
        self.threads: list[int] = []

    def on_step_end(self, args, state, control, **kwargs):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.memory.append(pages * os.sysconf("SC_PAGE_SIZE"))
        self.files.append(len(os.listdir("/proc/self/fd")))
        self.threads.append(threading.active_count())


def slope(values: list[int]) -> float:
    """Growth per step, by least squares."""
    return float(np.polyfit(range(len(values)), values, deg=1)[0])


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("stage", [ATTENTION, FEATURES])
def test_500_steps_leave_nothing_behind(tmp_path, stage):
    teacher, watch = tiny_vit(), Watch()
    settings = {"max_steps": STEPS, "train_dataset": NoiseImages(16), "save_strategy": "steps", "save_steps": 100}
    trainer = trainer_of(stage, tmp_path, student_of(teacher), teacher, callbacks=[watch], **settings)
    trainer.train()
    del trainer
    gc.collect()
    assert len(watch.memory) == STEPS
    assert slope(watch.memory[WARM_UP:]) < MOST_PER_STEP
    assert max(watch.files[WARM_UP:]) <= watch.files[WARM_UP] + 1
    assert max(watch.threads[WARM_UP:]) <= watch.threads[WARM_UP]
