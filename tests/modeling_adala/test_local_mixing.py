"""Local mixing: a depthwise convolution of the values over the patch grid, in every family and form of input."""

import copy

import pytest
import torch
from family_helpers import (
    NATIVE,
    RECTANGULAR,
    inputs_of,
    padded_inputs,
    randomize,
    stock_model,
    tensors,
    tiny_config,
)

from modeling_adala import UsageError, convert, linear_attention
from modeling_adala.attention_interface import LocalMixing
from modeling_adala.inspection.towers import attention_modules, forward_features, vision_tower
from modeling_adala.mixins import num_special_tokens
from modeling_adala.modeling_adala import MODELS

every_family = pytest.mark.parametrize("name", MODELS)


def mixing_model(name: str, head: str = "Model", value: float = 0.3, **options):
    """A model whose kernels are random, or of one value."""
    torch.manual_seed(0)
    config_class = MODELS[name]["Model"].config_class
    model = randomize(MODELS[name][head](tiny_config(config_class, local_mixing=3, **options)))
    for module in attention_modules(model):
        for parameter in module.local_mixing.parameters():
            torch.nn.init.normal_(parameter, std=value)
    return model


def kernel_of(mixing: LocalMixing, patches: torch.Tensor) -> torch.Tensor:
    """The kernel of one image `(heads, patches, dim)`, as `conv2d` takes it."""
    if not mixing.dynamic:
        return mixing.weight
    hidden = mixing.squeeze @ patches.mean(dim=1).flatten()
    own = mixing.expand @ (hidden * hidden.sigmoid())
    return mixing.weight + own.view(mixing.weight.shape)


def naive(weight: torch.Tensor, value: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The definition, token by token, `(heads, tokens, dim)` of one image."""
    heads, tokens, dim = value.shape
    special, reach = tokens - rows * columns, weight.shape[-1] // 2
    output, kernel = torch.zeros_like(value), weight.view(heads, dim, *weight.shape[-2:])
    for row in range(rows):
        for column in range(columns):
            for r in range(max(0, row - reach), min(rows, row + reach + 1)):
                for c in range(max(0, column - reach), min(columns, column + reach + 1)):
                    factor = kernel[:, :, r - row + reach, c - column + reach]
                    neighbor = value[:, special + r * columns + c]
                    output[:, special + row * columns + column] += factor * neighbor
    return output


def random_mixing(kernel_size: int, dynamic: bool) -> LocalMixing:
    mixing = LocalMixing(6, kernel_size, dynamic).double()
    for parameter in mixing.parameters():
        torch.nn.init.normal_(parameter)
    return mixing


@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("rows", "columns", "special"), [(4, 4, 1), (3, 6, 5), (1, 7, 0)])
def test_values_and_gradients_are_those_of_the_definition(rows, columns, special, dynamic, kernel_size):
    mixing = random_mixing(kernel_size, dynamic)
    parameters = list(mixing.parameters())
    value = torch.randn(2, 3, special + rows * columns, 2, dtype=torch.float64, requires_grad=True)
    kernels = [kernel_of(mixing, image[:, special:]) for image in value]
    expected = torch.stack([naive(*pair, rows, columns) for pair in zip(kernels, value)]).transpose(1, 2)
    expected = expected[:, special:]
    grids = torch.tensor([[rows, columns]] * 2)
    for grid in [(rows, columns)] + ([grids] if special == 0 else []):
        output = mixing(value, grid)
        torch.testing.assert_close(output, expected)
        seed = torch.randn_like(output)
        ours = torch.autograd.grad(output, (value, *parameters), seed, retain_graph=True)
        theirs = torch.autograd.grad(expected, (value, *parameters), seed, retain_graph=True)
        for actual, gradient in zip(ours, theirs, strict=True):
            torch.testing.assert_close(actual, gradient)


@pytest.mark.parametrize("dynamic", [False, True])
def test_padded_images_of_different_grids_are_mixed_on_their_own(dynamic):
    mixing, value = random_mixing(3, dynamic), torch.randn(2, 3, 12, 2, dtype=torch.float64)
    output = mixing(value, torch.tensor([[3, 4], [2, 5]]))
    for image, (rows, columns) in enumerate([(3, 4), (2, 5)]):
        real = value[image, :, : rows * columns]
        alone = naive(kernel_of(mixing, real), real, rows, columns).transpose(0, 1)
        torch.testing.assert_close(output[image, : rows * columns], alone)
    assert not output[1, 10:].any()


@every_family
@torch.no_grad()
def test_it_starts_neutral_and_the_student_carries_it(name, tmp_path):
    teacher = stock_model(name)
    plain, mixing = convert(teacher, local_mixing=0), convert(teacher)
    new = {key for key in mixing.state_dict() if ".local_mixing." in key}
    assert len(new) == len(attention_modules(mixing))
    assert mixing.state_dict().keys() - new == plain.state_dict().keys()
    for size in (NATIVE, RECTANGULAR):
        inputs = inputs_of(plain, size)
        for actual, expected in zip(tensors(mixing(**inputs)), tensors(plain(**inputs)), strict=True):
            assert torch.equal(actual, expected)


def test_a_module_that_is_called_alone_needs_the_grid():
    module, states = attention_modules(mixing_model("vit"))[0], torch.randn(2, 17, 32)
    with pytest.raises(UsageError, match=r"mixes over patches; pass it patch_grid"):
        module(states)
    assert module(states, patch_grid=(4, 4))[0].shape == states.shape


@every_family
@torch.no_grad()
def test_it_adds_the_convolution_of_the_values_before_the_output_projection(name):
    model = mixing_model(name)
    module, seen = attention_modules(model)[1], {}
    module.v_proj.register_forward_hook(lambda m, args, output: seen.update(value=output))
    module.k_proj.register_forward_hook(lambda m, args, output: seen.update(key=output))
    module.q_proj.register_forward_hook(lambda m, args, output: seen.update(query=output))
    projection = module.o_proj if hasattr(module, "o_proj") else module.out_proj
    projection.register_forward_pre_hook(lambda m, args: seen.update(context=args[0]))
    model(**inputs_of(model, RECTANGULAR))
    heads = vision_tower(model).config.num_attention_heads
    query, key, value = (seen[n].unflatten(-1, (heads, -1)).transpose(1, 2) for n in ("query", "key", "value"))
    mixed = torch.stack([naive(module.local_mixing.weight, image, 3, 6) for image in value]).transpose(1, 2)
    assert not mixed[:, : num_special_tokens(vision_tower(model).config)].any()
    if name != "dinov3_vit":  # which rotates queries and keys
        attended = linear_attention(query, key, value, module.feature_map).transpose(1, 2)
        torch.testing.assert_close(seen["context"], (attended + mixed).flatten(2), rtol=1e-4, atol=1e-5)
    module.local_mixing.weight.zero_()
    with_mixing = seen["context"]
    model(**inputs_of(model, RECTANGULAR))
    torch.testing.assert_close(with_mixing - seen["context"], mixed.flatten(2), rtol=1e-4, atol=1e-5)


@every_family
@pytest.mark.parametrize("dynamic", [False, True])
@torch.no_grad()
def test_padding_takes_no_part(name, dynamic):
    model = mixing_model(name, dynamic_mixing=dynamic)
    inputs = padded_inputs(model)
    if inputs is None or "input_ids" in inputs:
        pytest.skip("takes no mask of the patches, or gives no features of them")
    before = tensors(model(**inputs))[0]
    changed = copy.deepcopy(inputs)
    special = 0 if "spatial_shapes" in inputs else num_special_tokens(vision_tower(model).config)
    if "spatial_shapes" in inputs:
        changed["pixel_values"][-1, changed["pixel_attention_mask"][-1] == 0] += 5
        real = inputs["pixel_attention_mask"].bool()
    else:
        patch = vision_tower(model).config.patch_size
        changed["pixel_values"][-1, :, NATIVE[0] // 2 :] += 5
        real = inputs["attention_mask"].bool()
        assert patch * 2 * 2 == NATIVE[0] and special >= 0
    torch.testing.assert_close(tensors(model(**changed))[0][real], before[real], rtol=1e-4, atol=1e-5)


@every_family
@torch.no_grad()
def test_softmax_mode_and_softmax_layers_do_without(name):
    model = mixing_model(name)
    inputs = inputs_of(model, RECTANGULAR)
    before = tensors(model(**inputs))[0]
    model.set_attn_implementation("sdpa")
    softmax = tensors(model(**inputs))[0]
    for module in attention_modules(model):
        module.local_mixing.weight.zero_()
    assert torch.equal(tensors(model(**inputs))[0], softmax)
    assert not torch.allclose(before, softmax)
    hybrid = MODELS[name]["Model"](tiny_config(MODELS[name]["Model"].config_class, local_mixing=3, softmax_layers=[0]))
    assert [hasattr(module, "local_mixing") for module in attention_modules(hybrid)] == [False, True]


@every_family
def test_gradient_checkpointing_gives_the_same_gradients(name):
    model = mixing_model(name).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.zero_grad()
        torch.manual_seed(0)
        forward_features(model, torch.randn(2, 3, *RECTANGULAR)).square().mean().backward()
        gradients.append([module.local_mixing.weight.grad.clone() for module in attention_modules(model)])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(plain, checkpointed)


@every_family
@torch.no_grad()
def test_it_is_saved(name, tmp_path):
    model = mixing_model(name)
    model.save_pretrained(tmp_path)
    opened = type(model).from_pretrained(tmp_path).eval()
    inputs = inputs_of(model, RECTANGULAR)
    assert torch.equal(tensors(opened(**inputs))[0], tensors(model(**inputs))[0])


def test_dynamic_kernels_need_a_size():
    with pytest.raises(UsageError, match="dynamic_mixing=True with local_mixing=0: pass the side"):
        MODELS["vit"]["Model"].config_class(dynamic_mixing=True, local_mixing=0)


@every_family
def test_dynamic_kernels_start_neutral_reach_all_parameters_and_are_saved(name, tmp_path):
    teacher = stock_model(name)
    plain, dynamic = convert(teacher), convert(teacher, dynamic_mixing=True)
    inputs = inputs_of(plain, RECTANGULAR)
    with torch.no_grad():
        torch.testing.assert_close(tensors(dynamic(**inputs))[0], tensors(plain(**inputs))[0])
    model = mixing_model(name, dynamic_mixing=True)
    sum(x.sum() for x in tensors(model(**inputs)) if x.requires_grad).backward()
    new = {key: x.grad for key, x in model.named_parameters() if ".local_mixing." in key}
    assert len(new) == 3 * len(attention_modules(model)) and all(x.abs().sum() > 0 for x in new.values())
    model.save_pretrained(tmp_path)
    opened = type(model).from_pretrained(tmp_path)
    states = opened.state_dict(), model.state_dict()
    assert all(torch.equal(states[0][key], x) for key, x in states[1].items())


@pytest.mark.parametrize("size", [-1, 2, 4, 17, 1])
def test_sizes_that_cannot_be_are_refused(size):
    with pytest.raises(UsageError, match=f"local_mixing={size}: pass an odd number"):
        MODELS["vit"]["Model"].config_class(local_mixing=size)
