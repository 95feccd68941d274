"""Presets: what they set, that the user's settings win, and that a run remembers which it was."""

import pytest

from modeling_adala import UsageError
from trainers import RecipeConfig
from trainers.runs.presets import PRESETS
from vit_adala.cli import main
from vit_adala.commands import run

NEEDED = {"teacher": "vit-digits", "dataset": "mnist-digits"}


def test_the_paper_is_plain_linear_attention_and_the_final_features():
    config = RecipeConfig.from_settings({"recipe": "paper", **NEEDED})
    options = config.linear_attention
    assert (options.feature_map, options.local_mixing, options.softmax_layers) == ("elu", 0, [])
    assert config.feature_alignment["hidden_states"] == [] and config.recipe == "paper"
    default = RecipeConfig.from_settings(NEEDED)
    assert default.recipe == "default" and default == RecipeConfig(**NEEDED)


def test_settings_win_over_those_of_a_preset():
    section = {"feature_alignment": {"max_steps": 7}}
    config = RecipeConfig.from_settings({"recipe": "paper", "feature_map": "relu", **section, **NEEDED})
    assert config.feature_map == "relu" and config.feature_alignment["max_steps"] == 7
    assert config.feature_alignment["hidden_states"] == []
    assert PRESETS["paper"]["feature_alignment"].get("max_steps") is None  # left as it was


def test_a_yaml_file_names_its_preset_and_the_record_of_a_run_repeats_it(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("recipe: paper\nteacher: vit-digits\ndataset: mnist-digits\nlocal_mixing: 3\n")
    config = RecipeConfig.from_yaml(path)
    assert (config.recipe, config.feature_map, config.local_mixing) == ("paper", "elu", 3)
    path.write_text(config.to_yaml())
    again = RecipeConfig.from_yaml(path)
    assert again == config and again.recipe == "paper" and again.to_dict()["recipe"] == "paper"


def test_unknown_presets_are_refused():
    with pytest.raises(UsageError, match=r"recipe='papr' is unknown \(did you mean 'paper'"):
        RecipeConfig.from_settings({"recipe": "papr", **NEEDED})


@pytest.mark.parametrize("words", [["paper"], ["--set", "recipe=paper"]])
def test_the_command_takes_a_preset(words, monkeypatch, tmp_path, capsys):
    seen = []
    monkeypatch.setattr(run, "run_recipe", lambda config, from_stage: seen.append(config))
    flags = ["--teacher", "vit-digits", "--dataset", "mnist-digits", "--output-dir", str(tmp_path / "out")]
    assert main(["run", *words, *flags, "--feature-map", "t2r"]) == 0
    assert (seen[0].recipe, seen[0].feature_map, seen[0].feature_alignment["hidden_states"]) == ("paper", "t2r", [])
