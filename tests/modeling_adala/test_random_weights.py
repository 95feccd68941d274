"""No AdaLA model is left with random blocks: `from_pretrained` itself refuses, whoever calls it."""

import pytest
import torch
from family_helpers import CASES, randomize, tiny_config
from safetensors.torch import load_file, save_file

from modeling_adala import CheckpointError
from modeling_adala.inspection.towers import vision_tower
from modeling_adala.modeling_adala import MODELS


def saved(name: str, head: str, folder):
    model = MODELS[name][head](tiny_config(MODELS[name]["Model"].config_class))
    randomize(model)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_renamed_weights_are_refused(name, tmp_path):
    model = saved(name, "Model", tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({f"zzz.{key}": tensor for key, tensor in load_file(path).items()}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match="weights of its blocks are missing") as error:
        type(model).from_pretrained(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize(("name", "head"), CASES)
def test_what_opens_has_the_weights_that_were_saved(name, head, tmp_path):
    """Every class of a family on a checkpoint of every head: equal blocks, or refused (other sizes: upstream)."""
    blocks = vision_tower(saved(name, head, tmp_path)).state_dict()
    for model_class in MODELS[name].values():
        try:
            opened = vision_tower(model_class.from_pretrained(tmp_path)).state_dict()
        except (CheckpointError, RuntimeError):
            assert model_class is not MODELS[name][head]
            continue
        shared = [key for key in opened if key in blocks and ".attention." in key.replace("self_attn", "attention")]
        assert shared and all(torch.equal(opened[key], blocks[key]) for key in shared)


def test_loading_info_is_given_where_it_is_asked_for(tmp_path):
    model = saved("vit", "Model", tmp_path)
    _, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
