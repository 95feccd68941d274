"""`vit-adala`: runs a command. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 and 143 stopped."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from importlib import import_module

from .interruption import exit_code, handled, in_words, leave_at_once, raise_terminated

COMMANDS = {
    "run": "run all stages from a recipe or from flags, resumable, with a report",
    "convert": "replace softmax by linear attention and save the untrained student",
    "align": "stage 1, attention alignment: each linear attention learns its teacher's output",
    "distill": "stage 2, feature alignment: the whole student learns the teacher's features",
    "finetune": "stage 3, supervised fine-tuning: train a classifier or a segmenter, linear or softmax",
    "evaluate": "compare a student with its teacher: k-NN, linear probe, cosine and error of the features",
    "doctor": "check this machine and a model: a line each with PASS, WARN or FAIL and the remedy",
    "push": "upload a checkpoint to the Hub in one commit, with its card and the code that opens it",
    "inspect": "describe a model and what linear attention would save; reads no weights",
    "bench": "measure time, memory and break-even of linear beside softmax attention on this machine",
    "embed": "write the features of a dataset into a parquet file, resumable",
    "export": "write a model as an ONNX or OpenVINO graph, checked against PyTorch",
    "features": "draw patch features and attention maps, student beside teacher",
    "demo": "show a student beside its teacher in a browser",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv (`Sequence[str]`, *optional*): Arguments without the program's name. Default: the process's own, and then
            signals are handled, too.

    Returns:
        `int`: The exit code.
    """
    is_program = argv is None
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0 if argv else 2
    if argv[0] == "--version":
        from modeling_adala import __version__

        print(f"vit-adala {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        close = get_close_matches(argv[0], COMMANDS, n=1)
        hint = f"did you mean {close[0]!r}? Choose" if close else "choose"
        return _say("vit-adala", f"unknown command {argv[0]!r}; {hint} from {', '.join(COMMANDS)}.", 2)
    command, arguments = argv[0], [argument for argument in argv[1:] if argument != "--debug"]
    prefix, debug = f"vit-adala {command}", "--debug" in argv
    try:
        with _quick_to_stop(prefix) if is_program else contextlib.nullcontext():
            if sys.stderr is not None and sys.stderr.isatty():
                print(f"{prefix}: loading ...", file=sys.stderr)
            _quiet_libraries()
            module = import_module(f"vit_adala.commands.{command}")
        with handled(signal.SIGTERM, raise_terminated) if is_program else contextlib.nullcontext():
            module.main(arguments)
            if sys.stdout is not None:
                sys.stdout.flush()
    except KeyboardInterrupt as stop:
        if is_program:  # a second Ctrl-C while threads and workers come to an end
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        return _say(prefix, f"{in_words(stop)}.", exit_code(stop))
    except BrokenPipeError:  # such as `| head`
        _abandon_stdout()
        return 128 + signal.SIGPIPE
    except Exception as error:
        if debug:
            raise
        return _say(prefix, *_explain(error))
    return 0


def _explain(error: Exception) -> tuple[str, int]:
    """Return the message for an exception, in one line, and the exit code."""
    text = " ".join(str(error).split())
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    code = getattr(error, "exit_code", None)  # of our own exceptions, whose module may not even have been loaded
    if code is not None:
        return text, code
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        return f"out of memory ({first_line}); lower --image-size or the batch size. --debug shows the traceback.", 1
    if isinstance(error, OSError) and error.filename is None and _abandon_stdout():
        return f"the output could not be written: {error.strerror}; check where standard output goes.", 1
    if isinstance(error, OSError) and error.filename is not None:
        reason = f"{error.strerror or type(error).__name__}: {error.filename!r}"
        return f"{reason}; check the path, its permissions and the disk. --debug shows the traceback.", 1
    if isinstance(error, ImportError):
        return f"{first_line}; a package is missing or broken: run vit-adala doctor. --debug shows the traceback.", 1
    return f"unexpected {type(error).__name__}: {first_line}; --debug shows the traceback, please report it.", 1


def _say(prefix: str, line: str, code: int) -> int:
    with contextlib.suppress(OSError, AttributeError):  # stderr may be closed
        print(f"{prefix}: {''.join(c if c.isprintable() else ' ' for c in line)}", file=sys.stderr)
    return code


def _abandon_stdout() -> bool:
    """Return whether standard output is closed, and redirect it then, so that the interpreter can exit."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


@contextlib.contextmanager
def _quick_to_stop(prefix: str) -> Iterator[None]:
    handler = leave_at_once(prefix)
    with handled(signal.SIGINT, handler), handled(signal.SIGTERM, handler):
        yield


def _overview() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: vit-adala COMMAND [options]",
            "",
            "Turn a pretrained softmax Vision Transformer into a linear-attention one, in three stages.",
            "",
            *lines,
            "",
            "vit-adala COMMAND --help shows a command's own options, --help-all those of transformers.Trainer too.",
            "--debug shows the traceback of an error.",
        ]
    )


def _quiet_libraries() -> None:
    """Silence per-file progress bars of the libraries and their advice for library authors."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import logging
    import warnings

    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    from accelerate.utils import get_int_from_env

    # torchrun, and the flavors of MPI; the other processes would say the same once more
    rank = get_int_from_env(["RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"], 0)
    for package in ("trainers", "modeling_adala"):
        logging.getLogger(package).setLevel(logging.ERROR if rank else logging.INFO)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # of reading and writing weights


if __name__ == "__main__":
    sys.exit(main())
