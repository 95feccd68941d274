"""Imports are cheap and have no side effects: modules load on first use, and matplotlib keeps its state."""

import subprocess
import sys

import pytest

import trainers


def test_names_of_the_package_are_those_of_its_modules():
    assert sorted(trainers.__all__) == sorted(trainers._PLACES)
    for name in trainers.__all__:
        value = getattr(trainers, name)
        assert not callable(value) or value.__module__ == f"trainers.{trainers._PLACES[name]}", name
    assert set(trainers.__all__) <= set(dir(trainers))
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = trainers.Nothing


CODE = """
import sys, time, transformers
start = time.perf_counter()
import trainers
assert time.perf_counter() - start < 1
assert not {"datasets", "matplotlib", "evaluate", "accelerate"} & sys.modules.keys(), "not lazy"

from trainers import *
import trainers.report.pictures, trainers.report.report
assert AttentionAlignmentTrainer.__name__ == "AttentionAlignmentTrainer"
assert "matplotlib" not in sys.modules, "imported before a picture is drawn"

import matplotlib
matplotlib.use("svg")
from matplotlib import pyplot
mine = pyplot.figure()
import torch
from pathlib import Path
folder = Path(sys.argv[1])
trainers.report.pictures.draw_colors(folder / "colors.png", torch.rand(1, 3, 8, 8), {"a": torch.rand(1, 4, 4, 3)})
weights = {"a": torch.rand(2, 4, 4)}
trainers.report.pictures.draw_attention(folder / "attention.png", torch.rand(3, 8, 8), (0, 0), weights, "t")
trainers.report.report.draw_blocks(folder / "blocks.png", [], {"converted": {"block_errors": [0.1, 0.2]}})
trainers.report.report.draw_speed(folder / "speed.png", [{"size": 32, "teacher": 1.0, "student": 0.5}])
assert matplotlib.get_backend() == "svg" and pyplot.get_fignums() == [mine.number], "not the user's own any more"
"""


def test_imports_cost_nothing_and_pictures_leave_matplotlib_as_the_user_has_it(tmp_path):
    """In a process of its own, as other tests have imported everything."""
    result = subprocess.run([sys.executable, "-c", CODE, str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"colors.png", "attention.png", "blocks.png", "speed.png"}
