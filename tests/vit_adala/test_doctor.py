"""`vit-adala doctor`: what is wrong with a machine or a model is named, with the remedy, and makes the exit code 1."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from family_helpers import CASES, NATIVE, randomize, tiny_config
from huggingface_hub import ModelCard, ModelCardData, constants
from packaging.requirements import Requirement
from safetensors.torch import load_file, save_file
from training_helpers import save_teacher

import modeling_adala
from modeling_adala import convert
from modeling_adala.modeling_adala import MODELS
from vit_adala.cli import main
from vit_adala.commands import doctor
from vit_adala.doctor import environment_checks as environment
from vit_adala.doctor import model_checks as model
from vit_adala.doctor import probe
from vit_adala.doctor.checks import Check, run_check
from vit_adala.doctor.model_checks import Subject

IMAGES = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
CARD = {"license": "apache-2.0", "library_name": "transformers", "pipeline_tag": "image-classification"}


@pytest.fixture(scope="module")
def healthy(tmp_path_factory) -> Path:
    """A student with everything beside it that there should be."""
    root = tmp_path_factory.mktemp("models")
    teacher = save_teacher(root / "teacher")
    student = convert(teacher, softmax_layers=[0], check_parity=False)
    student.save_pretrained(root / "student")
    shutil.copy(f"{teacher}/preprocessor_config.json", root / "student")
    metadata = ModelCardData(**CARD, base_model="org/vit", tags=["linear-attention"])
    ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n# A model\n").save(root / "student" / "README.md")
    return root / "student"


@pytest.fixture
def folder(healthy, tmp_path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(healthy, tmp_path / "student"))


def examine(check: Callable[[Subject], Check], folder: Path, images: torch.Tensor | None = IMAGES) -> Check:
    return run_check(check, Subject(folder, lambda: images))


def change_weights(folder: Path, **changes: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Every tensor whose name contains a key goes through the function."""
    tensors = load_file(folder / "model.safetensors")
    for part, change in changes.items():
        tensors |= {name: change(value).contiguous() for name, value in tensors.items() if part in name}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def add_tensor(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {name: torch.zeros(3)}, folder / "model.safetensors", {"format": "pt"})


def set_config(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def all_nan(tensor: torch.Tensor) -> torch.Tensor:
    return torch.full_like(tensor, torch.nan)


# --- a model ---------------------------------------------------------------------------------------------------------


def test_healthy_model_passes_every_check_that_needs_no_process(healthy):
    found = {check: examine(check, healthy) for check in model.CHECKS if not check.__name__.startswith("loads")}
    assert {check.status for check in found.values()} == {"PASS"}, found
    assert not any(check.remedy for check in found.values())
    smallest = found[model.smallest_normalizer].message
    assert "in layer 1" in smallest and "0:" not in smallest.split("by layer")[1], "layer 0 is softmax"


def test_normalizer_is_the_denominator_of_linear_attention(healthy):
    subject = Subject(healthy, lambda: IMAGES)
    seen = []
    student = subject.model
    attention = model.attention_modules(student)[1]
    attention.feature_map.register_forward_hook(lambda _, args, output: seen.append(output))
    _, smallest = subject.forward
    (query, key), tokens = seen[0], 17
    assert query.shape[2] == tokens
    expected = torch.einsum("bhqf,bhkf->bhq", query.double(), key.double()) / tokens
    assert smallest == {1: pytest.approx(expected.min().item(), rel=1e-5)}
    hooks = [h for m in student.modules() for h in m._forward_hooks.values()]
    assert len(hooks) == 1, "only the hook of this test is left"


@pytest.mark.parametrize(
    ("check", "damage", "status", "names"),
    [
        (model.weights, lambda f: add_tensor(f, "teacher.layers.0.weight"), "FAIL", "'teacher.layers.0.weight'"),
        (model.weights, lambda f: (f / "model.safetensors").unlink(), "FAIL", "no safetensors"),
        (model.position_grid, lambda f: set_config(f, image_size=56), "FAIL", "8x8 patches (56x56 pixels)"),
        (model.position_grid, lambda f: set_config(f, image_size=[21, 28]), "FAIL", "3x4 patches"),
        (model.image_processor, lambda f: (f / "preprocessor_config.json").unlink(), "WARN", "missing"),
        (
            model.image_processor,
            lambda f: (f / "preprocessor_config.json").write_text("[]"),
            "FAIL",
            "must be a JSON object",
        ),
        (model.card, lambda f: (f / "README.md").unlink(), "WARN", "no README.md"),
        (model.card, lambda f: (f / "README.md").write_text("# A model\n"), "WARN", "license, library_name"),
        (model.finite_weights, lambda f: change_weights(f, classifier=all_nan), "FAIL", "'classifier."),
        (model.finite_outputs, lambda f: change_weights(f, projection=all_nan), "FAIL", "NaN"),
        (model.smallest_normalizer, lambda f: change_weights(f, projection=all_nan), "FAIL", "nan in layer 1"),
        (model.safe_to_open, lambda f: set_config(f, num_hidden_layers=10**9), "FAIL", "1000000000"),
        (model.finite_weights, lambda f: (f / "model.safetensors").write_bytes(b""), "FAIL", "truncated"),
    ],
)
def test_damage_is_named_with_a_remedy(folder, check, damage, status, names):
    damage(folder)
    found = examine(check, folder)
    assert found.status == status
    assert names in found.message
    assert "\n" not in found.message
    assert found.remedy or status == "FAIL"


def test_vanishing_normalizer_fails(tmp_path):
    teacher = save_teacher(tmp_path / "teacher")
    student = convert(teacher, feature_map="relu", check_parity=False)
    student.save_pretrained(tmp_path / "student")
    # all queries become negative, so that relu leaves nothing of them
    change_weights(tmp_path / "student", **{"q_proj.weight": torch.zeros_like, "q_proj.bias": lambda b: 0 * b - 1})
    found = examine(model.smallest_normalizer, tmp_path / "student")
    assert (found.status, found.message[:7]) == ("FAIL", "0.0e+00")
    assert "feature_map" in found.remedy


def test_softmax_model_is_healthy_too(healthy):
    subject = Subject(healthy.parent / "teacher", lambda: IMAGES)
    assert run_check(model.finite_outputs, subject).status == "PASS"
    assert run_check(model.smallest_normalizer, subject).message == "no layer is linear"
    assert "part of Transformers" in run_check(model.loads_without_the_package, subject).message


def test_without_images_nothing_is_claimed(healthy):
    for check in (model.finite_outputs, model.smallest_normalizer):
        found = examine(check, healthy, images=None)
        assert (found.status, "--dataset" in found.remedy) == ("WARN", True)


def test_unsafe_folder_is_not_looked_at_further(folder):
    (folder / "link").symlink_to("/etc/passwd")
    found = list(model.model_checks(Subject(folder, lambda: pytest.fail("images were loaded"))))
    assert [check.status for check in found] == ["FAIL"]
    assert "'link'" in found[0].message


@pytest.mark.parametrize(
    ("auto_map", "status", "names"),
    [
        ({}, "WARN", "no auto_map"),
        ({"AutoModel": "modeling_absent.AdaLAViTModel"}, "FAIL", "'modeling_absent.py'"),
        ({"AutoModel": "../elsewhere.AdaLAViTModel"}, "FAIL", "outside the folder"),
        ({"AutoModel": "org/repo--modeling_adala.AdaLAViTModel"}, "FAIL", "outside the folder"),
    ],
)
def test_code_that_the_folder_lacks_is_named_and_never_run(folder, auto_map, status, names, monkeypatch):
    set_config(folder, auto_map=auto_map)
    monkeypatch.setattr(model, "run_probe", lambda *_: pytest.fail("the code was run"))
    found = run_check(model.loads_without_the_package, Subject(folder, trust_remote_code=True))
    assert found.status == status
    assert names in found.message


def test_code_in_the_folder_is_not_run_unless_the_user_says_so(folder, monkeypatch):
    set_config(folder, auto_map={"AutoModel": "code.AdaLAViTModel"})
    (folder / "code.py").write_text("raise SystemExit('it ran')")
    monkeypatch.setattr(model, "run_probe", lambda *_: pytest.fail("the code was run"))
    found = run_check(model.loads_without_the_package, Subject(folder))
    assert (found.status, "--trust-remote-code" in found.remedy) == ("WARN", True)


@pytest.mark.long
@pytest.mark.slow
def test_fresh_processes_open_the_model_with_and_without_the_package(folder):
    subject = Subject(folder, trust_remote_code=True)
    assert run_check(model.loads_with_the_package, subject) == Check(
        "loads with the package", "PASS", "AdaLAViTForImageClassification, in a fresh process"
    )
    found = run_check(model.loads_without_the_package, subject)
    assert (found.status, "same outputs" in found.message) == ("PASS", True), found


@pytest.fixture(scope="module")
def families(tmp_path_factory) -> dict[tuple[str, str], Path]:
    """A sound checkpoint of every family and head."""
    folders = {}
    for name, head in CASES:
        folders[name, head] = tmp_path_factory.mktemp("families") / f"{name}-{head}"
        torch.manual_seed(0)
        model = MODELS[name][head](tiny_config(MODELS[name]["Model"].config_class))
        randomize(model).save_pretrained(folders[name, head])
    return folders


ALONE = """
import importlib.util, json, sys
specification = importlib.util.spec_from_file_location("probe", sys.argv[1])
probe = importlib.util.module_from_spec(specification)
specification.loader.exec_module(probe)
probe.hide_package()
print(json.dumps({folder: probe.probe(folder, trust=True) for folder in sys.argv[2:]}))
"""
# one head of every family, all of one
WITHOUT_PACKAGE = [case for case in CASES if case[1] == "Model" or case[0] == "vit"]


@pytest.fixture(scope="module")
def without_package(families, tmp_path_factory) -> dict[str, dict]:
    """What the probe finds where the package cannot be imported; one process for all, since they are slow to start."""
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path_factory.mktemp("modules"))}
    folders = [str(families[case]) for case in WITHOUT_PACKAGE]
    command = [sys.executable, "-P", "-c", ALONE, probe.__file__, *folders]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_healthy_models_of_every_family_and_head_fail_no_check(case, families, without_package, monkeypatch):
    def run(directory: Path, *options: str) -> dict:
        return without_package[str(directory)] if options else probe.probe(str(directory))

    monkeypatch.setattr(model, "run_probe", run)  # the real one, in this process and in the one above
    images = torch.randn(2, 3, *NATIVE, generator=torch.Generator().manual_seed(0))
    subject = Subject(families[case], lambda: images, trust_remote_code=case in WITHOUT_PACKAGE)
    found = {check.name: check for check in model.model_checks(subject)}
    assert {name for name, check in found.items() if check.status != "PASS"} <= {
        "image processor",
        "card",
        *([] if case in WITHOUT_PACKAGE else ["loads without the package"]),
    }, found
    if case in WITHOUT_PACKAGE:
        assert "with the same outputs" in found["loads without the package"].message
    assert found["loads with the package"].message.startswith(MODELS[case[0]][case[1]].__name__)
    assert "4x4 patches (32x32 pixels)" in found["position grid"].message
    assert "2 images" in found["finite outputs"].message


def test_the_probe_imports_the_package_that_runs_it(tmp_path, monkeypatch):
    seen: dict[str, str] = {}

    def run(command, env, **kwargs):
        seen.update(env)
        return subprocess.CompletedProcess(command, 0, stdout="{}\n", stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    model.run_probe(tmp_path)
    assert Path(seen["PYTHONPATH"].split(os.pathsep)[0]) == Path(modeling_adala.__file__).parents[1]


@pytest.mark.parametrize("name", MODELS)
def test_a_position_too_many_or_too_few_fails_for_every_family(name, families, tmp_path):
    for change in (lambda tensor: tensor[..., :-1, :], lambda tensor: torch.cat([tensor, tensor[..., :1, :]], dim=-2)):
        folder = Path(shutil.copytree(families[name, "Model"], tmp_path / "model", dirs_exist_ok=True))
        subject = Subject(folder)
        vision = {key for key in subject.shapes if "position_embedding" in key and "text" not in key}
        if not vision:  # DINOv3 rotates
            assert "computed" in examine(model.position_grid, folder).message
            continue
        change_weights(folder, **dict.fromkeys(vision, change))
        assert examine(model.position_grid, folder).status == "FAIL"


def test_code_files_are_compared_with_those_of_the_package(folder):
    assert (
        examine(model.code_files, folder).message
        == f"all {len(list(folder.glob('*.py')))} are those of vit-adala 0.1.0"
    )
    (folder / "modeling_adala.py").open("a").write("import os  # altered\n")
    (folder / "evil.py").write_text("raise SystemExit")
    found = examine(model.code_files, folder)
    assert (found.status, "evil.py, modeling_adala.py" in found.message) == ("FAIL", True)
    set_config(folder, adala_version="0.0.9")
    found = examine(model.code_files, folder)
    assert (found.status, "vit-adala 0.0.9" in found.message) == ("WARN", True)
    for file in folder.glob("*.py"):
        file.unlink()
    assert examine(model.code_files, folder).status == "PASS"


@pytest.mark.parametrize("kind", ["missing", "unexpected"])
def test_tensor_without_its_place_fails(healthy, monkeypatch, kind):
    result = {"class": "AdaLAViTModel", "missing": [], "unexpected": [], kind: ["projector.weight"]}
    monkeypatch.setattr(model, "run_probe", lambda *_: result)
    found = examine(model.loads_with_the_package, healthy)
    assert (found.status, "'projector.weight'" in found.message) == ("FAIL", True)


def test_code_that_gives_other_outputs_than_the_package_fails(healthy, monkeypatch):
    monkeypatch.setattr(model, "run_probe", lambda _, *options: {"class": "X", "outputs": [float(bool(options))]})
    found = run_check(model.loads_without_the_package, Subject(healthy, trust_remote_code=True))
    assert (found.status, "different outputs" in found.message) == ("FAIL", True)


@pytest.mark.long
@pytest.mark.slow
def test_process_that_fails_is_a_finding_of_one_line(folder):
    (folder / "config.json").write_text('{"model_type": "vit-of-tomorrow"}')
    found = examine(model.loads_with_the_package, folder)
    assert found.status == "FAIL"
    assert "vit-of-tomorrow" in found.message and "\n" not in found.message


# --- the machine -----------------------------------------------------------------------------------------------------


@pytest.fixture
def metadata(monkeypatch):
    """Pretends that these distributions are installed: name to version and requirements."""

    def pretend(**distributions: tuple[str, list[str]]) -> None:
        def look_up(name: str, index: int):
            if name not in distributions:
                raise importlib.metadata.PackageNotFoundError(name)
            return distributions[name][index]

        monkeypatch.setattr(importlib.metadata, "version", lambda name: look_up(name, 0))
        monkeypatch.setattr(importlib.metadata, "requires", lambda name: look_up(name, 1))

    return pretend


@pytest.mark.parametrize(
    ("version", "status"), [("2.6.0", "PASS"), ("2.13.0+cpu", "PASS"), ("2.5.1", "FAIL"), ("3.0.0", "FAIL")]
)
def test_version_is_held_against_the_range_of_the_metadata(metadata, version, status):
    metadata(**{"vit-adala": ("0.1.0", ["torch>=2.6,<3", 'pytest>=8; extra == "dev"']), "torch": (version, [])})
    wanted = environment.requirements()
    assert [requirement.name for requirement in wanted] == ["torch"], "extras are left out"
    found = environment.requirement(wanted[0])
    assert found.status == status
    assert version in found.message
    assert ("pip install 'torch<3,>=2.6'" in found.remedy) == (status == "FAIL")


def test_missing_package_fails_with_the_command_that_installs_it(metadata):
    metadata()
    found = environment.requirement(Requirement("peft>=0.21"))
    assert (found.status, found.remedy) == ("FAIL", "Run pip install 'peft>=0.21'.")
    assert environment.requirements() == []
    assert environment.python().status in ("PASS", "WARN")


@pytest.mark.parametrize(
    ("version", "wanted", "status"),
    [
        (None, [], "PASS"),
        ("0.28.0+cpu", ["torch==2.13.0"], "PASS"),
        ("0.28.0", ["numpy", "torch==2.13.0"], "WARN"),
        ("0.25.0+cpu", ["torch==2.10.0"], "FAIL"),
    ],
)
def test_torchvision_of_another_torch_is_a_conflict(metadata, version, wanted, status):
    torchvision = {} if version is None else {"torchvision": (version, wanted)}
    metadata(torch=("2.13.0+cpu", []), **torchvision)
    found = environment.torchvision()
    assert found.status == status
    assert ("pip uninstall torchvision" in found.remedy) == (status != "PASS")


@pytest.mark.parametrize(("free", "status"), [(100e9, "PASS"), (1e9, "WARN"), (1e6, "FAIL")])
def test_disk_space(monkeypatch, free, status):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(free, 0, free))
    assert environment.disk().status == status


def test_offline_is_not_a_fault_and_nothing_is_asked(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(environment, "get_session", lambda: pytest.fail("the network was used"))
    found = environment.hub()
    assert (found.status, "HF_HUB_OFFLINE" in found.message) == ("PASS", True)


def test_hub_that_does_not_answer_is_named_without_its_password(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://user:secret@127.0.0.1:9?key=secret")
    monkeypatch.setenv("HF_ENDPOINT", constants.ENDPOINT)
    found = environment.hub()
    assert found.status == "WARN"
    assert "http://127.0.0.1:9 (from HF_ENDPOINT)" in found.message
    assert "HF_HUB_OFFLINE=1" in found.remedy
    assert "secret" not in str(found)


def test_token_is_found_and_never_shown(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    assert environment.token() == Check("token", "PASS", "present, from HF_TOKEN")
    main(["doctor", "--json"])
    captured = capsys.readouterr()
    assert "present, from HF_TOKEN" in captured.out
    assert "verysecret" not in captured.out + captured.err


def test_error_inside_a_check_is_its_finding(monkeypatch):
    def broken():
        raise ImportError("cannot import name 'x'\nfrom 'y'")

    monkeypatch.setattr(environment, "CHECKS", (broken, environment.token))
    *_, first, last = environment.environment_checks()
    assert (first.name, first.status, first.message) == ("broken", "FAIL", "ImportError: cannot import name 'x'")
    assert last.name == "token"


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    """No fresh processes: what they would find is put in their place."""
    found = {"class": "AdaLAViTForImageClassification", "missing": [], "unexpected": [], "outputs": [0.0]}
    monkeypatch.setattr(model, "run_probe", lambda *_: found)


def test_report_of_a_healthy_model_has_one_line_per_check(healthy, quick, capsys):
    assert main(["doctor", str(healthy)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith(("PASS  ", "WARN  ")) for line in lines)
    names = [line.split("  ", 1)[1].split(":")[0] for line in lines]
    for check in (*environment.CHECKS, model.safe_to_open, *model.CHECKS):
        assert check.__name__.replace("_", " ") in names
    assert any("16 images" in line for line in lines), "the digits went through the model"


def test_failed_check_makes_the_exit_code_1_and_json_stays_json(folder, quick, capsys):
    change_weights(folder, classifier=all_nan)
    assert main(["doctor", str(folder), "--json"]) == 1
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["healthy"] is False
    failed = [check for check in report["checks"] if check["status"] == "FAIL"]
    assert [check["name"] for check in failed] == ["finite weights"]
    assert failed[0].keys() == {"name", "status", "message", "remedy"}
    (line,) = captured.err.splitlines()
    assert "finite weights" in line and line.startswith("vit-adala doctor: 1 of ")


@pytest.mark.parametrize(
    ("argv", "code", "names"),
    [
        (["nobody/nothing"], 1, "'nobody/nothing'"),
        (["/not/there"], 1, "'/not/there'"),
        (["--dataset", "mnist-digits"], 2, "pass its folder or Hub id"),
        (["--trust-remote-code"], 2, "pass its folder or Hub id"),
        (["--loud"], 2, "--loud"),
        (["a", "b"], 2, "b"),
    ],
)
def test_mistake_is_one_line(argv, code, names, capsys):
    assert main(["doctor", *argv]) == code
    captured = capsys.readouterr()
    assert (captured.out, names in captured.err) == ("", True)
    assert len(captured.err.splitlines()) == 1


def test_dataset_that_does_not_exist_is_a_finding_and_not_a_crash(healthy, quick, capsys):
    assert main(["doctor", str(healthy), "--dataset", "/not/there"]) == 1
    assert "FAIL  finite outputs: source='/not/there'" in capsys.readouterr().out


def test_markup_and_control_characters_are_printed_as_text():
    check = Check("na[bold]me", "WARN", "a\nb \x1b[31m[red]c[/red] {{ d }}", "do\rit")
    assert doctor._line(check).plain == "WARN  na[bold]me: a b  [31m[red]c[/red] {{ d }} -> do it"
