"""What the report measures and draws: tokens as the family counts them, in a precision that the machine has."""

import json

import pytest
import torch
from family_helpers import stock_model

from modeling_adala import convert
from modeling_adala.inspection.towers import forward_features
from modeling_adala.modeling_adala import MODELS
from trainers import base_config
from trainers.report.report import measure_speed, summary_table


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_of_the_model(name):
    teacher = stock_model(name)
    student = convert(teacher, check_parity=False)
    row = measure_speed(teacher, student, budget=0.0)["rows"][0]
    with torch.no_grad():
        pixels = torch.zeros(1, 3, row["size"], row["size"])
        assert forward_features(teacher, pixels).shape[1] == row["tokens"]


@pytest.mark.parametrize("fast", [True, False])
def test_precision_is_one_that_the_machine_multiplies(monkeypatch, fast):
    monkeypatch.setattr(base_config, "has_fast_bf16", lambda: fast)
    teacher, dtypes = stock_model("dinov2"), set()
    student = convert(teacher, check_parity=False)
    for model in (teacher, student):
        model.encoder.layer[0].mlp.fc1.register_forward_hook(lambda _, __, output: dtypes.add(str(output.dtype)))
    speed = measure_speed(teacher, student, budget=0.0)
    assert dtypes == {f"torch.{speed['dtype']}"} == ({"torch.bfloat16"} if fast else {"torch.float32"})
    assert speed["autocast"] == ("bfloat16" if fast else None)
    assert json.loads(json.dumps(speed)) == speed


def test_teacher_without_a_head_for_the_data_has_no_accuracy():
    evaluations = {
        "teacher": {},
        "converted": {"num_eval_images": 5, "teacher_knn_accuracy": 0.9, "student_knn_accuracy": 0.5},
        "supervised": {"num_eval_images": 5, "head_accuracy": 0.8},
    }
    heading, teacher, _, supervised = summary_table(evaluations, {"stages": {}})
    assert teacher[heading.index("accuracy")] == "" and supervised[heading.index("accuracy")] == "80.0%"
    assert teacher[heading.index("k-NN")] == "90.0%"
    evaluations["teacher"]["head_accuracy"] = 0.7
    heading, teacher, *_ = summary_table(evaluations, {"stages": {}})
    assert teacher[heading.index("accuracy")] == "70.0%"
