"""Transformers pipelines open AdaLA folders by their path, offline, and say what model and processor say by hand."""

import numpy as np
import pytest
import torch
from family_helpers import is_vision_text, randomize, tiny_config
from PIL import Image
from transformers import (
    CLIPTokenizer,
    DPTConfig,
    DPTForDepthEstimation,
    DPTImageProcessorPil,
    SegformerImageProcessorPil,
    pipeline,
)
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

from modeling_adala.inspection.towers import attention_modules, vision_tower
from modeling_adala.modeling_adala import MODELS

SIZE = {"height": 32, "width": 32}
CAPTIONS = ["cat", "dog", "red bus"]
CLASSIFIERS = [name for name, family in MODELS.items() if "ForImageClassification" in family]
SEGMENTERS = [name for name, family in MODELS.items() if "ForSemanticSegmentation" in family]


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 52, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`folder(name, head, **options)`: a checkpoint with the image processor that its family is registered with."""
    root = tmp_path_factory.mktemp("pipelines")

    def make(name: str, head: str, **options) -> str:
        family, path = MODELS[name], root / f"{name}-{head}"
        torch.manual_seed(0)
        model = randomize(family[head](tiny_config(family["Model"].config_class, **options)))
        model.save_pretrained(path)
        processor = IMAGE_PROCESSOR_MAPPING[family["Model"].config_class]["pil"]
        naflex = "Siglip2" in processor.__name__  # which makes patches of the whole image instead of resizing it
        options = {"patch_size": 8, "max_num_patches": 16} if naflex else {"size": SIZE, "crop_size": SIZE}
        processor(**options).save_pretrained(path)
        return str(path)

    return make


def by_hand(pipe, image: Image.Image, **text):
    """The model's output, from a linear vision tower."""
    modules = attention_modules(getattr(pipe.model, "backbone", None) or pipe.model)
    assert modules and all(module.config._attn_implementation == "adala" for module in modules)
    with torch.no_grad():
        return pipe.model(**pipe.image_processor(images=image, return_tensors="pt"), **text)


@pytest.mark.parametrize("name", [name for name in MODELS if not is_vision_text(name)])
def test_image_feature_extraction(name, folder, image):
    pipe = pipeline("image-feature-extraction", model=folder(name, "Model"))
    assert type(pipe.model) is MODELS[name]["Model"]
    expected = by_hand(pipe, image).last_hidden_state
    assert expected.shape[0] == 1 and expected.shape[2] == 32
    assert torch.equal(torch.tensor(pipe(image)), expected)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_image_classification(name, folder, image):
    options = {} if is_vision_text(name) else {"num_labels": 3}
    pipe = pipeline("image-classification", model=folder(name, "ForImageClassification", **options))
    assert type(pipe.model) is MODELS[name]["ForImageClassification"]
    scores = by_hand(pipe, image).logits[0].softmax(dim=-1)
    answers = pipe(image)
    assert {answer["label"] for answer in answers} == set(pipe.model.config.id2label.values())
    for answer in answers:
        assert answer["score"] == pytest.approx(scores[pipe.model.config.label2id[answer["label"]]].item(), abs=1e-6)


@pytest.mark.parametrize("name", SEGMENTERS)
def test_image_segmentation(name, folder, image):
    """With a processor that can post-process semantic segmentation, which those of the families cannot."""
    path = folder(name, "ForSemanticSegmentation", num_labels=4)
    pipe = pipeline(
        "image-segmentation", model=path, image_processor=SegformerImageProcessorPil(size={"height": 32, "width": 48})
    )
    assert type(pipe.model) is MODELS[name]["ForSemanticSegmentation"]
    logits = by_hand(pipe, image).logits
    assert logits.shape == (1, 4, 4, 6)
    classes = torch.nn.functional.interpolate(logits, (40, 52), mode="bilinear").argmax(dim=1)[0].numpy()
    answers = pipe(image)
    assert {answer["label"] for answer in answers} == {f"LABEL_{index}" for index in np.unique(classes)}
    for answer in answers:
        mask = classes == pipe.model.config.label2id[answer["label"]]
        assert np.array_equal(np.array(answer["mask"]) > 0, mask)


def test_depth_estimation(tmp_path, image):
    stages = ["stage1", "stage2", "stage3", "stage4"]
    backbone = tiny_config(
        MODELS["dinov2"]["Model"].config_class, num_hidden_layers=4, out_features=stages, reshape_hidden_states=False
    )
    sizes = {"neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 16, "hidden_size": 32}
    torch.manual_seed(0)
    randomize(DPTForDepthEstimation(DPTConfig(backbone_config=backbone, **sizes))).save_pretrained(tmp_path)
    DPTImageProcessorPil(size={"height": 32, "width": 48}).save_pretrained(tmp_path)
    pipe = pipeline("depth-estimation", model=str(tmp_path))
    depth = by_hand(pipe, image).predicted_depth
    expected = torch.nn.functional.interpolate(depth[:, None], (40, 52), mode="bicubic", align_corners=False)[0, 0]
    answer = pipe(image)
    assert answer["depth"].size == image.size
    torch.testing.assert_close(answer["predicted_depth"], expected, rtol=0, atol=1e-5)


# --- zero-shot -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    """Letter by letter; start and end have the two highest ids, as in CLIP's own vocabulary."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[])


@pytest.mark.parametrize("name", [name for name in MODELS if is_vision_text(name)])
def test_zero_shot_image_classification(name, folder, image, tokenizer):
    path = folder(name, "Model")
    tokenizer.save_pretrained(path)
    pipe = pipeline("zero-shot-image-classification", model=path)
    assert type(pipe.model) is MODELS[name]["Model"]
    assert vision_tower(pipe.model).config._attn_implementation == "adala"
    assert pipe.model.config.text_config._attn_implementation == "sdpa"
    siglip = "siglip" in name
    padding = {"padding": "max_length", "max_length": 64} if siglip else {"padding": True}
    text = tokenizer(CAPTIONS, return_tensors="pt", **padding)
    logits = by_hand(pipe, image, **text).logits_per_image[0]
    expected = logits.sigmoid() if siglip else logits.softmax(dim=-1)
    answers = {a["label"]: a["score"] for a in pipe(image, candidate_labels=CAPTIONS, hypothesis_template="{}")}
    assert [answers[caption] for caption in CAPTIONS] == pytest.approx(expected.tolist(), abs=1e-6)
    assert len(set(answers.values())) == 3
