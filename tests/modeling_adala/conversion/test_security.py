"""Folders that nobody should open are refused in one line, nothing is unpickled, and no code is trusted by us."""

import ast
import json
import os
import pickle
import re
import shutil
import time
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_helpers import save_teacher, tiny_vit
from transformers import PreTrainedModel, ViTConfig

from modeling_adala import CheckpointError, LinearAttentionConfig, convert
from modeling_adala.conversion.checkpoint_safety import check_checkpoint
from modeling_adala.conversion.loading import load_classifier, load_config, load_student, load_teacher
from trainers.report import report
from vit_adala.cli import main

REPOSITORY = Path(__file__).parents[3]
PACKAGES = ("modeling_adala", "trainers", "hub_cards", "vit_adala", "examples")


class Armed:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Path:
    """A sound teacher and its sound student."""
    root = tmp_path_factory.mktemp("originals")
    student = convert(save_teacher(root / "teacher"), check_parity=False)
    student.save_pretrained(root / "student")
    return root


@pytest.fixture(params=["teacher", "student"])
def folder(request, originals, tmp_path) -> Path:
    """A copy of each, to be damaged."""
    return Path(shutil.copytree(originals / request.param, tmp_path / request.param))


def set_config(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def cut(folder: Path, size: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])


def move_out(folder: Path, name: str) -> None:
    shutil.move(folder / name, folder.parent / name)


def link_weights(folder: Path) -> None:
    move_out(folder, "model.safetensors")
    (folder / "model.safetensors").symlink_to(folder.parent / "model.safetensors")


def link_config(folder: Path) -> None:
    move_out(folder, "config.json")
    (folder / "config.json").symlink_to(Path("..", "config.json"))


def link_folder(folder: Path) -> None:
    (folder / "pictures").mkdir()
    (folder / "pictures" / "more").symlink_to("/etc")


def link_to_nothing(folder: Path) -> None:
    (folder / "README.md").symlink_to(folder.parent / "not-there-yet")


def index_outside(folder: Path) -> None:
    move_out(folder, "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))


def spoil_index(folder: Path) -> None:
    move_out(folder, "model.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}')


def pickle_weights(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Armed(folder / "TRACE")))
    (folder / "model.safetensors").unlink()


def pickle_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": ["q_proj"]}')
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Armed(folder / "TRACE")))


def write_config(text: str):
    return lambda folder: (folder / "config.json").write_text(text)


def configured(**values):
    return lambda folder: set_config(folder, **values)


# what is done to the folder, what the line names
DAMAGE = {
    "weights are a link out": (link_weights, ("'model.safetensors'", "outside")),
    "configuration is a link out": (link_config, ("'config.json'", "outside")),
    "folder is a link out": (link_folder, ("'pictures/more'", "'/etc'")),
    "link to nothing": (link_to_nothing, ("'README.md'", "outside")),
    "shard outside": (index_outside, ("'../model.safetensors'",)),
    "index that is none": (spoil_index, ("model.safetensors.index.json",)),
    "configured weights outside": (configured(transformers_weights="../w.safetensors"), ("'../w.safetensors'",)),
    "configured weights are pickled": (configured(transformers_weights="adapter_model.bin"), ("'adapter_model.bin'",)),
    "pickled weights": (pickle_weights, ("'pytorch_model.bin'", "safetensors")),
    "adapters": (pickle_adapter, ("adapters", "merge_and_unload")),
    "empty weights": (lambda folder: cut(folder, 0), ("model.safetensors", "truncated")),
    "half a header": (lambda folder: cut(folder, 100), ("model.safetensors", "truncated")),
    "one byte short": (lambda folder: cut(folder, -1), ("model.safetensors", "truncated")),
    "10^9 layers": (configured(num_hidden_layers=10**9), ("num_hidden_layers=1000000000",)),
    "more layers than weights": (configured(num_hidden_layers=900), ("parameters", "hold only")),
    "no layers": (configured(num_hidden_layers=0), ("num_hidden_layers=0",)),
    "negative width": (configured(hidden_size=-32), ("hidden_size=-32",)),
    "huge width": (configured(hidden_size=2**20), ("hidden_size=1048576",)),
    "wider than the weights": (configured(hidden_size=4096), ("parameters", "hold only")),
    "huge MLP": (configured(intermediate_size=10**6), ("parameters", "hold only")),
    "huge image": (configured(image_size=[7 * 10**5, 28]), ("parameters", "hold only")),
    "no patch": (configured(patch_size=[7, 0]), ("patch_size=0", "positive")),
    "10^9 classes": (configured(num_labels=10**9), ("num_labels=1000000000",)),
    "nested absurdity": (configured(vision_config={"num_hidden_layers": 10**9}), ("vision_config.num_hidden_layers",)),
    "number that is a digit string": (configured(hidden_size="32"), ("hidden_size", "expected int")),
    "number that is true": (configured(hidden_size=True), ("hidden_size", "expected int")),
    "layers and a half": (configured(num_hidden_layers=2.5), ("num_hidden_layers", "expected int")),
    "infinite ratio": (configured(layer_norm_eps=float("inf")), ("layer_norm_eps=inf",)),
    "not a number": (configured(layer_norm_eps=float("nan")), ("layer_norm_eps=nan",)),
    "integer of 4,000 digits": (configured(hidden_size=10**4000), ("hidden_size=1000",)),
    "labels that are not a table": (configured(id2label=5), ("not a valid configuration",)),
    "heads that do not divide the width": (configured(num_attention_heads=5), ("num_attention_heads=5",)),
    "model type that is a number": (configured(model_type=5), ("model_type",)),
    "code map that is none": (configured(auto_map=None), ("auto_map",)),
    "configuration that is a list": (write_config("[]"), ("config.json",)),
    "configuration that is no JSON": (write_config("{"), ("config.json", "not valid JSON")),
    "configuration without a bottom": (write_config("[" * 10**6), ("config.json", "not valid JSON")),
    "configuration of 20 MB": (write_config(" " * 20_000_000), ("config.json", "20,000,000 bytes")),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_folder_is_refused_in_one_line_before_a_model_is_built(folder, case, monkeypatch):
    damage, names = DAMAGE[case]
    damage(folder)
    monkeypatch.setattr(PreTrainedModel, "__init__", lambda *_, **__: pytest.fail("a model was built"))
    load = load_teacher if folder.name == "teacher" else load_student
    loaders = (check_checkpoint, load_config, load, lambda name: load_classifier(name, ["a"]))
    start = time.perf_counter()
    for loader in loaders:
        with pytest.raises(CheckpointError) as caught:
            loader(str(folder))
        line = str(caught.value)
        assert "\n" not in line and len(line) < 400
        missing = [name for name in (str(folder), *names) if name not in line]
        assert not missing, f"{missing} not in {line!r}"
    assert time.perf_counter() - start < 5
    assert not (folder / "TRACE").exists()


@pytest.mark.parametrize("option", [{"feature_dim": 10**9}, {"feature_dim": 10**5}, {"sharpness": 1}])
def test_absurd_feature_map_is_refused(originals, tmp_path, option):
    folder = shutil.copytree(originals / "student", tmp_path / "student")
    set_config(folder, feature_map_kwargs=option)
    with pytest.raises(CheckpointError):
        load_student(str(folder))


def test_the_command_line_prints_one_line_and_exits_with_1(originals, tmp_path, capsys):
    folder = shutil.copytree(originals / "student", tmp_path / "student")
    cut(folder, 1000)
    argv = ["evaluate", str(folder), "--teacher", str(originals / "teacher"), "--dataset", "mnist-digits"]
    assert main(argv) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert "truncated" in captured.err


# --- what has to go on working ---------------------------------------------------------------------------------------


def test_sound_folders_pass_and_no_weight_is_read(folder, monkeypatch):
    monkeypatch.setattr(PreTrainedModel, "__init__", lambda *_, **__: pytest.fail("a model was built"))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("something was unpickled"))
    check_checkpoint(folder)


def test_shards_and_links_inside_the_folder_pass(folder):
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    (folder / "model.safetensors").unlink()
    (folder / "blobs").mkdir()
    weight_map = {}
    for number, part in enumerate((names[:5], names[5:]), start=1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / "blobs" / file, {"format": "pt"})
        (folder / file).symlink_to(Path("blobs", file))
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    check_checkpoint(folder)
    loaded = load_teacher(str(folder)) if folder.name == "teacher" else load_student(str(folder))
    assert torch.equal(loaded.classifier.weight, tensors["classifier.weight"])
    (folder / "blobs" / file).write_bytes(b"")
    with pytest.raises(CheckpointError, match="00002-of-00002"):
        check_checkpoint(folder)


def test_snapshot_in_the_cache_of_the_hub_opens_by_path_and_by_id(originals, tmp_path, monkeypatch):
    repository, revision = tmp_path / "hub" / "models--org--vit", "0" * 40
    snapshot = repository / "snapshots" / revision
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    for number, file in enumerate((originals / "teacher").iterdir()):
        shutil.copy(file, repository / "blobs" / str(number))
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(number)))
    expected = load_file(originals / "teacher" / "model.safetensors")["classifier.weight"]
    assert torch.equal(load_teacher(str(snapshot)).classifier.weight, expected)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(
        "modeling_adala.conversion.loading.check_checkpoint", lambda _: pytest.fail("a Hub id was checked")
    )
    assert torch.equal(load_teacher("org/vit").classifier.weight, expected)
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(originals / "teacher" / "config.json")
    with pytest.raises(CheckpointError, match="outside"):
        check_checkpoint(snapshot)


def test_pickles_beside_the_weights_stay_unread(folder):
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (folder / name).write_bytes(pickle.dumps(Armed(folder / "TRACE")))
    load_teacher(str(folder)) if folder.name == "teacher" else load_student(str(folder))
    load_classifier(str(folder), [str(digit) for digit in range(10)])
    assert not (folder / "TRACE").exists()
    pickle.loads((folder / "optimizer.pt").read_bytes())
    assert (folder / "TRACE").exists(), "the trap of this test does not work"


@pytest.mark.parametrize("size", [{"num_hidden_layers": 1}, {"image_size": 14}, {"intermediate_size": 1}])
def test_honest_models_of_unusual_shape_pass(tmp_path, size):
    tiny_vit(
        **({"layers": size.pop("num_hidden_layers")} if "num_hidden_layers" in size else {}), **size
    ).save_pretrained(tmp_path)
    check_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "values",
    [
        {"num_parameters": 86_389_248, "training_flops": 10**21},
        {"seed": 2**40, "_attn_implementation_autoset": True},
        {"label2id": {"10000000 volts": 10**7}, "best_step": 5_000_000},
        {"attn_implementation": "sdpa", "_attn_implementation": None},
    ],
)
def test_harmless_fields_of_a_configuration_pass(folder, values):
    """A number is refused where it is a size of the model, and nowhere else."""
    set_config(folder, **values)
    check_checkpoint(folder)
    load_config(str(folder))


def test_configuration_without_weights_is_left_to_the_loader(tmp_path):
    ViTConfig().save_pretrained(tmp_path)
    check_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no weights: there is no model\.safetensors"):
        load_teacher(str(tmp_path))


@pytest.mark.parametrize("name", ["[bold red]x", "{{ 7 * 7 }}", "a\nb", "# a <script>", "\x1b[31mred", "..."])
def test_hostile_folder_names_stay_plain_text_in_one_line(originals, tmp_path, capsys, name):
    folder = shutil.copytree(originals / "teacher", tmp_path / name)
    assert load_teacher(str(folder)).config.hidden_size == 32
    set_config(folder, num_hidden_layers=10**9)
    with pytest.raises(CheckpointError) as caught:
        load_teacher(str(folder))
    assert repr(str(folder)) in str(caught.value)
    argv = ["finetune", str(folder), "--dataset", "mnist-digits", "--output-dir", str(tmp_path / "out")]
    assert main(argv) == 1
    line = capsys.readouterr().err.removesuffix("\n")
    assert line.isprintable()
    assert sorted(os.listdir(tmp_path)) == [name]


# --- the sources -----------------------------------------------------------------------------------------------------

TREES = {
    str(path.relative_to(REPOSITORY)): ast.parse(path.read_text(encoding="utf-8"))
    for package in PACKAGES
    for path in sorted((REPOSITORY / package).rglob("*.py"))
}
# hands on what the user passed to `vit-adala doctor --trust-remote-code`; False otherwise
PASSES_ON_TRUST = {"vit_adala/doctor/probe.py"}
# a function that tells the reader of a card what to type, and opens nothing
WRITES_TEXT = {"usage"}


def test_the_sources_are_found():
    assert {
        "modeling_adala/conversion/loading.py",
        "vit_adala/doctor/probe.py",
        "vit_adala/commands/doctor.py",
    } <= TREES.keys()


def settings_of(tree: ast.AST, name: str) -> list[ast.expr]:
    """What is assigned to a name, as a keyword, dictionary entry, attribute, variable, default or `setattr`."""
    found: list[ast.expr] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) not in WRITES_TEXT:
            found += [keyword.value for keyword in node.keywords if keyword.arg == name]
            found += [node] if name in [getattr(argument, "value", None) for argument in node.args[:2]] else []
        elif isinstance(node, ast.Dict):
            found += [v for k, v in zip(node.keys, node.values) if isinstance(k, ast.Constant) and k.value == name]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [getattr(t, "id", None) or getattr(t, "attr", None) for t in targets]
            keys = [
                t.slice.value for t in targets if isinstance(t, ast.Subscript) and isinstance(t.slice, ast.Constant)
            ]
            found += [node.value] if node.value is not None and name in (*names, *keys) else []
    return found


@pytest.mark.parametrize(
    "source",
    [
        "f(trust_remote_code=True)",
        "f(**{'trust_remote_code': True})",
        "kwargs['trust_remote_code'] = True",
        "args.trust_remote_code = 1",
        "setattr(args, 'trust_remote_code', True)",
    ],
)
def test_a_setting_of_trust_remote_code_would_be_found(source):
    assert settings_of(ast.parse(source), "trust_remote_code")


@pytest.mark.parametrize("path", TREES)
def test_trust_remote_code_is_never_set_by_us(path):
    for value in settings_of(TREES[path], "trust_remote_code"):
        is_off = isinstance(value, ast.Constant) and value.value in (False, None)
        assert is_off or path in PASSES_ON_TRUST, f"line {value.lineno}: {ast.unparse(value)}"
        assert not isinstance(value, ast.Constant) or not value.value


@pytest.mark.parametrize("path", TREES)
def test_nothing_unpickles_and_no_text_is_run_as_code(path):
    unsafe = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    calls = {"torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "np.load", "pandas.read_pickle"}
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            assert not unsafe & {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in unsafe
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in calls and called not in ("eval", "exec", "os.system"), f"line {node.lineno}: {called}"


@pytest.mark.parametrize("path", [path for path in TREES if not path.startswith("examples")])
def test_every_auto_class_is_told_to_trust_no_code(path):
    """Left to its default, it would ask on the terminal, and a `y` would run the code."""
    for node in ast.walk(TREES[path]):
        method = getattr(node.func, "attr", None) if isinstance(node, ast.Call) else None
        opened = ast.unparse(node.func.value) if method in ("from_pretrained", "from_config") else ""
        if opened.startswith("Auto") or (opened and path == "modeling_adala/conversion/loading.py"):
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert keywords.get("trust_remote_code") in ("False", "trust"), f"line {node.lineno}: {opened}.{method}"


@pytest.mark.parametrize("path", [path for path in TREES if not path.startswith("examples")])
def test_every_model_is_opened_from_safetensors(path):
    for node in ast.walk(TREES[path]):
        if not (isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "from_pretrained"):
            continue
        opened = ast.unparse(node.func.value)
        # `super` passes on what its caller says
        if opened in ("AutoConfig", "AutoImageProcessor", "AutoTokenizer") or opened.startswith("super("):
            continue
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert keywords.get("use_safetensors") == "True", f"line {node.lineno}: {opened}.from_pretrained"


def test_hostile_names_stay_plain_text_in_the_report():
    name = "x`\n# Title <script> [a](javascript:b) {{ 7 * 7 }} ../../etc"
    facts = {"steps": 1, "seconds": 1.0, "resumed_from_step": 0, "images": name, "settings": {"a": name}}
    manifest = {"teacher": name, "teacher_revision": name, "teacher_sha256": "0", "dataset": name, "parity": {}}
    manifest |= {"data_fingerprint": "0", "machine": "m", "bf16": False, "versions": {}}
    manifest["stages"] = {"supervised": facts}
    config = types.SimpleNamespace(linear_attention=LinearAttentionConfig(), recipe="default")
    text = report._render([["", "error"], ["x", "1"]], manifest, {}, {"rows": []}, config, [])
    assert [line for line in text.splitlines() if line.startswith("#")] == [text.splitlines()[0]]
    outside = re.sub(r"(?<![\\`])(`+)(?!`).*?(?<!`)\1(?!`)", "", text)
    assert "<script>" not in outside and "[a](" not in outside
