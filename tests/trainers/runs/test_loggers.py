"""TensorBoard gets what `metrics.jsonl` gets, and its files neither stop a resumed run nor are lost by it."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_helpers import InterruptAt, save_teacher

import trainers.runs.stages
from vit_adala.cli import main


def test_tensorboard_shows_every_loss_of_a_run_that_was_stopped_and_resumed(tmp_path, monkeypatch):
    teacher, out = save_teacher(tmp_path / "teacher"), tmp_path / "out"
    command = ["align", teacher, "--dataset", "mnist-digits", "--output-dir", str(out), "--report-to", "tensorboard"]
    command += ["--max-steps", "4", "--save-steps", "2", "--logging-steps", "1", "--per-device-train-batch-size", "4"]
    command += ["--use-cpu", "true", "--bf16", "false", "--calibration-images", "4"]
    stage = trainers.runs.stages.STAGES["attention-alignment"].trainer_class
    train = stage.train

    def stopped_at(step: int) -> int:
        with monkeypatch.context() as patch:
            stop = InterruptAt(step)
            patch.setattr(stage, "train", lambda self, **given: (self.add_callback(stop), train(self, **given))[1])
            return main(command)

    assert stopped_at(1) != 0 and not out.exists(), "before the first checkpoint, nothing is left"
    assert stopped_at(3) != 0
    assert main(command) == 0
    assert not (out / "checkpoints").exists()

    logged: dict[str, dict[int, float]] = {}
    events = EventAccumulator(str(out / "runs")).Reload()
    for tag in events.Tags()["scalars"]:
        logged[tag] = {event.step: event.value for event in events.Scalars(tag)}
    assert set(logged["train/loss"]) == {1, 2, 3, 4}
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "grad_norm", "block_0", "block_1"):
        expected = {line["step"]: line[name] for line in lines if name in line and line["step"] in (1, 2, 3, 4)}
        assert logged[f"train/{name}"] == pytest.approx(expected, rel=1e-4), name
