"""What a newcomer installs: declared, pinned, and whole once it is a wheel."""

import ast
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, packages_distributions, requires, version
from pathlib import Path

import pytest
import setuptools
from huggingface_hub import metadata_load
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from hub_cards.push_space import FILES, SPACE
from trainers.data.digits import DIGITS_TEACHER, find_teacher
from vit_adala.recipes import find_recipe

ROOT = Path(__file__).parents[1]
PACKAGES = ("modeling_adala", "trainers", "hub_cards", "vit_adala")
PINS = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]


@pytest.fixture(scope="module")
def metadata() -> dict:
    """The arguments of `setup` in setup.py."""
    arguments: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", arguments.update)
        runpy.run_path(str(ROOT / "setup.py"))
    return arguments


def names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in requirements}


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield str(node.module).partition(".")[0]


def test_every_package_that_is_imported_is_declared(metadata):
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    found = {name: path for path in files for name in imports(path)}
    known, distributions = {*PACKAGES, *sys.stdlib_module_names}, packages_distributions()
    needed = {name: distributions.get(name, [name]) for name in found if name not in known}
    assert len(needed) > 15
    extras = [line for name in ("demo", "onnx", "openvino") for line in metadata["extras_require"][name]]
    declared = names([*metadata["install_requires"], *extras, "triton"])
    undeclared = [name for name, owners in needed.items() if not declared & {canonicalize_name(x) for x in owners}]
    assert not undeclared, {name: str(found[name]) for name in undeclared}


def test_benchmarks_and_rivals_are_not_shipped(metadata):
    assert {package.partition(".")[0] for package in metadata["packages"]} == set(PACKAGES)


def test_a_space_gets_the_files_and_requirements_of_the_package(metadata):
    patterns = {package: {name for name in found if name != "**/*.py"} for package, found in FILES.items()}
    assert {package: found for package, found in patterns.items() if found} == {
        package: set(found) for package, found in metadata["package_data"].items()
    }
    lines = (SPACE / "requirements.txt").read_text().splitlines()
    extra = [Requirement(line) for line in metadata["extras_require"]["demo"]]
    (gradio,) = [requirement for requirement in extra if requirement.name == "gradio"]
    expected = [*map(Requirement, metadata["install_requires"]), *(x for x in extra if x is not gradio)]
    assert [Requirement(line) for line in lines if not line.startswith("#")] == expected
    assert metadata_load(SPACE / "README.md")["sdk_version"] in gradio.specifier


# --- constraints.txt -------------------------------------------------------------------------------------------------


def test_constraints_are_exact_and_fit_the_ranges_of_setup_py(metadata):
    for pin in PINS:
        assert re.fullmatch(r"==[^,*+]+", str(pin.specifier)), f"{pin}: not one public version"
    for line in [*metadata["install_requires"], *metadata["extras_require"]["dev"]]:
        wanted = Requirement(line)
        pins = [pin for pin in PINS if canonicalize_name(pin.name) == canonicalize_name(wanted.name)]
        assert pins, f"constraints.txt has no {wanted.name}; run make lock"
        for pin in pins:
            (pinned,) = [specifier.version for specifier in pin.specifier]
            assert pinned in wanted.specifier, f"{pin} is outside of setup.py's {wanted}; run make lock"


def test_constraints_pin_what_the_packages_themselves_depend_on(metadata):
    """As far as those that are pinned are installed here, in the pinned version: others have other dependencies."""
    pins = {(canonicalize_name(pin.name), str(pin.specifier)) for pin in PINS}
    open_ones = [*metadata["install_requires"], *metadata["extras_require"]["dev"], "setuptools"]
    seen: set[tuple[str, str]] = set()
    while open_ones:
        wanted = Requirement(open_ones.pop())
        name = canonicalize_name(wanted.name)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        for extra in {"", *wanted.extras} - {extra for seen_name, extra in seen if seen_name == name}:
            seen.add((name, extra))
            try:
                is_pinned = (name, f"=={Version(version(name)).public}") in pins
                inner = [Requirement(line) for line in requires(name) or []] if is_pinned else []
            except PackageNotFoundError:  # of another set-up, such as a GPU's
                continue
            open_ones += [str(x) for x in inner if x.marker is None or x.marker.evaluate({"extra": extra})]
    missing = {name for name, _ in seen} - {name for name, _ in pins}
    assert len(seen) > 40
    assert not missing, f"constraints.txt does not pin {', '.join(sorted(missing))}; run make lock"


# --- make ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_takes_the_first_python_that_runs_and_is_new_enough(tmp_path):
    def python(name: str, line: str) -> None:
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)

    def make(*arguments: str) -> subprocess.CompletedProcess:
        command = ["make", "--no-print-directory", "-C", str(ROOT), *arguments, "has-python"]
        environment = os.environ | {"PATH": f"{tmp_path}:/usr/bin:/bin"}
        environment.pop("MAKEFLAGS", None)
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    python("python3.11", "echo 'pyenv: python3.11: command not found' >&2; exit 127")
    python("python3.12", f'exec {sys.executable} "$@"')
    python("old-python", "exit 1")
    assert 'test -n "python3.12"' in make("-n").stdout
    assert 'test -n "/my/python"' in make("-n", "PYTHON=/my/python").stdout
    failed = make("-s", "CANDIDATES=old-python python3.11")
    assert failed.returncode != 0
    assert failed.stderr.startswith("No Python 3.11 or later with venv was found (tried old-python python3.11).")


# --- the wheel -------------------------------------------------------------------------------------------------------


def test_built_in_names_give_way_to_local_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_teacher("vit-digits") == str(DIGITS_TEACHER)
    assert Path(find_recipe("quickstart")).is_file()
    assert find_teacher("google/vit-base-patch16-224") == "google/vit-base-patch16-224"
    assert find_recipe("mine.yaml") == "mine.yaml"
    Path("vit-digits").mkdir()
    Path("quickstart").touch()
    assert find_teacher("vit-digits") == "vit-digits"
    assert find_recipe("quickstart") == "quickstart"


@pytest.mark.long
@pytest.mark.slow
def test_a_wheel_runs_the_quickstart_from_another_folder(tmp_path):
    """Built without a compiler from a copy of the checkout, installed alone beside borrowed dependencies."""
    source, environment, elsewhere = (tmp_path / name for name in ("source", "environment", "elsewhere"))
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / package, source / package, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    elsewhere.mkdir()

    def run(*command: str | Path) -> str:
        variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"CC": "false"}
        done = subprocess.run(command, cwd=elsewhere, env=variables, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout

    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    run(*pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", elsewhere, source)
    (wheel,) = elsewhere.glob("vit_adala-*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", environment)
    python = environment / "bin" / "python"
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel)
    (site,) = environment.glob("lib/python*/site-packages")
    # plain lines: an editable install of this package beside them is not followed
    (site / "borrowed.pth").write_text("".join(f"{path}\n" for path in sys.path if path.endswith("site-packages")))

    assert run(python, "-c", "import trainers; print(trainers.__file__)").startswith(str(site))
    stages = ("attention_alignment", "feature_alignment", "supervised")
    settings = [f"{stage}.{name}" for stage in stages for name in ("max_steps=1", "per_device_train_batch_size=2")]
    settings += [f"{stage}.calibration_images=2" for stage in stages[:2]]
    options = [part for setting in settings for part in ("--set", setting)]
    options += ["--knn-images", "20", "--eval-images", "20"]
    printed = run(environment / "bin" / "vit-adala", "run", "quickstart", *options)
    assert printed.rstrip().endswith("report: out/quickstart/report.md")
    out = elsewhere / "out" / "quickstart"
    assert "teacher: vit-digits\n" in (out / "config.yaml").read_text()
    assert len(list(out.glob("[123]-*/model.safetensors"))) == 3
