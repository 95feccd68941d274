"""Folded models give what they gave before, with fewer parameters, and what cannot be folded stays as it is."""

import copy

import pytest
import torch
from family_helpers import NATIVE, RECTANGULAR, inputs_of, randomize, tensors, tiny_config

from modeling_adala.configuration_adala import vision_config
from modeling_adala.conversion.folding import FOLDED, fold_feature_maps
from modeling_adala.inspection.towers import attention_modules
from modeling_adala.modeling_adala import MODELS

DEFAULTS = {"feature_map": "hedgehog", "softmax_layers": [1]}


def learned_model(name: str, **options):
    family = MODELS[name]
    torch.manual_seed(0)
    config = tiny_config(family["Model"].config_class, num_hidden_layers=3, **DEFAULTS | options)
    return randomize(family["Model"](config)).double()


def double(inputs: dict) -> dict:
    return inputs | {"pixel_values": inputs["pixel_values"].double()}


@pytest.mark.parametrize("feature_map", FOLDED)
@pytest.mark.parametrize("name", [name for name in MODELS if name != "dinov3_vit"])
@torch.no_grad()
def test_outputs_stay_the_same_and_the_map_has_no_weights_any_more(name, feature_map, tmp_path):
    model = learned_model(name, feature_map=feature_map, feature_map_kwargs={"scale": 0.5})
    before, size = copy.deepcopy(model), model.num_parameters()
    assert fold_feature_maps(model)
    heads, width = (attention_modules(before)[0].feature_map.weight_q.shape)[:2]
    weights = width**2 + (0 if feature_map == "hedgehog" else width)
    assert size - model.num_parameters() == 2 * 2 * heads * weights  # two of three layers, q and k
    for shape in (NATIVE, RECTANGULAR):
        inputs = double(inputs_of(model, shape))
        for ours, theirs in zip(tensors(model(**inputs)), tensors(before(**inputs)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    for ours, theirs in zip(attention_modules(model), attention_modules(before), strict=True):
        assert torch.equal(ours.v_proj.weight, theirs.v_proj.weight)
        assert torch.equal(ours.q_proj.weight, theirs.q_proj.weight) == (theirs.feature_map is None)
    config = vision_config(model.config)
    assert config.feature_map == FOLDED[feature_map]
    assert config.feature_map_kwargs == ({"power": 3} if feature_map == "power" else {})
    assert config.softmax_layers == [1]
    model.save_pretrained(tmp_path)
    opened = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval()
    for ours, theirs in zip(tensors(opened(**inputs)), tensors(model(**inputs)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    assert not fold_feature_maps(model)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dinov3_vit", {}),
        ("vit", {"feature_map_kwargs": {"center_keys": True}}),
        ("vit", {"feature_map_kwargs": {"feature_dim": 24}}),
        ("vit", {"feature_map": "t2r", "qkv_bias": False}),
        ("vit", {"feature_map": "softmax_pair"}),
        ("vit", {"feature_map": "elu"}),
        ("vit", {"softmax_layers": [0, 1, 2]}),
    ],
    ids=["rotary", "centered", "wider", "no bias", "softmax pair", "elu", "softmax"],
)
def test_what_cannot_be_folded_stays_as_it_is(name, options):
    model = learned_model(name, **options)
    before = copy.deepcopy(model)
    assert not fold_feature_maps(model)
    assert vision_config(model.config).to_dict() == vision_config(before.config).to_dict()
    states = model.state_dict(), before.state_dict()
    assert states[0].keys() == states[1].keys() and all(map(torch.equal, states[0].values(), states[1].values()))


@torch.no_grad()
def test_a_map_without_bias_folds_into_projections_without():
    model = learned_model("vit", qkv_bias=False)
    inputs = double(inputs_of(model, NATIVE))
    before = model(**inputs)[0]
    assert fold_feature_maps(model) and attention_modules(model)[0].q_proj.bias is None
    torch.testing.assert_close(model(**inputs)[0], before, rtol=1e-9, atol=1e-10)
