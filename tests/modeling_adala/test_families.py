"""Every family and head at tiny size: opens stock checkpoints, equals the stock model in softmax mode, is a citizen.

All tests run over `MODELS`: a new family is in them as soon as it is in that table.
"""

from inspect import signature

import pytest
import torch
from family_helpers import (
    CASES,
    HEAD,
    NATIVE,
    RECTANGULAR,
    inputs_of,
    is_vision_text,
    lost_keys,
    padded_inputs,
    stock_model,
    tensors,
    tiny_config,
)
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
    ViTMSNConfig,
    ViTMSNForImageClassification,
    ViTMSNModel,
)

from modeling_adala import AdaLAViTModel
from modeling_adala.attention_interface import is_new_parameter
from modeling_adala.inspection.check_linear import check_linear
from modeling_adala.inspection.towers import forward_features, vision_tower
from modeling_adala.modeling_adala import MODELS, stock_class

every_family = pytest.mark.parametrize("name", MODELS)
every_case = pytest.mark.parametrize(("name", "head"), CASES)
VISION_TEXT = [name for name in MODELS if is_vision_text(name)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """`checkpoints(name, head, old_names)`: a stock model and the folder it was saved in, each made once."""
    root, made = tmp_path_factory.mktemp("stock"), {}

    def get(name: str, head: str = "Model", old_names: bool = True) -> tuple[PreTrainedModel, str]:
        stock_head = head if stock_class(MODELS[name][head]) else "Model"
        if (key := (name, stock_head, old_names)) not in made:
            folder = root / "-".join(map(str, key))
            made[key] = stock_model(name, head), str(folder)
            made[key][0].save_pretrained(folder, save_original_format=old_names)
        return made[key]

    return get


def opened(checkpoints, name: str, head: str = "Model", **kwargs) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A stock model and the AdaLA model of the same checkpoint."""
    teacher, folder = checkpoints(name, head)
    return teacher, MODELS[name][head].from_pretrained(folder, **kwargs).eval()


def compare(teacher: PreTrainedModel, student: PreTrainedModel, inputs: dict, pixels_only: bool) -> float:
    """Largest difference over everything that both return; the features where only AdaLA has the head."""
    if pixels_only:
        pixels = inputs["pixel_values"]
        pairs = [(forward_features(teacher, pixels), forward_features(student, pixels))]
    else:
        pairs = list(zip(tensors(teacher(**inputs)), tensors(student(**inputs)), strict=True))
    assert all(a.shape == b.shape for a, b in pairs)
    return max((a.float() - b.float()).abs().max().item() for a, b in pairs)


# --- opening stock checkpoints ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("old_names", [True, False], ids=["old names", "new names"])
@every_case
def test_opens_stock_checkpoints_without_losing_a_weight(checkpoints, name, head, old_names):
    teacher, folder = checkpoints(name, head, old_names)
    student, info = MODELS[name][head].from_pretrained(folder, output_loading_info=True)
    ours_alone = stock_class(MODELS[name][head]) is None
    assert not lost_keys(info, *(HEAD if ours_alone and head == "ForSemanticSegmentation" else ()))
    assert any(".feature_map." in key for key in info["missing_keys"])
    weights, theirs = (vision_tower(m) if ours_alone else m for m in (student, teacher))
    weights, theirs = weights.state_dict(), theirs.state_dict()
    if ours_alone:  # a backbone leaves the pooler out
        theirs = {key: value for key, value in theirs.items() if not key.startswith(("pooler.", "head."))}
    assert weights.keys() - theirs.keys() == {key for key in weights if is_new_parameter(key)}
    assert not [key for key, value in theirs.items() if not torch.equal(weights[key], value)]


# --- what a class says of itself -------------------------------------------------------------------------------------


@every_case
def test_the_constructor_takes_what_that_of_the_stock_class_takes(name, head):
    """Transformers' own tools look at it, and pass `add_pooling_layer` or `use_mask_token` where they find them."""
    ours, stock = MODELS[name][head], stock_class(MODELS[name][head])
    if stock is None:
        assert "config" in signature(ours).parameters
        return
    assert list(signature(ours).parameters.values())[1:] == list(signature(stock).parameters.values())[1:]
    assert signature(ours.__init__).parameters.keys() == signature(stock.__init__).parameters.keys()
    config = tiny_config(MODELS[name]["Model"].config_class)
    for option in {"add_pooling_layer", "use_mask_token"} & signature(ours).parameters.keys():
        parameters = [dict(ours(config, **{option: value}).named_parameters()) for value in (True, False)]
        assert parameters[0].keys() > parameters[1].keys()


@every_case
def test_the_main_input_and_the_modalities_are_those_of_forward(name, head):
    ours, stock = MODELS[name][head], stock_class(MODELS[name][head])
    names = signature(ours.forward).parameters
    first = next(key for key in names if key != "self")
    assert ours.main_input_name == first
    assert set(ours.input_modalities) == ({"image", "text"} if "input_ids" in names else {"image"})
    if stock is not None:
        assert (ours.main_input_name, ours.input_modalities) == (stock.main_input_name, stock.input_modalities)


@every_family
def test_trainer_hands_the_images_to_the_metrics(name, tmp_path):
    """It looks them up by `main_input_name`."""
    if "ForSemanticSegmentation" not in MODELS[name]:
        pytest.skip("a model of two towers")
    config = tiny_config(MODELS[name]["Model"].config_class, num_labels=3)
    model, seen = MODELS[name]["ForSemanticSegmentation"](config), []
    example = {"pixel_values": torch.randn(3, *NATIVE), "labels": torch.zeros(NATIVE, dtype=torch.long)}
    arguments = TrainingArguments(str(tmp_path), include_for_metrics=["inputs"], report_to=[], use_cpu=True)
    trainer = Trainer(
        model, arguments, eval_dataset=[example] * 2, compute_metrics=lambda result: seen.append(result.inputs) or {}
    )
    trainer.evaluate()
    assert seen[0].shape == (2, 3, *NATIVE)


# --- softmax mode ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [NATIVE, RECTANGULAR], ids=["native", "rectangular"])
@every_case
@torch.no_grad()
def test_softmax_mode_equals_the_stock_model(checkpoints, name, head, size):
    if head == "ForMaskedImageModeling" and size == RECTANGULAR:
        pytest.skip("the stock decoder reshapes to a square")
    teacher, student = opened(checkpoints, name, head)
    ours_alone = stock_class(MODELS[name][head]) is None
    inputs = {"plain": inputs_of(teacher, size), "padded": None if ours_alone else padded_inputs(teacher, size)}
    if ours_alone:
        inputs["plain"] = {"pixel_values": torch.randn(2, 3, *size)}
    linear = {key: compare(teacher, student, x, ours_alone) for key, x in inputs.items() if x is not None}
    student.set_attn_implementation("sdpa")
    softmax = {key: compare(teacher, student, x, ours_alone) for key, x in inputs.items() if x is not None}
    assert max(softmax.values()) < 1e-5
    assert min(linear.values()) > 1e-2


@every_family
@torch.no_grad()
def test_softmax_mode_can_be_asked_for_when_opening(checkpoints, name):
    teacher, student = opened(checkpoints, name, attn_implementation="sdpa")
    assert compare(teacher, student, inputs_of(teacher), False) < 1e-5


# --- masks -----------------------------------------------------------------------------------------------------------


def takes_token_mask(name: str) -> bool:
    names = signature(MODELS[name]["Model"].forward).parameters
    return "attention_mask" in names and "input_ids" not in names


@pytest.mark.parametrize("mode", ["adala", "sdpa"])
@pytest.mark.parametrize("name", [name for name in MODELS if takes_token_mask(name)])
@torch.no_grad()
def test_a_masked_batch_equals_each_image_without_its_masked_tokens(checkpoints, name, mode):
    """Alone, an image goes through the layers with its visible tokens only, which lie on no grid."""
    _, model = opened(checkpoints, name, attn_implementation=mode, local_mixing=0)
    inputs = padded_inputs(model)
    batch = model(**inputs).last_hidden_state
    for image, visible in enumerate(inputs["attention_mask"].bool()):
        keep = model.embeddings.register_forward_hook(lambda *call, visible=visible: call[-1][:, visible])
        alone = model(inputs["pixel_values"][image : image + 1], interpolate_pos_encoding=True).last_hidden_state
        keep.remove()
        torch.testing.assert_close(batch[image, visible], alone[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["adala", "sdpa"])
@torch.no_grad()
def test_a_padded_naflex_batch_equals_the_images_one_by_one(checkpoints, mode):
    _, model = opened(checkpoints, "siglip2_vision_model", attn_implementation=mode)
    images = [inputs_of(model, size, batch=1, seed=size[1]) for size in ((32, 32), (16, 40), (48, 24))]
    length = max(image["pixel_values"].shape[1] for image in images)

    def pad(x):  # with what would be seen if the mask were dropped
        return torch.nn.functional.pad(x, (0, 0, 0, length - x.shape[1]), value=3.0)

    batch = model(
        pixel_values=torch.cat([pad(image["pixel_values"]) for image in images]),
        pixel_attention_mask=torch.cat(
            [pad(image["pixel_attention_mask"][..., None])[..., 0] == 1 for image in images]
        ),
        spatial_shapes=torch.cat([image["spatial_shapes"] for image in images]),
    )
    for index, image in enumerate(images):
        alone, count = model(**image), image["pixel_values"].shape[1]
        difference = batch.last_hidden_state[index, :count] - alone.last_hidden_state[0]
        assert difference.abs().max() < 1e-5
        assert (batch.pooler_output[index] - alone.pooler_output[0]).abs().max() < 1e-5


# --- ViT by other names ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_class", [ViTMAEModel, ViTMAEForPreTraining, ViTMSNModel, ViTMSNForImageClassification])
@torch.no_grad()
def test_vit_opens_mae_and_msn_checkpoints(model_class, tmp_path):
    mae = "MAE" in model_class.__name__
    decoder = {f"decoder_{name}": value for name, value in DECODER.items()} if mae else {}
    torch.manual_seed(0)
    config = tiny_config(ViTMAEConfig if mae else ViTMSNConfig).to_dict() | decoder | {"mask_ratio": 0.0}
    teacher = model_class(model_class.config_class(**config)).eval()
    for old_names in (True, False):
        teacher.save_pretrained(tmp_path / str(old_names), save_original_format=old_names)
        student, info = AdaLAViTModel.from_pretrained(
            tmp_path / str(old_names), add_pooling_layer=False, attn_implementation="sdpa", output_loading_info=True
        )
        assert student.config.model_type == "adala_vit"
        assert not lost_keys(info, "decoder.", "classifier.")
        inputs = inputs_of(student.eval())
        order = {"noise": torch.arange(16.0).repeat(2, 1)} if mae else {}  # MAE shuffles its tokens by it
        expected = teacher.base_model(**inputs, **order).last_hidden_state
        assert (student(**inputs).last_hidden_state - expected).abs().max() < 1e-5


DECODER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


# --- vision and text -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VISION_TEXT)
def test_the_vision_model_opens_from_a_checkpoint_of_both_towers(checkpoints, name):
    teacher, folder = checkpoints(name)
    vision = next(n for n in MODELS if n.startswith(f"{name}_vision"))
    for head in ("Model", "Backbone", "ForSemanticSegmentation"):
        student, info = MODELS[vision][head].from_pretrained(folder, output_loading_info=True)
        assert not {key for key in lost_keys(info, *HEAD) if key in student.state_dict()}
        assert not [key for key in info["unexpected_keys"] if "vision_model." in key and "head." not in key]
        weights = vision_tower(student).state_dict()
        theirs = teacher.vision_model.state_dict()
        assert not [key for key in weights if key in theirs and not torch.equal(weights[key], theirs[key])]


@pytest.mark.parametrize("name", VISION_TEXT)
@torch.no_grad()
def test_zero_shot_scores_equal_stock_in_softmax_mode_and_the_text_tower_is_softmax_always(checkpoints, name):
    teacher, student = opened(checkpoints, name)
    inputs = inputs_of(teacher)
    expected, linear = teacher(**inputs), student(**inputs)
    assert torch.equal(linear.text_embeds, expected.text_embeds)
    assert (linear.logits_per_image - expected.logits_per_image).abs().max() > 1e-2
    report = check_linear(student, **inputs)
    vision = {key for key in report.linear if key.startswith("vision_model.encoder")}
    assert set(report.linear) == vision and len(vision) == 2
    assert {key for key in report.softmax if "text_model.encoder" in key} and not vision & set(report.softmax)
    student.set_attn_implementation("sdpa")
    assert (student(**inputs).logits_per_image - expected.logits_per_image).abs().max() < 1e-5
    student.set_attn_implementation("adala")  # a name that the causal text tower of CLIP could not take
    assert torch.equal(student(**inputs).logits_per_image, linear.logits_per_image)
