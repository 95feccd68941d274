"""Query, key and value as one product give the same answers, and nothing but inference ever sees them."""

import copy
import pickle

import peft
import pytest
import torch
from family_helpers import RECTANGULAR, inputs_of, randomize, stock_model, tensors, tiny_config
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_adala import UsageError, attention_interface, attention_map
from modeling_adala.fused_projections import FusedProjections
from modeling_adala.inspection.towers import FAMILIES, attention_modules
from trainers.report.pictures import query_attention

MAPS = {
    "hedgehog": {},
    "hedgehog, all options": {"feature_dim": 24, "scale": 0.7, "center_keys": True},
    "t2r": {"feature_dim": 24, "scale": 0.7},
    "t2r, centered": {"center_keys": True},
    "elu": {"scale": 0.7},
    "exp": {},
}
NOT_FOLDED = ("t2r, centered", "elu", "exp")


def tiny_model(name: str = "vit", feature_map: str = "hedgehog", head: str = "Model", dtype=torch.float64, **options):
    """The first layer linear, the second softmax; learned maps far from the identity."""
    torch.manual_seed(0)
    options = {"softmax_layers": [1], "feature_map_kwargs": MAPS[feature_map]} | options
    config = tiny_config(FAMILIES[name].config_class, feature_map=feature_map.partition(",")[0], **options)
    model = randomize(FAMILIES[name].classes[head](config))
    for parameter in attention_modules(model)[0].feature_map.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.to(dtype)


def inputs_for(model: nn.Module) -> dict:
    dtype = next(model.parameters()).dtype
    return {key: x.to(dtype) if key == "pixel_values" else x for key, x in inputs_of(model, RECTANGULAR).items()}


def run(model: nn.Module) -> torch.Tensor:
    """The answers without gradients, flat."""
    with torch.no_grad():
        return torch.cat([x.flatten() for x in tensors(model(**inputs_for(model)))])


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


class Products(TorchDispatchMode):
    """Counts products with weights."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in ("addmm", "mm", "linear")
        return func(*args, **(kwargs or {}))


# --- the same answers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_gives_the_same_answers(name):
    model = tiny_model(name)
    expected = run(model)
    model.fuse_qkv_projections()
    assert_close(run(model), expected)
    folds = attention_modules(model)[0].folded_feature_map is not None
    assert folds == (name != "dinov3_vit")  # rotary positions come between the two projections


@pytest.mark.parametrize("feature_map", MAPS)
def test_every_feature_map_gives_the_same_answers(feature_map):
    model = tiny_model("dinov2", feature_map, qkv_bias=feature_map != "t2r")  # a bias of the map's own, too
    expected = run(model)
    model.fuse_qkv_projections()
    assert_close(run(model), expected)
    assert (attention_modules(model)[0].folded_feature_map is None) == (feature_map in NOT_FOLDED)


@pytest.mark.parametrize("name", ["vit", "clip_vision_model", "dinov3_vit"])
def test_one_product_instead_of_three(name):
    model = tiny_model(name, dtype=torch.float32)
    counts = []
    for fuse in (False, True):
        if fuse:
            model.fuse_qkv_projections()
        with Products() as products:
            run(model)
        counts.append(products.count)
    assert counts[0] - counts[1] == 2 * len(attention_modules(model))


@pytest.mark.parametrize("feature_map", ["hedgehog", "t2r", "elu"])
def test_the_operator_reads_the_product_where_it_lies(feature_map, monkeypatch):
    model, read = tiny_model("vit", feature_map, softmax_layers=[]), []
    operator = attention_interface.linear_attention

    def tapped(query, key, value, *args, **kwargs):
        read.append({x.untyped_storage().data_ptr() for x in (query, key, value)})
        return operator(query, key, value, *args, **kwargs)

    monkeypatch.setattr(attention_interface, "linear_attention", tapped)
    model.fuse_qkv_projections()
    run(model)
    assert [len(storages) for storages in read] == [1, 1]  # a copy would be memory of its own


def test_rounding_to_bfloat16_costs_no_more_than_one_by_one():
    model = tiny_model("vit", num_hidden_layers=1, softmax_layers=[])
    attention, errors = attention_modules(model)[0], []
    hidden_states = torch.randn(4, 65, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = attention(hidden_states)[0]
        model.to(torch.bfloat16)
        for fuse in (False, True):
            if fuse:
                model.fuse_qkv_projections()
            errors.append((attention(hidden_states.bfloat16())[0] - expected).norm() / expected.norm())
    assert errors[1] <= 1.5 * errors[0]


def test_weights_and_attention_maps_are_those_of_the_model():
    model = tiny_model(dtype=torch.float32)
    pixels = inputs_for(model)["pixel_values"]

    def look() -> list[torch.Tensor]:
        maps = [attention_map(model, pixels, layer, interpolate_pos_encoding=True) for layer in (0, 1)]
        return [*maps, query_attention(model, pixels, 0, (1, 2))]

    before = look()
    model.fuse_qkv_projections()
    for actual, expected in zip(look(), before, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_fused_model_compiles_whole_and_exports():
    model = tiny_model(dtype=torch.float32)
    inputs, expected = inputs_for(model), run(model)
    model.fuse_qkv_projections()
    run(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    exported = torch.export.export(model, (), kwargs=inputs)
    for program in (compiled, exported.module()):
        actual = torch.cat([x.flatten() for x in tensors(program(**inputs))])
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    products = [node for node in exported.graph.nodes if node.target is torch.ops.aten.linear.default]
    layers = len(attention_modules(model))
    assert len(products) == 4 * layers + 1  # q/k/v, o, two of the MLP; the pooler


# --- parameters stay where they are ----------------------------------------------------------------------------------


def test_state_dict_and_files_know_nothing_of_it(tmp_path):
    model = tiny_model(dtype=torch.float32)
    before, expected = {key: x.clone() for key, x in model.state_dict().items()}, run(model)
    model.fuse_qkv_projections()
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(run(loaded), expected)


def test_unfused_it_is_the_model_it_was():
    model = tiny_model()
    expected, representation, buffers = run(model), repr(model), dict(model.named_buffers()).keys()
    model.fuse_qkv_projections()
    model.fuse_qkv_projections()  # twice is once
    assert run(model).shape == expected.shape
    model.unfuse_qkv_projections()
    model.unfuse_qkv_projections()
    assert torch.equal(run(model), expected)
    assert repr(model) == representation
    assert dict(model.named_buffers()).keys() == buffers
    assert not any(isinstance(module, FusedProjections) for module in model.modules())


def test_copies_and_pickles_are_models_of_their_own():
    model = tiny_model()
    model.fuse_qkv_projections()
    expected = run(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_close(run(other), expected)
        change_in_place(other)
        other.unfuse_qkv_projections()
        changed = run(other)
        other.fuse_qkv_projections()
        assert_close(run(other), changed)
        assert not torch.allclose(changed, expected)
        assert torch.equal(run(model), expected)


# --- changed weights -----------------------------------------------------------------------------------------------


@torch.no_grad()
def change_in_place(model):
    attention_modules(model)[0].k_proj.bias.add_(torch.linspace(0, 1, 32))


@torch.no_grad()
def change_feature_map(model):
    attention_modules(model)[0].feature_map.weight_q.mul_(2)


@torch.no_grad()
def change_softmax_layer(model):
    attention_modules(model)[1].v_proj.weight.mul_(2)


def load(model):
    model.load_state_dict({key: 1.5 * x for key, x in model.state_dict().items()})


def step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    sum(x.square().mean() for x in tensors(model.train()(**inputs_for(model)))).backward()
    optimizer.step()
    model.eval()


def assign_data(model):
    projection = attention_modules(model)[0].q_proj
    projection.weight.data = projection.weight.data * 2


def write_unseen_and_evaluate(model):
    for parameter in attention_modules(model)[0].parameters():
        parameter.data.mul_(1.5)  # as moving averages do; no version counts this
    model.eval()


def write_unseen_and_fuse_again(model):
    attention_modules(model)[0].feature_map.weight_q.data.mul_(2)
    model.fuse_qkv_projections()


def replace_layer(model):
    attention_modules(model)[0].v_proj = nn.Linear(32, 32).double()


CHANGES = [change_in_place, change_feature_map, change_softmax_layer, load, step, assign_data, replace_layer]


@pytest.mark.parametrize("change", [*CHANGES, write_unseen_and_evaluate, write_unseen_and_fuse_again])
def test_changed_weights_are_seen(change):
    model = tiny_model()
    model.fuse_qkv_projections()
    before = run(model)
    change(model)
    after = run(model)
    model.unfuse_qkv_projections()
    assert_close(after, run(model))
    assert not torch.allclose(after, before)


def test_it_follows_the_model_to_another_dtype():
    model = tiny_model()
    model.fuse_qkv_projections()
    expected = run(model)
    model.to(torch.float32)
    torch.testing.assert_close(run(model).double(), expected, rtol=0, atol=1e-4)
    assert {x.dtype for x in (*model.parameters(), *model.buffers())} == {torch.float32}


# --- where it must not be used ---------------------------------------------------------------------------------------


def gradients(model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    sum(x.square().mean() for x in tensors(model(**inputs_for(model)))).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("training", [True, False])
def test_gradients_go_to_the_parameters(training):
    model = tiny_model()
    expected = gradients(model.train(training))
    model.eval().fuse_qkv_projections()
    actual = gradients(model.train(training))
    assert actual.keys() == expected.keys()
    assert sum("feature_map" in name or "_proj" in name for name in actual) >= 14
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_softmax_mode_is_the_teacher():
    model = tiny_model(dtype=torch.float32)
    teacher = stock_model("vit")
    teacher.load_state_dict({key: x for key, x in model.state_dict().items() if ".feature_map." not in key})
    model.fuse_qkv_projections()
    linear = run(model)
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(run(model), run(teacher), rtol=0, atol=1e-5)
    model.set_attn_implementation("adala")
    assert torch.equal(run(model), linear)


def test_training_mode_and_other_layers_are_refused():
    model = tiny_model().train()
    with pytest.raises(UsageError, match=r"model\.eval\(\)"):
        model.fuse_qkv_projections()
    model.eval()
    attention_modules(model)[1].v_proj = nn.Identity()
    with pytest.raises(UsageError, match=r"layers\.1\.attention\.v_proj .*merge_and_unload"):
        model.fuse_qkv_projections()
    assert not any(isinstance(module, FusedProjections) for module in model.modules())  # all or none


@pytest.mark.parametrize("part", ["q_proj", "v_proj", "feature_map"])
def test_hooks_are_refused_before_and_honored_after(part):
    model = tiny_model(softmax_layers=[])
    model.fuse_qkv_projections()
    fused = run(model)
    module = getattr(attention_modules(model)[0], part)
    handle = module.register_forward_pre_hook(lambda module, args: (2 * args[0], *args[1:]))
    hooked = run(model)
    assert not torch.allclose(hooked, fused)
    model.unfuse_qkv_projections()
    assert_close(run(model), hooked)
    with pytest.raises(UsageError, match=rf"layers\.0\.attention\.{part} is more than its weights"):
        model.fuse_qkv_projections()
    handle.remove()
    model.fuse_qkv_projections()
    assert torch.equal(run(model), fused)


def test_adapters_are_refused_before_and_honored_after():
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = tiny_model()
    adapted = peft.get_peft_model(copy.deepcopy(model), config).eval()
    with pytest.raises(UsageError, match=r"q_proj is more than its weights"):
        adapted.fuse_qkv_projections()
    expected = run(adapted.base_model.model)
    merged = adapted.merge_and_unload()
    merged.fuse_qkv_projections()
    assert_close(run(merged), expected)

    model.fuse_qkv_projections()
    plain = run(model)
    later = peft.get_peft_model(model, config).eval()
    state = {key: torch.ones_like(x) for key, x in later.state_dict().items() if "lora_" in key}
    later.load_state_dict(state, strict=False)
    with later.disable_adapter():
        assert_close(run(model), plain)
    adapted_output = run(model)
    assert not torch.allclose(adapted_output, plain)
    model.unfuse_qkv_projections()
    assert_close(run(model), adapted_output)
