"""Loss components in the log lines of evaluations, whatever the caller calls them."""

import pytest
from training_helpers import QUIET, NoiseImages, tiny_vit

from modeling_adala import convert
from trainers.runs.stages import STAGES

ATTENTION, FEATURES, _ = STAGES


@pytest.fixture(params=[ATTENTION, FEATURES])
def trainer(request, tmp_path):
    teacher, dataset = tiny_vit(), NoiseImages(8, labels=False)
    student = convert(teacher, check_parity=False)
    args = STAGES[request.param].config_class(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, per_device_eval_batch_size=8, **QUIET
    )
    options = {"teacher_model": teacher, "train_dataset": dataset, "eval_dataset": dataset}
    return STAGES[request.param].trainer_class(model=student, args=args, **options)


def components(metrics: dict, prefix: str) -> dict[str, float]:
    plain = {"loss", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time"}
    names = {name.removeprefix(f"{prefix}_"): value for name, value in metrics.items() if name.startswith(prefix)}
    return {name: value for name, value in names.items() if name not in plain}


def test_components_have_the_prefix_of_the_evaluation_and_stay_in_its_line(trainer):
    expected = components(trainer.evaluate(), "eval")
    assert len(expected) >= 2 and all(value > 0 for value in expected.values())
    metrics = trainer.evaluate(NoiseImages(8, labels=False, seed=1), metric_key_prefix="test")
    other = components(metrics, "test")
    assert other.keys() == expected.keys() and not components(metrics, "eval")
    assert all(other[name] != expected[name] for name in expected)
    assert components(trainer.evaluate(), "eval") == expected
    assert components(trainer.state.log_history[-2], "test") == other


def test_what_logs_nothing_leaks_into_no_line(trainer):
    expected = components(trainer.evaluate(), "eval")
    trainer.predict(NoiseImages(8, labels=False, seed=1))
    assert components(trainer.evaluate(), "eval") == expected


def test_evaluations_of_several_data_sets_are_told_apart(trainer):
    trainer.eval_dataset = {"a": NoiseImages(8, labels=False), "b": NoiseImages(8, labels=False, seed=1)}
    metrics = trainer.evaluate()
    first, second = components(metrics, "eval_a"), components(metrics, "eval_b")
    assert len(first) >= 2 and first.keys() == second.keys() and first != second
