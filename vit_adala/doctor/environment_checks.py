"""Checks of `vit-adala doctor` on the environment.

The packages to check are imported inside the functions, so that a broken one is a finding and not a crash.
"""

import importlib.metadata
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from huggingface_hub import constants, get_token
from huggingface_hub.utils import get_session
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from transformers import AttentionInterface

from modeling_adala.errors import UsageError

from .checks import Check, Status, run_check

DISTRIBUTION = "vit-adala"
HUB_SECONDS = 5.0
FREE_GB_WARN, FREE_GB_FAIL = 5.0, 0.5


def requirements() -> list[Requirement]:
    """Return the requirements of the installed distribution without extras; none if it is not installed."""
    try:
        lines = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [wanted for wanted in map(Requirement, lines) if wanted.marker is None or wanted.marker.evaluate()]


def python() -> Check:
    """Check that the interpreter is in the tested range."""
    version = platform.python_version()
    try:
        wanted = importlib.metadata.metadata(DISTRIBUTION)["Requires-Python"] or ""
    except importlib.metadata.PackageNotFoundError:
        remedy = "Run pip install -e . in the repository, or pip install vit-adala."
        return Check(
            "python", "WARN", f"{version}; {DISTRIBUTION} is not installed, so the tested ranges are unknown", remedy
        )
    if not SpecifierSet(wanted).contains(version):
        return Check("python", "FAIL", f"{version} is outside the tested {wanted}", f"Use a Python {wanted}.")
    return Check("python", "PASS", f"{version} (tested: {wanted})")


def requirement(wanted: Requirement) -> Check:
    """Check that a package is installed in the tested range."""
    remedy = f"Run pip install '{wanted.name}{wanted.specifier}'."
    try:
        version = importlib.metadata.version(wanted.name)
    except importlib.metadata.PackageNotFoundError:
        return Check(wanted.name, "FAIL", f"not installed (tested: {wanted.specifier})", remedy)
    # local builds (2.13.0+cpu) and release candidates count as the release
    if not wanted.specifier.contains(Version(version).public, prereleases=True):
        return Check(wanted.name, "FAIL", f"{version} is outside the tested {wanted.specifier}", remedy)
    return Check(wanted.name, "PASS", f"{version} (tested: {wanted.specifier})")


def torchvision() -> Check:
    """Check that torchvision, if installed, fits torch: otherwise it breaks imports of Transformers."""
    try:
        version, lines = importlib.metadata.version("torchvision"), importlib.metadata.requires("torchvision") or []
    except importlib.metadata.PackageNotFoundError:
        return Check("torchvision", "PASS", "not installed; not needed")
    installed = Version(importlib.metadata.version("torch"))
    wanted = [r.specifier for r in map(Requirement, lines) if r.name == "torch"]
    remedy = "Run pip uninstall torchvision, or install the one of your torch from the same index."
    if any(not specifier.contains(installed.public, prereleases=True) for specifier in wanted):
        return Check(
            "torchvision", "FAIL", f"{version} is built for torch{wanted[0]}, but torch is {installed}", remedy
        )
    if (Version(version).local or "") != (installed.local or ""):
        return Check(
            "torchvision", "WARN", f"{version} and torch {installed} are builds for different devices", remedy
        )
    return Check("torchvision", "PASS", f"{version}, which fits torch {installed}")


def device() -> Check:
    """Check which device models run on."""
    from trainers.runs.facts import describe_machine

    machine = describe_machine()
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        return Check("device", "PASS", f"{machine}, {memory:.0f} GB, {torch.cuda.device_count()} of them")
    if torch.version.cuda is not None:
        remedy = "Check the driver with nvidia-smi; without a GPU, the CPU build of torch is smaller."
        return Check(
            "device", "WARN", f"{machine}; torch is built for CUDA {torch.version.cuda}, but sees no GPU", remedy
        )
    if shutil.which("nvidia-smi"):
        remedy = "Install a CUDA build of torch."
        return Check("device", "WARN", f"{machine}; there is an NVIDIA driver, but torch is a CPU build", remedy)
    return Check("device", "PASS", f"{machine}, no GPU")


def bf16() -> Check:
    """Check whether training uses bf16 by default, and say why."""
    from trainers.base_config import has_fast_bf16

    if has_fast_bf16():
        return Check("bf16", "PASS", "multiplied in hardware, on by default in training")
    return Check("bf16", "PASS", "not in hardware here (no AVX512-BF16, AMX or fitting GPU): training is in float32")


def attention() -> Check:
    """Check which backend computes attention, and say why."""
    from modeling_adala.kernels import choose_backend

    if "adala" not in AttentionInterface().valid_keys():
        return Check("attention", "FAIL", "'adala' is not registered with Transformers", "Install vit-adala again.")
    backend = choose_backend("cuda" if torch.cuda.is_available() else "cpu")
    return Check(
        "attention",
        "PASS",
        f"linear layers: backend {backend.name!r} ({backend.reason}); softmax layers: PyTorch's SDPA",
    )


def disk() -> Check:
    """Check the free space for checkpoints here and for downloads in the Hub's cache."""
    places = {"here": Path.cwd(), "in the Hub's cache": Path(constants.HF_HUB_CACHE)}
    free = {name: shutil.disk_usage(_existing(path)).free / 1e9 for name, path in places.items()}
    message = ", ".join(f"{size:.1f} GB free {name}" for name, size in free.items())
    if min(free.values()) >= FREE_GB_WARN:
        return Check("disk", "PASS", message)
    status: Status = "WARN" if min(free.values()) >= FREE_GB_FAIL else "FAIL"
    return Check("disk", status, message, "Free some space, or set HF_HOME to another disk.")


def hub() -> Check:
    """Check whether the Hub is enabled and answers."""
    from hub_cards.push import without_login

    endpoint = without_login(constants.ENDPOINT).partition("?")[0]
    where = endpoint + (" (from HF_ENDPOINT)" if os.environ.get("HF_ENDPOINT") else "")
    if constants.is_offline_mode():
        return Check("hub", "PASS", f"offline (HF_HUB_OFFLINE): folders and the cache are used, not {where}")
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
    except Exception as error:  # the client's own, of a library that may change
        remedy = "Check the network, set HF_ENDPOINT to a mirror, or set HF_HUB_OFFLINE=1 to work offline."
        return Check("hub", "WARN", f"{where} does not answer ({type(error).__name__})", remedy)
    return Check("hub", "PASS", f"{where} answers")


def token() -> Check:
    """Check for a token, without showing any of it."""
    if get_token() is None:
        return Check("token", "PASS", "none; only pushes and private models need one (hf auth login)")
    named = [name for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if os.environ.get(name)]
    return Check("token", "PASS", f"present, from {named[0] if named else constants.HF_TOKEN_PATH}")


CHECKS: tuple[Callable[[], Check], ...] = (torchvision, device, bf16, attention, disk, hub, token)


def environment_checks() -> Iterator[Check]:
    """Yield the checks of the environment, each as soon as it is done."""
    yield run_check(python)
    for wanted in requirements():
        yield run_check(requirement, wanted)
    for check in CHECKS:
        yield run_check(check)


def _existing(path: Path) -> Path:
    """Return the folder, or its nearest parent that exists."""
    return next(place for place in (path, *path.parents) if place.exists())


def check_cache() -> None:
    """Refuse a cache folder that cannot be written, which `datasets` would report as broken data.

    Raises:
        UsageError: Naming the folder and the variable that chooses another.
    """
    import datasets

    folder = Path(datasets.config.HF_DATASETS_CACHE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(
            f"the cache of datasets, {str(folder)!r}, cannot be written ({error.strerror}); set HF_HOME to a folder"
            " that can."
        ) from error
