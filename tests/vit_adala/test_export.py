"""`vit-adala export`: graphs that give what PyTorch gives, at sizes they were not traced at, or nothing at all.

One graph for ONNX Runtime and one for OpenVINO are made here; all families and heads are in `tests/check_exports.py`.
"""

import json
import re
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
import torch
from family_helpers import randomize, tiny_config
from hub_server import WRITE_TOKEN, HubServer
from huggingface_hub import ModelCard
from packaging import version
from PIL import Image
from training_helpers import save_teacher, tiny_vit
from transformers import ViTConfig, ViTModel

from modeling_adala import convert
from modeling_adala.conversion.loading import load_student
from modeling_adala.errors import AdaLAError, UsageError
from modeling_adala.inspection.towers import attention_modules
from modeling_adala.modeling_adala import MODELS
from trainers.data.data_config import DataConfig, DataModule
from trainers.evaluation.comparison import Comparison as TeacherComparison
from vit_adala.cli import main
from vit_adala.commands import export as command
from vit_adala.export import formats, tracing
from vit_adala.export.formats import Runtime
from vit_adala.export.parity import Comparison, check, flat, largest

ROOT = Path(__file__).parents[2]
needs_exporters = pytest.mark.skipif(
    version.parse(torch.__version__) < version.parse("2.11"), reason="Transformers exports with torch 2.11 or later"
)


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> str:
    """A classifier of one linear layer with random local mixing, and its image processor."""
    root = tmp_path_factory.mktemp("student")
    save_teacher(root, layers=1)
    model = convert(tiny_vit(layers=1), head="ForImageClassification", check_parity=False)
    (attention,) = attention_modules(model)
    torch.nn.init.normal_(attention.local_mixing.weight, std=0.3)
    model.save_pretrained(root)
    return str(root)


@pytest.fixture(scope="module")
def exported(student, tmp_path_factory) -> Path:
    """Its ONNX graph for any size and batch."""
    out = tmp_path_factory.mktemp("export") / "onnx"
    assert main(["export", student, "--output-dir", str(out)]) == 0
    return out


def pixels_of(batch: int, height: int, width: int) -> torch.Tensor:
    return torch.randn(batch, 1, height, width, generator=torch.Generator().manual_seed(batch))


# --- ONNX ------------------------------------------------------------------------------------------------------------


@needs_exporters
def test_graph_of_any_size_gives_what_pytorch_gives(student, exported):
    model, runtime = load_student(student).eval(), formats.open_onnx(exported / "model.onnx")
    for shape in ((1, 28, 28), (5, 7, 7), (2, 14, 63)):  # native, one patch, far from what was traced and checked
        inputs = tracing.model_inputs(model, pixels_of(*shape))
        with torch.no_grad():
            expected = model(**inputs).logits
        torch.testing.assert_close(runtime(inputs)["logits"], expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.1


@needs_exporters
def test_folder_says_what_was_compared_and_opens_without_us(student, exported):
    import onnx

    record = json.loads((exported / "manifest.json").read_text())["export"]
    assert record["sizes"] == record["batch"] == "any" and record["dtype"] == "float32"
    assert {(row["size"], row["batch"], row["images"]) for row in record["comparisons"]} == {
        (size, batch, images)
        for size in ("21x28", "28x28", "35x42")
        for batch in (1, 3)
        for images in ("real", "random")
    }
    assert record["difference"] == max(row["difference"] for row in record["comparisons"]) < 1e-5
    files = {path.name: path.stat().st_size for path in exported.iterdir()}
    assert record["files"] == {"model.onnx": files["model.onnx"]}
    assert files.keys() == {"model.onnx", "config.json", "preprocessor_config.json", "manifest.json"}
    graph = onnx.load(exported / "model.onnx").graph
    assert [axis.dim_param or axis.dim_value for axis in graph.input[0].type.tensor_type.shape.dim] == [
        *("batch", 1, "height", "width")
    ]
    assert [value.name for value in graph.output] == ["logits"]
    # heads are one product: no graph of their own for each
    assert sum(node.op_type == "MatMul" for node in graph.node) <= 8


@needs_exporters
def test_second_call_does_nothing_and_another_dtype_is_refused(student, exported, capsys):
    before = {path.name: path.stat().st_mtime_ns for path in exported.iterdir()}
    assert main(["export", student, "--output-dir", str(exported)]) == 0
    assert "already done" in capsys.readouterr().out
    assert main(["export", student, "--output-dir", str(exported), "--dtype", "float16"]) == 2
    assert "dtype='float32', not 'float16'" in capsys.readouterr().err
    assert before == {path.name: path.stat().st_mtime_ns for path in exported.iterdir()}


@needs_exporters
def test_int8_is_of_products_alone_and_its_accuracy_is_that_of_the_model(student, exported, tmp_path):
    import onnx

    from vit_adala.export.quantization import AccuracyCheck, quantize

    quantize(exported / "model.onnx", tmp_path / "model_quantized.onnx")
    nodes = [node.op_type for node in onnx.load(tmp_path / "model_quantized.onnx").graph.node]
    assert nodes.count("MatMulInteger") == 7 and "ConvInteger" not in nodes  # q, k, v, o, two of the MLP, the head
    model = load_student(student).eval()
    data = DataModule(DataConfig(dataset="mnist-digits", image_size=28), model.config, None)
    measure = AccuracyCheck(model, data, eval_images=96)

    @torch.no_grad()
    def in_pytorch(inputs):
        return flat(model(**inputs))

    expected = TeacherComparison(model, data, eval_images=96, probe=False).classifier_accuracy(model)
    assert measure(in_pytorch, "float32") == {"head_accuracy": expected} and measure.images == 96
    found = measure(formats.open_onnx(tmp_path / "model_quantized.onnx"), "int8")["head_accuracy"]
    assert abs(found - expected) < 0.05


@needs_exporters
def test_pushed_graph_runs_by_the_example_of_the_card(student, exported, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with HubServer() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)
        monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
        assert main(["push", student, "org/model", "--with-onnx", str(exported)]) == 0
        assert hub.files("org/model")["onnx/model.onnx"] == (exported / "model.onnx").read_bytes()
        section = ModelCard(hub.files("org/model")["README.md"].decode()).text.partition("## ONNX")[2]
        monkeypatch.chdir(tmp_path)
        Image.new("L", (40, 40), 200).save("image.jpg")
        capsys.readouterr()
        names: dict = {}
        exec(re.search(r"```python\n(.*?)```", section, flags=re.S)[1], names)
        assert re.fullmatch(r"\[\d\]\n", capsys.readouterr().out) and names["outputs"]["logits"].shape == (1, 10)


@needs_exporters
@pytest.mark.parametrize("page", ["README.md", "docs/export.md"])
def test_example_of_the_pages_runs(page, exported, tmp_path, monkeypatch, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "onnx").symlink_to(exported)
    monkeypatch.chdir(tmp_path)
    Image.new("L", (40, 40), 200).save("image.jpg")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.S)
    (block,) = [block for block in blocks if "onnxruntime" in block]
    exec(block, {})
    assert re.fullmatch(r"\[\d\]\n", capsys.readouterr().out)


# --- OpenVINO --------------------------------------------------------------------------------------------------------


@needs_exporters
def test_openvino_gives_what_pytorch_gives_at_a_fixed_size(tmp_path, capsys):
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    config.image_size, config.patch_size = 32, 8
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "model")
    out = tmp_path / "openvino"
    command = ["export", str(tmp_path / "model"), "--format", "openvino", "--sizes", "16x24", "--batch", "2"]
    assert main([*command, "--output-dir", str(out), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["inputs"] == {"pixel_values": [2, 3, 16, 24]} and record["sizes"] == ["16x24"]
    assert record["files"].keys() == {"openvino_model.xml", "openvino_model.bin"} <= {p.name for p in out.iterdir()}
    assert 0 < record["difference"] < 1e-5


# --- what is refused -------------------------------------------------------------------------------------------------


class Inexact:
    """Stands for `export_model`: a graph that is the model itself, with an error at one size."""

    def __init__(self, error: float, width: int):
        self.error, self.width = error, width

    def __call__(self, model, form, path, size=None, batch=None, half=False) -> Runtime:
        path.write_bytes(b"graph")

        def run(feed):
            inputs = {name: torch.as_tensor(value) for name, value in feed.items()}
            with torch.no_grad():
                outputs = flat(model(**inputs, interpolate_pos_encoding=True))
            error = self.error if inputs["pixel_values"].shape[-1] == self.width else 0.0
            return {name: (value + error).numpy() for name, value in outputs.items()}

        return Runtime({"pixel_values": [None] * 4}, run)


@pytest.mark.parametrize("error", [1e-2, float("nan")])
def test_graph_that_differs_at_one_size_leaves_nothing(error, student, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "check_packages", lambda name: None)
    monkeypatch.setattr(command, "package_versions", lambda name: {})
    monkeypatch.setattr(command, "export_model", Inexact(error, width=42))
    out = tmp_path / "out"
    assert main(["export", student, "--output-dir", str(out)]) == 1
    said = capsys.readouterr().err.strip()
    assert "at 35x42 pixels" in said and "--max-difference" in said and "\n" not in said
    assert not out.exists()
    monkeypatch.setattr(command, "export_model", Inexact(error, width=64))
    assert main(["export", student, "--output-dir", str(out)]) == 0
    assert (out / "model.onnx").read_bytes() == b"graph"


def test_bound_is_relative_to_values_above_one():
    rows = [Comparison("28x28", 1, "real", 5e-4, 0.1), Comparison("28x28", 1, "random", 9e-4, 10.0)]
    check(rows[1:], 1e-4)
    assert largest(rows) == rows[1]
    with pytest.raises(AdaLAError, match=r"5\.0e-04 at 28x28 pixels, batch 1, real images"):
        check(rows, 1e-4)


def test_axis_that_tracing_has_fixed_is_found(tmp_path, monkeypatch):
    model = convert(tiny_vit(layers=1), check_parity=False).eval()
    graph = Runtime({"pixel_values": [2, 1, None, None]}, dict)
    monkeypatch.setattr(tracing, "_write_onnx", lambda *args: None)
    monkeypatch.setitem(tracing.FORMATS, "onnx", SimpleNamespace(open=lambda path: graph))
    with pytest.raises(AdaLAError, match="axis 0 should be free"):
        tracing.export_model(model, "onnx", tmp_path / "model.onnx")
    assert tracing.export_model(model, "onnx", tmp_path / "model.onnx", batch=2) is graph


def test_heads_that_have_no_graph_of_any_size_are_named():
    model_class = MODELS["vit"]["ForMaskedImageModeling"]
    model = model_class(tiny_config(model_class.config_class, num_hidden_layers=1))
    with pytest.raises(UsageError, match=r"decodes square images only; pass one size, such as 32x32"):
        tracing.check_size(model, free=True)
    tracing.check_size(model, free=False)
    wide = MODELS["vit"]["Model"](tiny_config(model_class.config_class, num_hidden_layers=1, image_size=(16, 32)))
    with pytest.raises(UsageError, match=r"positions of a rectangle.* 16x32"):
        tracing.check_size(wide, free=True)


@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_missing_package_is_one_line_with_the_command(name, student, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(formats, "find_spec", lambda package: None)
    assert main(["export", student, "--format", name, "--output-dir", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert f"pip install 'vit-adala[{name}]'" in said and formats.FORMATS[name].packages[0] in said
    assert not (tmp_path / "out").exists()


def test_export_of_other_weights_is_not_pushed(student, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "check_packages", lambda name: None)
    monkeypatch.setattr(command, "package_versions", lambda name: {})
    monkeypatch.setattr(command, "export_model", Inexact(0.0, width=1))
    assert main(["export", student, "--output-dir", str(tmp_path / "onnx")]) == 0
    other = load_student(student)
    other.save_pretrained(tmp_path / "same")
    randomize(other).save_pretrained(tmp_path / "other")
    options = ["org/model", "--dry-run", "--with-onnx", str(tmp_path / "onnx")]
    capsys.readouterr()
    assert main(["push", str(tmp_path / "other"), *options]) == 2
    assert "exported from other weights" in capsys.readouterr().err
    assert main(["push", str(tmp_path / "same"), *options]) == 0
    said = capsys.readouterr().out
    assert "onnx/model.onnx" in said and "## ONNX" in said
    assert main(["push", str(tmp_path / "same"), "org/model", "--dry-run", "--with-onnx", student]) == 2
    assert "holds no finished ONNX export" in capsys.readouterr().err


# --- float16 ---------------------------------------------------------------------------------------------------------


@needs_exporters
def test_graph_in_float16_takes_and_returns_float32(tmp_path):
    import onnx_ir
    import onnxruntime

    from vit_adala.export.onnx_graph import in_float32, save

    kind = onnx_ir.TensorType(onnx_ir.DataType.FLOAT16)
    value = onnx_ir.val("pixel_values", shape=onnx_ir.Shape([None, 3]), type=kind)
    node = onnx_ir.node("Add", [value, value])
    node.outputs[0].name, node.outputs[0].shape, node.outputs[0].dtype = "logits", value.shape, value.dtype
    graph = onnx_ir.Graph([value], node.outputs, nodes=[node], opset_imports={"": 18}, name="sum")
    model = onnx_ir.Model(graph, ir_version=10)
    in_float32(model)
    save(model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    pixels = torch.tensor([[1.0, 1e-3, 3.14159]])
    (result,) = session.run(["logits"], {"pixel_values": pixels.numpy()})
    assert result.dtype == "float32"
    torch.testing.assert_close(torch.as_tensor(result), 2 * pixels, rtol=1e-3, atol=0)
