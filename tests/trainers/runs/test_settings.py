"""Settings: what YAML and texts become, which values are refused, and what a machine decides."""

import dataclasses
from pathlib import Path

import pytest
import torch
import yaml
from transformers import SchedulerType

from modeling_adala import UsageError
from trainers import AttentionAlignmentConfig, FeatureAlignmentConfig, SupervisedConfig
from trainers.base_config import has_fast_bf16
from trainers.runs.plain_yaml import dump_yaml, parse_yaml
from trainers.runs.recipe_config import RecipeConfig
from trainers.runs.settings import Interval, did_you_mean, fit_type
from vit_adala.arguments import parse_settings


def test_settings_are_read_as_yaml():
    pairs = [
        "a=1e-4",
        "b=1e3",
        "c=0.5",
        "d=3",
        "e=true",
        "f=text",
        "g=[1, 2]",
        "h=",
        "i={x: 1}",
        "j=train[:500]",
        "k=a=b",
        "l=no",
        "m=2024-01-01",
        "n=010",
    ]
    expected = {
        "a": 1e-4,
        "b": 1000.0,
        "c": 0.5,
        "d": 3,
        "e": True,
        "f": "text",
        "g": [1, 2],
        "h": None,
        "i": {"x": 1},
    }
    settings = parse_settings(pairs)
    assert settings == expected | {"j": "train[:500]", "k": "a=b", "l": "no", "m": "2024-01-01", "n": 10}
    assert isinstance(settings["a"], float) and isinstance(settings["d"], int)
    assert parse_settings(["f=nan", "g=infinity"]) == {"f": "nan", "g": "infinity"}  # words, unless .nan and .inf


def test_dotted_settings_nest_and_the_last_one_wins():
    pairs = ["stage.max_steps=1", "stage.deep.x=2", "seed=3", "stage.max_steps=4"]
    assert parse_settings(pairs) == {"stage": {"max_steps": 4, "deep": {"x": 2}}, "seed": 3}
    assert parse_settings([]) == {}


@pytest.mark.parametrize(
    "value, hint, expected",
    [
        ("1e-4", float, 1e-4),
        (1, float, 1.0),
        (2e3, int, 2000),
        ("8", int, 8),
        (None, int | None, None),
        (3, list[int], [3]),
        ("0,1", list[int], [0, 1]),
        ("a, b", list[str], ["a", "b"]),
        ("0 1", list[int], [0, 1]),
        ("[-1, 2]", list[int], [-1, 2]),
        ("[]", list[int] | None, []),
        (None, list[int], []),
        (None, list[int] | None, None),
        (None, dict, {}),
        ("{scale: 2}", dict, {"scale": 2}),
        ('{"scale": 1e-1}', dict, {"scale": 0.1}),
        ("yes", bool, True),
        ("False", bool, False),
        ("none", int | None, None),
        ("none", str | None, "none"),
        ("12345678901234567891", int, 12345678901234567891),
        ("wandb,trackio", str | list[str] | None, ["wandb", "trackio"]),
        ("cosine", SchedulerType | str, "cosine"),
        ("x", str | dict | None, "x"),
        (Path("x"), str, Path("x")),
    ],
)
def test_values_become_what_a_field_declares(value, hint, expected):
    fitted = fit_type("name", value, hint)
    assert fitted == expected and type(fitted) is type(expected)


@pytest.mark.parametrize(
    "value, hint",
    [
        (True, int),
        (True, float),
        (1.5, int),
        ("x", float),
        (7, str),
        (1, bool),
        ("maybe", bool),
        ("a", list[int]),
        ("0;1", list[int]),
        ([], int),
        (float("inf"), int),
        ("[1]", dict),
        ("a: b: c", dict),
        ("1" * 5000, int),
    ],
)
def test_values_that_do_not_fit_a_field_are_refused(value, hint):
    with pytest.raises(UsageError, match=r"^some\.name=.* must be "):
        fit_type("some.name", value, hint)


@pytest.mark.parametrize(
    ("allowed", "good", "bad"),
    [
        (Interval(1), (1, 5, 1e9), (0, -1, 1e10, float("nan"), float("inf"))),
        (Interval(1, also=-1), (-1, 1), (0, -2)),
        (Interval(0, above=True), (1e-9, 3), (0, -1)),
        (Interval(0, 1, below=True), (0, 0.999), (1, 2)),
    ],
)
def test_intervals_take_what_they_say(allowed, good, bad):
    assert not [value for value in good if allowed.complaint(value)]
    assert all((allowed.complaint(value) or "").startswith("must be ") for value in bad)


def test_close_names_are_suggested():
    assert did_you_mean("learning_rat", ["weight_decay", "learning_rate"]) == " (did you mean 'learning_rate'?)"
    assert did_you_mean("banana", ["weight_decay", "learning_rate"]) == ""


# --- YAML ------------------------------------------------------------------------------------------------------------

TRICKY = [
    "1e-4",
    "1e5",
    "no",
    "null",
    "true",
    "2024-01-01",
    "010",
    "0o7",
    "1:30",
    "1_0",
    ".inf",
    "+3",
    "",
    "x: y",
    "é",
]


def test_what_is_dumped_is_read_as_the_same_values_by_us_and_by_any_yaml_reader():
    shared = {"max_steps": 3}
    settings = {"texts": TRICKY, "numbers": [1e-5, 3, float("inf"), -0.5], "none": None, "a": shared, "b": shared}
    text = dump_yaml(settings)
    assert parse_yaml(text) == yaml.safe_load(text) == settings


def test_a_recipe_is_read_as_it_was_written(tmp_path):
    config = RecipeConfig(teacher="1e5", dataset="2024-01-01", supervised={"learning_rate": 1e-4}, softmax_layers=[-1])
    (tmp_path / "r.yaml").write_text(config.to_yaml())
    assert RecipeConfig.from_yaml(tmp_path / "r.yaml") == config


# --- the stages' configurations --------------------------------------------------------------------------------------

CONFIGS = (AttentionAlignmentConfig, FeatureAlignmentConfig, SupervisedConfig)


@pytest.mark.parametrize("config_class", CONFIGS)
def test_python_gets_the_same_errors_as_the_command_line(config_class, tmp_path):
    for wrong in (
        {"learning_rate": float("nan")},
        {"max_steps": 0},
        {"seed": 2**32},
        {"lr_scheduler_type": "sine"},
        {"report_to": "bogus"},
    ):
        with pytest.raises(ValueError, match=r"|".join(wrong.values() if "lr_scheduler_type" in wrong else wrong)):
            config_class(output_dir=str(tmp_path), **wrong)


@pytest.mark.parametrize("config_class", CONFIGS)
def test_a_configuration_can_be_copied_with_changes(config_class, tmp_path):
    args = config_class(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", eval_strategy="steps")
    copy = dataclasses.replace(args, learning_rate=1e-2)
    assert copy.learning_rate == 1e-2 and copy.eval_strategy == "steps" and copy.report_to == []


def test_best_model_is_the_one_with_the_smallest_error(tmp_path):
    quiet = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
    assert AttentionAlignmentConfig(metric_for_best_model="block_1", **quiet).greater_is_better is False
    assert FeatureAlignmentConfig(metric_for_best_model="cls", **quiet).greater_is_better is False
    assert SupervisedConfig(metric_for_best_model="accuracy", **quiet).greater_is_better is True
    assert SupervisedConfig(**quiet).greater_is_better is None
    assert AttentionAlignmentConfig(**quiet).greater_is_better is None


def test_no_accelerator_is_left_for_the_cpu(tmp_path, monkeypatch):
    """On a machine with an XPU, NPU or MPS, what the CPU multiplies fast decides nothing."""
    monkeypatch.setattr("trainers.base_config.cpu_multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert has_fast_bf16()
    args = SupervisedConfig(output_dir=str(tmp_path))
    assert args.bf16 and args.use_cpu
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert not has_fast_bf16() and has_fast_bf16(use_cpu=True)
    args = SupervisedConfig(output_dir=str(tmp_path))
    assert not args.bf16 and not args.use_cpu
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    args = SupervisedConfig(output_dir=str(tmp_path), bf16=True)
    assert args.bf16 and not args.use_cpu
