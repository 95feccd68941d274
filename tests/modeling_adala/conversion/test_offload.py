"""Weights that are not where the model runs: off-loaded by accelerate, or on "meta"."""

import copy

import pytest
import torch
from family_helpers import inputs_of, randomize, tensors, tiny_config
from transformers import AutoModel

from modeling_adala import UsageError, attention_map
from modeling_adala.inspection.towers import attention_modules
from modeling_adala.modeling_adala import MODELS


def tiny_model(feature_map: str, name: str = "vit", **options):
    torch.manual_seed(0)
    family = MODELS[name]
    model = randomize(family["Model"](tiny_config(family["Model"].config_class, feature_map=feature_map, **options)))
    for module in attention_modules(model):
        for parameter in module.feature_map.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    return model


@torch.no_grad()
def run(model, **kwargs) -> list[torch.Tensor]:
    return tensors(model(**inputs_of(model), **kwargs))


@pytest.mark.parametrize("backend", [None, "torch", "reference"])
@pytest.mark.parametrize("feature_map", ["hedgehog", "t2r", "elu"])
def test_layers_on_disk_are_the_layers_in_memory(feature_map, backend, tmp_path):
    model = tiny_model(feature_map, backend=backend)
    model.save_pretrained(tmp_path / "model")
    device_map = {"embeddings": "cpu", "layers.0": "cpu", "layers.1": "disk", "layernorm": "cpu", "pooler": "cpu"}
    options = {"device_map": device_map, "offload_folder": tmp_path / "disk"}
    offloaded = AutoModel.from_pretrained(tmp_path / "model", **options).eval()
    on_disk, in_memory = (attention_modules(m)[1] for m in (offloaded, model))
    assert on_disk.q_proj.weight.is_meta
    assert all(parameter.is_meta for parameter in on_disk.feature_map.parameters())
    for actual, expected in zip(run(offloaded, output_attentions=True), run(model, output_attentions=True)):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    pixels = inputs_of(model)["pixel_values"]
    torch.testing.assert_close(attention_map(offloaded, pixels, 1), attention_map(model, pixels, 1))
    assert on_disk.q_proj.weight.is_meta and in_memory.q_proj.weight.device.type == "cpu"  # put back


@pytest.mark.parametrize("backend", [None, "torch", "reference"])
@pytest.mark.parametrize("feature_map", ["hedgehog", "t2r"])
def test_feature_maps_on_meta_are_a_mistake_and_no_crash(feature_map, backend):
    model = tiny_model(feature_map, backend=backend)
    attention_modules(model)[1].feature_map.to("meta")
    with pytest.raises(
        UsageError, match="feature_map has weights on meta and gets queries and keys on cpu; load"
    ) as e:
        run(model)
    assert "\n" not in str(e.value)


def test_a_model_on_meta_still_tells_shapes():
    model = tiny_model("hedgehog").to("meta")
    with torch.no_grad():
        output = model(torch.empty(2, 3, 32, 32, device="meta"))
    assert output.last_hidden_state.shape == (2, 17, 32) and output.last_hidden_state.is_meta


@pytest.mark.parametrize("name", MODELS)
def test_hooks_on_every_module_change_nothing(name):
    """Logging, profiling and pruning libraries put them there."""
    model = tiny_model("hedgehog", name)
    hooked, ran = copy.deepcopy(model), set()
    for path, module in hooked.named_modules():
        module.register_forward_hook(lambda *args, path=path: ran.add(path))
        module.register_forward_pre_hook(lambda *args: None)
    for actual, expected in zip(run(hooked), run(model), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert {path for path, _ in hooked.named_modules() if path.endswith("feature_map")} <= ran
