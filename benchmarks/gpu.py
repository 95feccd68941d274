"""GPU acceptance in one command: tests, operator, whole model, training steps, scaling, and a distillation.

    python -m benchmarks.gpu                      9 minutes, into benchmarks/results/*-cuda.json
    python -m benchmarks.gpu --minutes 4 --parts model operator --output DIR
    python -m benchmarks.gpu --dry-run            half a minute on a CPU: every part at toy size

What it needs is checked first, a line each. Every part is a process of its own with its own share of the time: a
kernel that breaks the GPU's context, a hang or a want of memory then ends one part and not the others. Each writes
what it has after every case. The last lines say what was asked for and what was reached; `python -m benchmarks.tables`
puts all of it into docs/speed.md. On a machine without network: see benchmarks/gpu_wheels.sh.
"""

import argparse
import ast
import gc
import importlib
import multiprocessing
import os
import shutil
import signal
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Part:
    """Script of a part, its seconds of nine minutes, and for how many of them it begins no new case at the end."""

    module: str
    seconds: float
    margin: float = 0.0


# imports take ten seconds of each; what a part leaves over goes to those after it
PARTS = {
    "tests": Part("benchmarks.gpu_tests", 75),
    "operator": Part("benchmarks.operator", 65, 25),
    "model": Part("benchmarks.model", 100, 45),
    "training": Part("benchmarks.training", 40, 20),
    "scaling": Part("benchmarks.scaling", 20, 12),
    "distillation": Part("benchmarks.distillation", 240, 35),
}
TORCH = ("2.11", "2.14")
GIB, LEAST_MEMORY, ENOUGH_MEMORY = 2**30, 8, 40


def main() -> None:
    args = parse()
    start = time.monotonic()
    if args.dry_run:  # both are read at an import below
        os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    failed = False
    for fine, line in checks(args):
        print("ok   " if fine else "FAIL ", line, flush=True)
        failed = failed or not fine
    if failed:
        raise SystemExit("error: this machine lacks what FAIL names; nothing was run.")
    # only now: they import the packages that the checks are about
    from hub_cards.card import table

    from .acceptance import GPU, judge
    from .common import load_json, write_result

    suffix = "" if args.dry_run else "-cuda"
    files = {name: args.output / f"{name}{suffix}.json" for name in PARTS}
    rows = []
    for place, name in enumerate(args.parts):
        part, left = PARTS[name], 60 * args.minutes - (time.monotonic() - start)
        seconds = left * part.seconds / sum(PARTS[other].seconds for other in args.parts[place:])
        print(f"\n--- {name}: at most {seconds:.0f} s", flush=True)
        begin = time.monotonic()
        arguments = arguments_of(name, files[name], max(seconds - part.margin, seconds / 2), args)
        outcome = run_part(part.module, arguments, seconds, args.dry_run)
        rows.append({"part": name, "outcome": outcome, "seconds": time.monotonic() - begin, "most": seconds})
    found = {name: load_json(path)["rows"] for name, path in files.items() if path.is_file()}
    verdict = judge(found, GPU)
    path = args.output / f"gpu{suffix}.json"
    device = "cpu" if args.dry_run else "cuda"
    write_result("gpu", rows, smoke=args.dry_run, output=path, device=device, subject="GPU acceptance", asked=verdict)
    parts = [["part", "outcome", "seconds"], *([r["part"], r["outcome"], f"{r['seconds']:.0f}"] for r in rows)]
    print("", table(parts), "", table(verdict), "", path, sep="\n")
    if any(row["outcome"] != "ok" for row in rows):
        raise SystemExit("error: not all parts ended well; see above.")


def parse() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--dry-run", action="store_true", help="every part at toy size, on a CPU")
    options.add_argument("--minutes", type=float, default=9.0, help="for everything. Default: 9")
    options.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="Default: all, in this order")
    options.add_argument("--output", type=Path, help="folder of the results. Default: benchmarks/results")
    options.add_argument("--teacher", help="another teacher to distill, beside the digits")
    options.add_argument("--dataset", help="its images")
    options.add_argument("--image-size", help="their size in pixels")
    args = options.parse_args()
    if args.output is None:
        args.output = ROOT / "out" / "benchmarks" if args.dry_run else ROOT / "benchmarks" / "results"
    return args


def arguments_of(name: str, output: Path, seconds: float, args: argparse.Namespace) -> list[str]:
    """Return the command line of a part."""
    arguments = ["--output", str(output), "--seconds", f"{seconds:.0f}", *(["--smoke"] if args.dry_run else [])]
    if name == "distillation":
        given = {"--teacher": args.teacher, "--dataset": args.dataset, "--image-size": args.image_size}
        arguments += [text for option, value in given.items() if value for text in (option, value)]
    return arguments


def run_part(module: str, arguments: list[str], seconds: float, dry_run: bool) -> str:
    """Run a script in a process of its own, kill it when its time is up, and return how it ended."""
    # a forked process cannot use a GPU that its parent has looked at; without one, it spares the imports
    context: Any = multiprocessing.get_context("fork" if dry_run else "spawn")
    gc.freeze()  # a forked process would copy what its collector looks at
    process = context.Process(target=_run_alone, args=(module, arguments))
    process.start()
    try:
        process.join(seconds)
        if process.exitcode is None:
            return f"killed after {seconds:.0f} s"
    finally:
        if process.exitcode is None:  # a Ctrl-C of ours does not reach it
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
    return "ok" if process.exitcode == 0 else f"exit status {process.exitcode}"


def _run_alone(module: str, arguments: list[str]) -> None:
    os.setpgrp()  # with the processes that it starts, which end with it
    script = importlib.import_module(module)
    script.run_script(lambda: script.main(arguments))


def checks(args: argparse.Namespace) -> Iterator[tuple[bool, str]]:
    """Yield whether the machine has what is needed, and a line about it; the quick ones first."""
    yield sys.version_info >= (3, 11), f"Python {sys.version.split()[0]}"
    complete = True
    for wanted in requirements():
        fine, line = check_package(wanted)
        complete = complete and fine
        yield fine, line
    yield from check_folders(args.output)
    if not complete:  # what follows imports them
        return
    found = list(check_device(args.dry_run))
    yield from found
    if all(fine for fine, _ in found):
        yield from check_parts(args.dry_run)


def requirements() -> list[Requirement]:
    """Return what setup.py requires; the repository need not be installed."""
    lists: dict[str, list[str]] = {"REQUIRED": [], "DEMO": []}
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in lists:
            lists[node.targets[0].id] = ast.literal_eval(node.value)
    return [Requirement(line) for line in (*lists["REQUIRED"], *lists["DEMO"], "pytest>=8", "pytest-xdist>=3.6")]


def check_package(wanted: Requirement) -> tuple[bool, str]:
    """Return whether a package is there in an allowed release, and a line about it."""
    try:
        version = Version(metadata.version(wanted.name))
    except metadata.PackageNotFoundError:
        return False, f"{wanted.name}: not installed, needs {wanted.specifier or 'any'}"
    fine = wanted.specifier.contains(version.public, prereleases=True)
    note = "" if fine else f": needs {wanted.specifier}"
    if wanted.name == "torch" and not Version(TORCH[0]) <= version < Version(TORCH[1]):
        note += f"; planned for {TORCH[0]} up to, but not, {TORCH[1]}"
    return fine, f"{wanted.name} {version}{note}"


def check_folders(output: Path) -> Iterator[tuple[bool, str]]:
    """Yield a line for each folder that something is written to."""
    cache = Path(os.environ.get("TRITON_CACHE_DIR", Path.home() / ".triton"))
    for what, folder in (
        ("results", output),
        ("temporary files", Path(tempfile.gettempdir())),
        ("Triton's cache", cache),
    ):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                free = shutil.disk_usage(folder).free / GIB
        except OSError as error:
            yield False, f"folder of {what}: {folder} cannot be written ({error.strerror})"
        else:
            yield free > 1, f"folder of {what}: {folder}, {free:.0f} GiB free"


def check_device(dry_run: bool) -> Iterator[tuple[bool, str]]:
    """Yield lines about the GPU and what Triton needs to compile for it."""
    import torch

    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, ("gcc", "clang", "cc"))), None)
    header = Path(sysconfig.get_path("include")) / "Python.h"
    yield dry_run or compiler is not None, f"C compiler, with which Triton builds its launchers: {compiler or 'none'}"
    yield (
        dry_run or header.is_file(),
        f"Python's headers, which they include: {header if header.is_file() else 'none'}",
    )
    if dry_run:
        yield not torch.cuda.is_available(), f"device: a dry run is for a CPU, GPUs seen: {torch.cuda.device_count()}"
        return
    if not torch.cuda.is_available():
        yield False, f"device: torch {torch.__version__} sees no GPU; --dry-run needs none"
        return
    capability, name = torch.cuda.get_device_capability(), torch.cuda.get_device_name()
    yield (
        capability >= (8, 0),
        f"device: {name}, capability {capability[0]}.{capability[1]}, CUDA {torch.version.cuda}",
    )
    free, total = (size / GIB for size in torch.cuda.mem_get_info())
    note = "" if free >= ENOUGH_MEMORY else f"; the largest cases want {ENOUGH_MEMORY}"
    yield free >= LEAST_MEMORY, f"memory: {free:.0f} of {total:.0f} GiB free{note}"


def check_parts(dry_run: bool) -> Iterator[tuple[bool, str]]:
    """Yield lines about what the parts import."""
    for part in PARTS.values():
        importlib.import_module(part.module)
    yield True, "all parts import"
    if not dry_run:
        from modeling_adala.kernels import choose_backend

        from .operator import load_peer

        backend = choose_backend("cuda")
        yield backend.name == "triton", f"backend: {backend.name}, {backend.reason}"
        yield True, f"peer library: {load_peer('cuda')[1]}"


if __name__ == "__main__":
    main()
