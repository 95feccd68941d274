"""The code that travels with the weights: what it may import, what a saved folder holds, and who runs it."""

import ast
import builtins
import json
import logging
import re
import sys
from pathlib import Path

import pytest
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, ViTConfig, ViTModel
from transformers.dynamic_module_utils import check_imports, get_imports, get_relative_import_files

import modeling_adala
from modeling_adala import configuration_adala, convert
from modeling_adala.configuration_adala import ADALA_VERSION, shared_name, warn_if_newer
from modeling_adala.modeling_adala import MODELS

PACKAGE = Path(modeling_adala.__file__).parent
# huggingface_hub comes with transformers
ALLOWED = {"torch", "transformers", "huggingface_hub", *sys.stdlib_module_names}
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}


def hub_files() -> list[Path]:
    """Every file that some checkpoint carries, found as Transformers finds them."""
    references = {name for family in MODELS.values() for name in family["Model"].auto_map.values()}
    files = {PACKAGE / f"{name.partition('.')[0]}.py" for name in references}
    return sorted(files | {Path(needed) for file in files for needed in get_relative_import_files(file)})


def problems(file: Path) -> list[str]:
    """Why Transformers could not load this file from a repository with nothing but torch and transformers around."""
    found = [f"imports {name}, which is not there" for name in sorted({*get_imports(file)} - ALLOWED)]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        relative = isinstance(node, ast.ImportFrom) and node.level > 0
        if relative and (node.level > 1 or not node.module or "." in node.module):
            found.append(f"line {node.lineno}: the loader follows `from .file import name` only")
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
        ours = {"modeling_adala", "trainers", "hub_cards", "vit_adala"} & {name.split(".")[0] for name in names}
        if ast.unparse(node) != "from modeling_adala import kernels":  # in a `try`, as get_imports has seen above
            found += [f"line {node.lineno}: {name} is not installed there" for name in sorted(ours)]
    return found


@pytest.mark.parametrize("file", hub_files(), ids=lambda file: file.name)
def test_code_files_import_only_torch_transformers_and_their_siblings(file: Path):
    assert problems(file) == []
    assert all((PACKAGE / f"{name}.py").is_file() for name in check_imports(file))


@pytest.mark.parametrize(
    "line",
    [
        "import numpy",
        "from PIL import Image",
        "def f():\n    import scipy.stats",
        "from . import errors",
        "from .models.vit import x",
        "from ..trainers import x",
        "try:\n    import modeling_adala.inspection.towers\nexcept ImportError: pass",
        "from modeling_adala import kernels",
        "from trainers.data.image_dataset import x",
    ],
)
def test_a_forbidden_import_is_found(line: str, tmp_path: Path):
    file = tmp_path / "code.py"
    file.write_text(f"import torch\nfrom .errors import UsageError\n{line}\n")
    assert problems(file)


def test_what_travels_is_what_lies_flat_and_is_short_enough_to_be_read():
    """Nine files that a person can read before trusting them; a configuration pulls in no operator."""
    files = hub_files()
    assert files == sorted(set(PACKAGE.glob("*.py")) - {PACKAGE / "__init__.py"})
    assert len(files) <= 9
    assert sum(len(file.read_text().splitlines()) for file in files) <= 1900
    config = {Path(name).stem for name in get_relative_import_files(PACKAGE / "configuration_adala.py")}
    assert config == {"errors", "families"}


def tiny(family: str, head: str):
    model_class = MODELS[family][head]
    return model_class(model_class.config_class(**TINY))


CASES = [("vit", "Model"), ("vit", "ForMaskedImageModeling"), ("dinov2", "ForImageClassification")]


@pytest.mark.parametrize(("family", "head"), [*CASES, ("dinov2", "Backbone")])
def test_a_saved_folder_is_complete_whatever_class_was_saved(family, head, tmp_path: Path):
    model = tiny(family, head)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    names = {cls.__name__ for cls in MODELS[family].values()} | {MODELS[family]["Model"].config_class.__name__}
    assert {reference.split(".")[1] for reference in config["auto_map"].values()} == names
    for auto_class, reference in config["auto_map"].items():
        module, name = reference.split(".")
        assert hasattr(transformers, auto_class)
        assert re.search(rf"^class {name}\(", (tmp_path / f"{module}.py").read_text(), flags=re.MULTILINE)
    for file in tmp_path.glob("*.py"):
        assert file.read_bytes() == (PACKAGE / file.name).read_bytes()
        assert all((tmp_path / Path(needed).name).is_file() for needed in get_relative_import_files(file))
    assert config["adala_version"] == ADALA_VERSION


def test_the_version_in_the_code_is_the_version_of_the_package():
    assert modeling_adala.__version__ == ADALA_VERSION


@pytest.mark.parametrize("trust", [None, True])
def test_with_the_package_imported_a_folder_opens_without_a_question_and_runs_no_code_of_it(
    trust, tmp_path: Path, monkeypatch
):
    tiny("vit", "ForImageClassification").save_pretrained(tmp_path)
    for file in tmp_path.glob("*.py"):
        file.write_text("raise SystemExit('ran')")
    monkeypatch.setattr(builtins, "input", lambda *args: pytest.fail("asked"))
    for auto_class in (AutoModel, AutoModelForImageClassification):
        model = auto_class.from_pretrained(tmp_path, trust_remote_code=trust)
        assert type(model).__module__ == "modeling_adala.modeling_adala"
        assert type(model.config) is MODELS["vit"]["Model"].config_class
    assert AutoConfig.from_pretrained(tmp_path, trust_remote_code=trust).auto_map["AutoModel"]


def test_stock_models_know_nothing_of_it(tmp_path: Path):
    stock = ViTModel(ViTConfig(**TINY))
    stock.config.auto_map = {"AutoModel": "theirs.Model"}
    student = convert(stock)
    assert not hasattr(student.config, "auto_map")
    student.save_pretrained(tmp_path / "student")
    assert "theirs" not in (tmp_path / "student" / "config.json").read_text()
    assert stock.config.auto_map == {"AutoModel": "theirs.Model"}
    ViTModel(ViTConfig(**TINY)).save_pretrained(tmp_path / "stock")
    assert {path.name for path in (tmp_path / "stock").iterdir()} == {"config.json", "model.safetensors"}
    assert "auto_map" not in (tmp_path / "stock" / "config.json").read_text()
    assert not ViTModel.is_remote_code()


@pytest.mark.parametrize(
    ("writer", "warns"), [("0.2.0", True), ("1.0", True), ("0.1.9", False), ("0.0.3", False), (None, False)]
)
def test_a_checkpoint_of_a_newer_release_warns_once(writer, warns, tmp_path: Path, caplog, monkeypatch):
    monkeypatch.setattr(configuration_adala, "ADALA_VERSION", "0.1.0")
    warn_if_newer.cache_clear()
    tiny("vit", "Model").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"adala_version": writer}))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            AutoModel.from_pretrained(tmp_path)
    messages = [record.getMessage() for record in caplog.records if "written by vit-adala" in record.getMessage()]
    assert len(messages) == warns
    assert all(writer in message and "0.1.0" in message for message in messages)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("facebook/dinov2-small", "facebook/dinov2-small"),
        ("vit", "vit"),
        ("/home/alice/secret project/vit", "vit"),
        ("/home/alice/vit/", "vit"),
        ("/vit", "vit"),
        ("../secret/vit", "vit"),
        ("./vit", "vit"),
        ("../vit", "vit"),
        ("./vit", "vit"),
        ("../vit", "vit"),
        ("a/b/vit", "vit"),
        (r"C:\\Users\\alice\\vit", "vit"),
        ("/home/alice/hub/models--facebook--dinov2-small/snapshots/0a1b", "facebook/dinov2-small"),
        (None, None),
        ("", ""),
        ("/", None),
    ],
)
def test_a_local_path_is_shared_by_its_last_part_only(name, expected):
    assert shared_name(name) == expected


def test_a_folder_that_looks_like_an_id_is_a_folder(tmp_path: Path, monkeypatch):
    (tmp_path / "secret" / "vit").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert shared_name("secret/vit") == "vit"
    assert shared_name("other/vit") == "other/vit"
