"""Pictures of features and attention: the numbers behind them, files that open, and mistakes told in one line."""

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from training_helpers import save_teacher, tiny_dinov2, tiny_vit
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SwinConfig,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_adala import UsageError, attention_map, convert
from modeling_adala.inspection.towers import attention_implementation, forward_tower
from modeling_adala.mixins import image_inputs, num_special_tokens
from trainers.report.pictures import ColorBasis, check_query, draw_attention, patch_features, query_attention
from vit_adala.cli import main

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 7, "num_channels": 1}
TEACHERS = {
    "dinov2": tiny_dinov2,
    "dinov3": lambda: DINOv3ViTModel(DINOv3ViTConfig(**SIZES, intermediate_size=64, num_register_tokens=3)),
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**SIZES, intermediate_size=64, image_size=28)),
    "siglip2": lambda: Siglip2VisionModel(Siglip2VisionConfig(**SIZES, intermediate_size=64, num_patches=16)),
}
PIXELS = torch.randn(2, 1, 35, 49, generator=torch.Generator().manual_seed(0))  # 5 x 7 patches


def token_of(model, row: int, column: int) -> int:
    return num_special_tokens(model.config) + 7 * row + column


# --- what one patch attends to ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [name for name in TEACHERS if name != "siglip2"])  # attention_map cannot, there
@pytest.mark.parametrize("options", [{}, {"feature_map": "relu"}, {"softmax_layers": [1]}], ids=str)
def test_a_linear_query_is_its_row_of_the_attention_map(family, options):
    student = convert(TEACHERS[family](), check_parity=False, **options)
    inputs = image_inputs(student.config, PIXELS)
    for layer in (0, -1):
        whole = attention_map(student, inputs.pop("pixel_values"), layer, **inputs)
        inputs = image_inputs(student.config, PIXELS)
        row = query_attention(student, PIXELS, layer, (3, 4))
        torch.testing.assert_close(row, whole[:, :, token_of(student, 3, 4)], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", TEACHERS)
def test_a_softmax_query_is_its_row_of_the_weights(family):
    teacher = TEACHERS[family]().eval()
    row = query_attention(teacher, PIXELS, 1, (3, 4))
    with torch.no_grad(), attention_implementation(teacher, "eager"):
        whole = forward_tower(teacher, PIXELS, output_attentions=True).attentions[1]
    torch.testing.assert_close(row, whole[:, :, token_of(teacher, 3, 4)], rtol=1e-4, atol=1e-6)


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            self.numel = max(self.numel, x.numel() if isinstance(x, torch.Tensor) else 0)
        return result


def test_no_n_by_n_matrix_is_ever_formed():
    student = convert(tiny_dinov2(), check_parity=False)
    with LargestTensor() as largest:
        query_attention(student, torch.randn(1, 1, 210, 210), 0, (0, 0))
    assert 0 < largest.numel < 900**2 / 2  # 900 patches


def test_the_model_is_left_as_it_was():
    teacher = tiny_dinov2()
    known = set(ALL_ATTENTION_FUNCTIONS)
    query_attention(teacher, PIXELS, 0, (0, 0))
    with pytest.raises(ValueError):  # three channels for a model of one
        query_attention(teacher, PIXELS.repeat(1, 3, 1, 1), 0, (0, 0))
    assert teacher.config._attn_implementation == "sdpa"
    assert set(ALL_ATTENTION_FUNCTIONS) == known


@pytest.mark.parametrize("layer, query", [(2, (0, 0)), (-3, (0, 0)), (0, (5, 0)), (0, (0, 7)), (0, (-1, 0))])
def test_layers_and_patches_that_do_not_exist_are_refused(layer, query):
    with pytest.raises(UsageError, match=r"layers 0 to 1|patches 0,0 to 4,6"):
        query_attention(tiny_dinov2(), PIXELS, layer, query)


def test_the_patch_in_the_middle_is_the_default():
    assert check_query(tiny_dinov2().config, (35, 49)) == (2, 3)


# --- colors ----------------------------------------------------------------------------------------------------------


def test_colors_are_the_strongest_directions_of_the_features_that_made_the_basis():
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(16, 3, generator=generator)).Q
    strengths = torch.randn(200, 3, generator=generator) * torch.tensor([9.0, 3.0, 1.0])
    features = strengths @ directions.T + 5
    colors = ColorBasis.fit(features)(features)
    assert colors.shape == (200, 3)
    assert colors.min() == 0 and colors.max() == 1
    for channel in range(3):
        together = torch.stack([colors[:, channel], strengths[:, channel]])
        assert torch.corrcoef(together)[0, 1].abs() > 0.98


def test_one_basis_gives_equal_features_equal_colors():
    features = torch.randn(3, 4, 5, 8)
    basis = ColorBasis.fit(features)
    assert torch.equal(basis(features)[1:], basis(features[1:]))
    assert torch.equal(basis(features), ColorBasis.fit(features.clone())(features))  # the same signs every time


def test_patch_features_have_the_form_of_the_image():
    assert patch_features(tiny_dinov2(), PIXELS).shape == (2, 5, 7, 32)


@pytest.mark.parametrize("heads", [1, 16])
def test_attention_is_drawn_for_any_number_of_heads_and_a_rectangle(tmp_path, heads):
    weights = {name: torch.rand(heads, 5, 7) / 35 for name in ("teacher", "student")}
    draw_attention(tmp_path / "a.png", torch.rand(3, 35, 49), (3, 4), weights, "title")
    with Image.open(tmp_path / "a.png") as picture:
        assert min(picture.size) > 200  # at the 30 dots per inch of conftest.py


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, str]:
    """What the arguments of the tests name as `@name`."""
    root = tmp_path_factory.mktemp("places")
    teacher = save_teacher(root / "teacher")
    convert(teacher, check_parity=False).save_pretrained(root / "student")
    tiny_vit(layers=3).save_pretrained(root / "deep")
    SwinConfig().save_pretrained(root / "swin")
    for name in ("one", "two"):
        Image.effect_noise((60, 40), 80).save(root / f"{name}.png")
    (root / "text.png").write_text("no image")
    return {path.name: str(path) for path in root.iterdir()}


def run(places, *argv: str) -> int:
    return main(["features", *(places[part[1:]] if part.startswith("@") else part for part in argv)])


def test_pictures_of_a_student_beside_its_teacher(capsys, places, tmp_path):
    options = ("--teacher", "@teacher", "--query", "1,4", "--layer", "0", "--image-size", "28x42")
    assert run(places, "@student", "@one.png", "@two.png", *options, "--output-dir", str(tmp_path)) == 0
    written = [tmp_path / name for name in ("features.png", "attention-1-one.png", "attention-2-two.png")]
    assert capsys.readouterr().out.split() == [str(path) for path in written]
    for path in written:
        with Image.open(path) as picture:
            picture.load()
            assert len(picture.convert("RGB").getcolors(maxcolors=10**7)) > 100


def test_pictures_that_are_there_are_not_replaced(capsys, places, tmp_path):
    argv = ("@student", "@one.png", "@two.png", "--output-dir", str(tmp_path))
    for name in ("features.png", "attention-2-two.png"):
        (tmp_path / name).write_text("mine")
        assert run(places, *argv) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert str(tmp_path) in line and name in line and "--output-dir" in line
        assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
    (tmp_path / "notes.txt").write_text("mine")
    assert run(places, *argv) == 0 and (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["数字", "a$b_$\\frac", "emoji 😀"])
def test_names_that_the_font_lacks_are_drawn_without_a_warning(places, tmp_path, name, recwarn):
    picture = tmp_path / f"{name}.png"
    Image.open(places["one.png"]).save(picture)
    out = tmp_path / "out"
    assert main(["features", places["student"], str(picture), "--output-dir", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {"features.png", f"attention-1-{name}.png"}
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_pictures_of_one_model_at_its_own_size(capsys, places, tmp_path, name):
    assert run(places, f"@{name}", "@one.png", "--output-dir", str(tmp_path / "new" / "folder")) == 0
    assert len(list((tmp_path / "new" / "folder").glob("*.png"))) == 2


@pytest.mark.parametrize(
    "argv, code, parts",
    [
        (["@swin", "@one.png"], 2, ["'swin' is not supported", "dinov2"]),
        (["nobody/nothing", "@one.png"], 1, ["'nobody/nothing'", "offline"]),
        (["@student"], 2, ["required: IMAGE", "--help"]),
        (["@student", "@one.png", "--image-size", "30"], 2, ["image_size=30", "28 or 35"]),
        (["@student", "@one.png", "--image-size", "big"], 2, ["'big'", "336x448"]),
        (["@student", "@one.png", "@text.png"], 1, ["text.png", "Pillow does not know its format", "PNG or JPEG"]),
        (["@student", "missing.png"], 1, ["'missing.png'", "does not exist"]),
        (["@student", "@one.png", "--layer", "2"], 2, ["layer=2", "layers 0 to 1"]),
        (["@student", "@one.png", "--layer", "last"], 2, ["layer='last'", "an integer"]),
        (["@student", "@one.png", "--query", "4,0"], 2, ["query=4,0", "0,0 to 3,3"]),
        (["@student", "@one.png", "--query", "4"], 2, ["query='4'", "ROW,COLUMN"]),
        (["@student", "@one.png", "--teacher", "@student"], 2, ["linear-attention student"]),
        (["@student", "@one.png", "--teacher", "@deep"], 2, ["num_hidden_layers (2 and 3)"]),
        (["@student", "@one.png", "--teacher", "@swin"], 2, ["'swin' is not supported"]),
    ],
)
def test_bad_input_is_refused_in_one_line_and_leaves_nothing(capsys, caplog, places, tmp_path, argv, code, parts):
    assert run(places, *argv, "--output-dir", str(tmp_path / "out")) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert all(part in line for part in parts), line
    assert not (tmp_path / "out").exists()
