"""`vit-adala demo`: a student and its teacher side by side in a browser."""

import os
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field

from modeling_adala.errors import UsageError
from trainers.data.transforms import MAX_SIDE
from trainers.runs.settings import Interval, check_settings

from ..arguments import CommandParser
from ..demo.pair import QUICKSTART, check_models


@dataclass
class DemoArguments:
    model: str | None = field(
        default=None,
        metadata={
            "help": f"Folder or Hub id; linear, or softmax to convert. Default: {QUICKSTART} if it is there, else the"
            " digits teacher of this package.",
            "positional": "MODEL",
        },
    )
    teacher: str | None = field(
        default=None,
        metadata={"help": "Softmax checkpoint beside a linear MODEL. Default: the one that MODEL came from."},
    )
    max_size: int | None = field(
        default=None,
        metadata={
            "help": "Largest side in pixels. Default: where a pass of the teacher takes a second or two here.",
            "range": Interval(1, MAX_SIDE),
        },
    )
    host: str | None = field(
        default=None, metadata={"help": "Address to listen at, such as 0.0.0.0. Default: this machine alone."}
    )
    port: int | None = field(
        default=None, metadata={"help": "Default: the first from 7860 on that is free.", "range": Interval(1, 65535)}
    )

    def __post_init__(self):
        check_settings(self, {})


def main(arguments: Sequence[str]) -> None:
    """Run `vit-adala demo [MODEL] [--teacher T] [--max-size S] [--host H] [--port P]`.

    Raises:
        UsageError: If Gradio is not installed, nothing can listen at the address, or see `check_models`.
        DataError, CheckpointError: See `check_models`.
    """
    parser = CommandParser(
        "demo",
        "Show a student beside its teacher in a browser: patch features, attention of a patch, scores, time and memory"
        " over the resolution. Needs no network.",
        "vit-adala demo out/mine/2-feature-alignment --teacher facebook/dinov2-small",
        DemoArguments,
    )
    (args,) = parser.parse(arguments)
    check_models(args.model, args.teacher, args.max_size)
    _check_address(args.host, args.port)
    with tempfile.TemporaryDirectory(prefix="vit-adala-demo-") as folder:
        # of uploads, read when Gradio is imported; it would leave its own behind
        os.environ.setdefault("GRADIO_TEMP_DIR", folder)
        try:
            from ..demo.app import serve
        except ModuleNotFoundError as error:
            if error.name != "gradio":
                raise
            remedy = 'run `pip install "gradio>=6.31"`'
            raise UsageError(f"gradio is not installed, which the demo needs; {remedy}.") from error
        serve(args.model, args.teacher, args.max_size, args.host, args.port)


def _check_address(host: str | None, port: int | None) -> None:
    """Raise `UsageError` unless this machine can listen there. Gradio would try a hundred ports, for minutes."""
    try:
        socket.create_server((host or os.environ.get("GRADIO_SERVER_NAME") or "127.0.0.1", port or 0)).close()
    except OSError as error:
        reason = str(error.strerror).partition(" (")[0]
        raise UsageError(f"host={host!r}, port={port}: {reason}; pass another --host or --port.") from error
