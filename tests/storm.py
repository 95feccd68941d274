"""Fault storm: kill -9 at random moments, damaged checkpoints, and nothing lost.

    python tests/storm.py --kills 100 --damages 20

Runs the digits recipe, all three stages with their evaluations, in child processes that are killed: half of them at a
random moment, half of them while files are being written. The same command goes on until the run ends; then its
weights, evaluations and files are compared with those of an undisturbed run. Damaged checkpoints are passed over, or
end the command in one line. The neighbors of the output folder never change. Exit code 1 if any of that fails.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

STAGES = ("attention_alignment", "feature_alignment", "supervised")
TRAINING = {"save_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1, "bf16": "false", "use_cpu": "true"}
# figures that differ from run to run
CLOCKS = ("seconds", "runtime", "per_second", "preparation_time", "train_loss", "data_wait", "peak_memory")
PATIENCE = 300.0


@dataclasses.dataclass
class Outcome:
    """End of one child: its exit code (`None`: killed), and its lines on stderr."""

    code: int | None
    lines: list[str]
    seconds: float


class Storm:
    """Kills and damages of one recipe.

    Args:
        root (`Path`): An empty folder to work in.
        teacher (`Path`): Softmax checkpoint for 28x28 gray images.
        steps (`int`): Steps of each stage.
        seed (`int`): Seed of the moments and of the damages.
    """

    def __init__(self, root: Path, teacher: Path, steps: int = 9, seed: int = 0):
        self.root, self.teacher, self.steps, self.random = root, teacher, steps, random.Random(seed)
        self.data = root / "digits"
        _save_digits(self.data)
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self.around = root / "home"
        for name in ("out.txt", "checkpoints/out/checkpoint-3/mine.txt", "notes/thesis.tex", "metrics.jsonl"):
            (self.around / name).parent.mkdir(parents=True, exist_ok=True)
            (self.around / name).write_text(f"a neighbor: {name}\n")
        self.out = self.around / "out"
        self.neighbors = self._neighbors()
        for _ in range(2):  # the first one imports what the children then have
            begin = time.monotonic()
            code = _run(self.arguments())
            self.seconds = time.monotonic() - begin
            if code != 0:
                raise SystemExit(f"the undisturbed run failed with exit code {code}")
            self.expected = self._result()
            self.reset()

    def arguments(self) -> list[str]:
        """Return the command of the recipe."""
        settings = {f"{stage}.{name}": value for stage in STAGES for name, value in TRAINING.items()}
        settings |= {f"{stage}.max_steps": self.steps for stage in STAGES}
        settings |= {f"{stage}.calibration_images": 4 for stage in STAGES[:2]}
        flags = {"teacher": self.teacher, "dataset": self.data, "image-size": 28, "output-dir": self.out}
        flags |= {"eval-images": 10, "knn-images": 20}
        given = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
        return ["run", *given, *(part for name, value in settings.items() for part in ("--set", f"{name}={value}"))]

    def reset(self) -> None:
        """Throw the output folder away."""
        shutil.rmtree(self.out, ignore_errors=True)

    def start(self, kill_when: Callable[[float], bool] = lambda seconds: False) -> Outcome:
        """Run the command in a child, and kill it at the first moment at which `kill_when(seconds)` holds."""
        log = self.root / "stderr.txt"
        begin = time.monotonic()
        child = os.fork()  # the imports take longer than the run
        if child == 0:
            _run_child(self.arguments(), log)
        killed = False
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            seconds = time.monotonic() - begin
            if done:
                break
            if not killed and (kill_when(seconds) or seconds > PATIENCE):
                os.kill(child, signal.SIGKILL)
                killed = True
            time.sleep(0.0005)
        code = os.waitstatus_to_exitcode(status)
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return Outcome(None if code == -signal.SIGKILL else code, lines, seconds)

    def kill(self) -> None:
        """Kill one run, or let it end if it is faster, and compare what it left."""
        writing, moment = self.random.random() < 0.5, self.random.uniform(0.0, self.seconds)
        outcome = self.start(lambda seconds: seconds >= moment and (not writing or self._is_writing()))
        if outcome.code is None:
            self.counts["kills while writing" if writing else "kills at a random moment"] += 1
        else:
            self.finish(outcome)
        self._check_neighbors("a kill")

    def finish(self, outcome: Outcome | None = None) -> None:
        """Run the command to its end, and compare its result with that of an undisturbed run."""
        outcome = outcome or self.start()
        if outcome.code != 0:
            self.failures.append(f"exit code {outcome.code} after a kill: {outcome.lines[-1:]}")
        elif self._result() != self.expected:
            found = self._result()
            apart = [name for name, value in found.items() if self.expected.get(name) != value]
            lines, wanted = (json.loads(result["figures"]) for result in (found, self.expected))
            extra, lost = (
                [x for x in a if a.count(x) != b.count(x)][:1] for a, b in ((lines, wanted), (wanted, lines))
            )
            self.failures.append(f"another result after kills: {apart or 'files are missing'}, {extra=}, {lost=}")
        self.counts["runs to the end after kills"] += 1
        self.reset()

    def damage(self) -> None:
        """Damage the newest checkpoint of a killed run, or all of them, and run the command again."""
        stage = self.random.choice(STAGES).replace("_", "-")
        while not (checkpoints := self._sealed(stage))[1:]:  # the child may be faster than the kill
            if self.start(lambda seconds: len(self._sealed(stage)) > 1).code is not None:
                self.reset()
        everything = self.random.random() < 0.2
        names = ("model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth")
        name, how = self.random.choice(names), self.random.choice((_truncate, _flip, _remove))
        for checkpoint in checkpoints if everything else checkpoints[-1:]:
            how(checkpoint / name, self.random)
        outcome = self.start()
        case = f"{how.__name__[1:]} {name}{' in all checkpoints' if everything else ''}"
        if everything:
            self.counts["damaged all checkpoints: one line"] += 1
            wrong = outcome.code != 1 or "start this stage again" not in outcome.lines[-1]
            if wrong or any("Traceback" in line for line in outcome.lines):
                self.failures.append(f"{case}: exit code {outcome.code}, {outcome.lines[-1:]}")
            shutil.rmtree(self.out / "checkpoints")  # the way out that it names
            outcome = self.start()
        else:
            self.counts["damaged newest checkpoint: passed over"] += 1
        if outcome.code != 0 or self._result() != self.expected:
            self.failures.append(f"{case}: exit code {outcome.code}, or another result; {outcome.lines[-1:]}")
        self._check_neighbors(case)
        self.reset()

    def tell(self) -> None:
        """Print what has happened so far."""
        for name, count in sorted(self.counts.items()):
            print(f"{count:4} {name}")
        for failure in self.failures:
            print(f"FAILED {failure}")
        print(f"{len(self.failures)} lost", flush=True)

    def _sealed(self, stage: str) -> list[Path]:
        from trainers.runs.checkpoints import is_sealed, list_checkpoints

        with contextlib.suppress(FileNotFoundError):  # the run may end, or start anew, meanwhile
            folders = sorted((self.out / "checkpoints").glob(f"*-{stage}"))
            return [path for folder in folders for path in list_checkpoints(folder) if is_sealed(path)]
        return []

    def _is_writing(self) -> bool:
        """Whether a checkpoint, a stage folder or a small file is half-written."""
        with contextlib.suppress(OSError):  # it may be gone again
            if any(True for _ in self.out.rglob("*.writing")):
                return True
            work = (self.out / "checkpoints").glob("*/checkpoint-*")
            return any(not (path / "checksums.json").exists() for path in work)
        return False

    def _result(self) -> dict[str, str]:
        """SHA-256 of the final weights, the logged figures, and the names of all files."""
        result = {}
        for path in sorted(self.out.rglob("*")):
            name = str(path.relative_to(self.out))
            result[name] = _sha256(path) if path.suffix == ".safetensors" else ""
        lines = [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]
        figures = [{k: v for k, v in line.items() if not any(clock in k for clock in CLOCKS)} for line in lines]
        return result | {"figures": json.dumps(figures)}

    def _neighbors(self) -> dict[str, str]:
        paths = [path for path in self.around.rglob("*") if not path.is_relative_to(self.out)]
        return {str(path): _sha256(path) if path.is_file() else "" for path in paths}

    def _check_neighbors(self, case: str) -> None:
        if self._neighbors() != self.neighbors:
            self.failures.append(f"{case}: the neighbors of the output folder have changed")


def _save_digits(path: Path) -> None:
    import datasets

    from trainers.data.digits import load_digits

    splits = {"train": load_digits("train").select(range(40)), "test": load_digits("test").select(range(0, 1000, 100))}
    datasets.DatasetDict(splits).save_to_disk(path)


def _run(arguments: list[str]) -> int:
    import torch

    import trainers.report.report
    from vit_adala.cli import main

    torch.set_num_threads(1)
    measure = trainers.report.report.measure_speed
    trainers.report.report.measure_speed = partial(measure, budget=0.0)  # the smallest size is enough
    try:
        return main(arguments)
    finally:
        trainers.report.report.measure_speed = measure


def _run_child(arguments: list[str], log: Path) -> None:
    code = 1
    try:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        code = _run(arguments)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _truncate(path: Path, moments: random.Random) -> None:
    os.truncate(path, moments.randrange(path.stat().st_size))


def _flip(path: Path, moments: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[moments.randrange(len(content))] ^= 1 << moments.randrange(8)
    path.write_bytes(content)


def _remove(path: Path, moments: random.Random) -> None:
    path.unlink()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--damages", type=int, default=20)
    parser.add_argument("--steps", type=int, default=9, help="of each stage")
    parser.add_argument("--teacher", type=Path, default=REPOSITORY / "trainers/teachers/vit-digits")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        storm = Storm(Path(root), args.teacher, args.steps, args.seed)
        print(f"an undisturbed run takes {storm.seconds:.1f} s", flush=True)
        with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C shows what there is
            while sum(count for name, count in storm.counts.items() if name.startswith("kills")) < args.kills:
                storm.kill()
            storm.finish()
            storm.tell()
            for _ in range(args.damages):
                storm.damage()
            storm.tell()
    return 1 if storm.failures else 0


if __name__ == "__main__":
    sys.exit(main())
