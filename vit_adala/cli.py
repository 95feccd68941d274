"""`vit-adala`: parse, run, one line per error. Exit codes: 0 done, 1 it failed, 2 wrong usage."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "run": "all stages from a recipe or from flags, resumable, with a report",
    "align": "stage 1, attention alignment: a softmax teacher gives an aligned student",
    "distill": "stage 2, feature alignment: an aligned (or freshly converted) student learns the teacher's features",
    "finetune": "stage 3, labels: train a classifier or a segmenter on a linear or a softmax checkpoint",
    "evaluate": "teacher beside student: k-NN, linear probe, cosine and error of the features",
    "doctor": "one line per check of this machine and of a model: PASS, WARN or FAIL, and the remedy",
    "push": "a checkpoint folder onto the Hub in one commit, with its card and the code that opens it",
    "inspect": "what a model is, what linear attention replaces in it, and what that saves; no weights needed",
    "bench": "linear beside softmax on this machine: time, memory, break-even; or the operator alone",
    "features": "pictures: patch features and attention maps, student beside teacher",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv (`Sequence[str]`, *optional*): Arguments without the program's name. Default: the process's own.

    Returns:
        `int`: the exit code.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0 if argv else 2
    if argv[0] == "--version":
        from modeling_adala import __version__

        print(f"vit-adala {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        print(f"vit-adala: {argv[0]!r} is no command; choose from {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    command, arguments = argv[0], argv[1:]
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    _quiet_libraries()
    from modeling_adala.errors import AdaLAError

    try:
        import_module(f"vit_adala.commands.{command}").main(arguments)
    except AdaLAError as error:
        if debug:
            raise
        print(f"vit-adala {command}: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except argparse.ArgumentError as error:
        print(f"vit-adala {command}: {error}; see vit-adala {command} --help.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"vit-adala {command}: interrupted; the same command goes on from the last checkpoint.", file=sys.stderr)
        return 130
    except OSError as error:
        if debug:
            raise
        print(f"vit-adala {command}: {' '.join(str(error).split())} (--debug shows where)", file=sys.stderr)
        return 1
    return 0


def _overview() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: vit-adala COMMAND [options]",
            "",
            "Turns a pretrained softmax Vision Transformer into a linear-attention one, in three stages.",
            "",
            *lines,
            "",
            "vit-adala COMMAND --help shows a command's own options, --help-all those of transformers.Trainer too.",
            "--debug shows the traceback of an error.",
        ]
    )


def _quiet_libraries() -> None:
    """Progress bars and our own lines stay; per-file bars and advice meant for library authors go."""
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

    transformers_logging.disable_progress_bar()  # those of reading and writing weights, over in an instant


if __name__ == "__main__":
    sys.exit(main())
