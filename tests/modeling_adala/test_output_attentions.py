"""`output_attentions`, however it is asked for, gives the weights of linear and of softmax layers, in every family."""

import json

import pytest
import torch
from family_helpers import CASES, inputs_of, is_vision_text, randomize, stock_model, tiny_config
from transformers import PreTrainedModel

from modeling_adala import attention_map, convert
from modeling_adala.configuration_adala import vision_config
from modeling_adala.inspection.towers import attention_implementation, vision_tower
from modeling_adala.modeling_adala import MODELS

every_family = pytest.mark.parametrize("name", MODELS)


def tiny_model(name: str, head: str = "Model", config=None) -> PreTrainedModel:
    """The first layer linear, the second softmax."""
    family = MODELS[name]
    torch.manual_seed(0)
    config = tiny_config(family["Model"].config_class, softmax_layers=[1]) if config is None else config
    return randomize(family[head](config))


@torch.no_grad()
def attentions_of(model: PreTrainedModel, **kwargs) -> tuple[torch.Tensor, ...]:
    output = model.eval()(**inputs_of(model), **kwargs)
    return output.get("vision_model_output", output).attentions


def maps_of(model: PreTrainedModel) -> list[torch.Tensor]:
    inputs = inputs_of(model.eval())
    pixels = inputs.pop("pixel_values")
    return [attention_map(model, pixels, layer, **inputs) for layer in range(2)]


def assert_attentions(model: PreTrainedModel, **kwargs) -> None:
    attentions, expected = attentions_of(model, **kwargs), maps_of(model)
    assert len(attentions) == 2
    assert all(map(torch.equal, attentions, expected))
    torch.testing.assert_close(attentions[0].sum(dim=-1), torch.ones(attentions[0].shape[:-1]), rtol=0, atol=1e-4)
    with attention_implementation(model, "eager"):  # softmax in both: the first layer attends otherwise
        softmax = attentions_of(model, output_attentions=True)
    linear = 0 not in vision_tower(model).config.softmax_layers
    assert torch.allclose(softmax[0], attentions[0], atol=1e-4) != linear


@pytest.mark.parametrize(("name", "head"), CASES)
def test_the_argument_of_a_call(name, head):
    assert_attentions(tiny_model(name, head), output_attentions=True)
    assert not attentions_of(tiny_model(name, head))


@every_family
def test_the_field_of_a_configuration(name):
    values = tiny_config(MODELS[name]["Model"].config_class, softmax_layers=[1]).to_dict()
    values.get("vision_config", values)["output_attentions"] = True
    config = MODELS[name]["Model"].config_class(**values)
    assert vision_config(config).output_attentions
    model = tiny_model(name, config=config)
    assert_attentions(model)
    assert not attentions_of(model, output_attentions=False)  # the argument wins


@every_family
def test_the_field_set_on_a_model(name):
    model = tiny_model(name)
    vision_config(model.config).output_attentions = True
    assert_attentions(model)
    vision_config(model.config).output_attentions = False
    assert not attentions_of(model)


@every_family
def test_an_argument_of_from_pretrained(name, tmp_path):
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    opened = type(model).from_pretrained(tmp_path, output_attentions=True)
    assert opened.config.output_attentions
    assert vision_tower(opened).config._attn_implementation == "adala"
    if is_vision_text(name):  # it reaches no tower, in stock models neither, but text can give weights now
        with torch.no_grad():
            output = opened.eval()(**inputs_of(opened), output_attentions=True)
        assert len(output.text_model_output.attentions) == 2
        assert_attentions(opened, output_attentions=True)
    else:
        assert_attentions(opened)


@every_family
def test_a_teacher_that_asks_for_it_opens_converts_and_comes_back(name, tmp_path):
    stock_model(name).save_pretrained(tmp_path / "teacher")
    path = tmp_path / "teacher/config.json"
    config = json.loads(path.read_text())
    for part in (config, config.get("vision_config", config)):
        part["output_attentions"] = True
    path.write_text(json.dumps(config))
    opened = MODELS[name]["Model"].from_pretrained(tmp_path / "teacher")
    converted = convert(str(tmp_path / "teacher"))
    converted.save_pretrained(tmp_path / "student")
    again = type(converted).from_pretrained(tmp_path / "student")
    for student in (opened, converted, again):
        assert_attentions(student)
    assert all(map(torch.equal, attentions_of(again), attentions_of(converted)))


@every_family
def test_softmax_mode_is_as_strict_as_the_stock_model(name):
    if is_vision_text(name):
        pytest.skip("stock models of two towers let each say for itself")
    model = tiny_model(name)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=r"not supported.*sdpa"):
        model.config.output_attentions = True
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    assert len(attentions_of(model)) == 2
