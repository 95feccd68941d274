"""A short fault storm; the long one is `python tests/storm.py`."""

import os
from pathlib import Path

import pytest
from storm import Storm
from training_helpers import save_teacher

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the storm forks"),
]


@pytest.fixture(scope="module")
def storm(tmp_path_factory) -> Storm:
    teacher = Path(save_teacher(tmp_path_factory.mktemp("teacher")))
    return Storm(tmp_path_factory.mktemp("storm"), teacher)


def test_killed_runs_end_with_the_result_of_an_undisturbed_one(storm):
    for _ in range(4):
        storm.kill()
    storm.finish()
    assert not storm.failures
    assert sum(storm.counts.values()) >= 5


def test_damaged_checkpoints_are_passed_over_or_named(storm):
    for _ in range(2):
        storm.damage()
    assert not storm.failures
