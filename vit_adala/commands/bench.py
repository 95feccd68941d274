"""`vit-adala bench`: linear beside softmax on this machine, in time and memory, or the operator alone."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PretrainedConfig

from modeling_adala.configuration_adala import pair
from modeling_adala.errors import UsageError
from modeling_adala.families import patch_size
from modeling_adala.flops import count_tokens, nearest_size
from trainers.base_config import has_fast_bf16
from trainers.transforms import check_image_size, parse_size

from ..arguments import PlainParser, print_json
from ..benchmark.cases import Meter, Row, Size
from ..benchmark.facts import run_facts
from ..benchmark.floor import DEFINITION, Floor, measure_floor
from ..benchmark.models import TOLERANCES, ModelSource, check_same_shape, check_source, known_teacher
from ..benchmark.operators import BOUNDS
from ..benchmark.output import break_even_record, print_table, record, sentences, write_files
from ..benchmark.subjects import ModelSubject, OperatorSubject, Settings

SIZES = "224,512,1024,2048"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MEMORY = (
    "Peak memory of one pass above weights and inputs: torch.cuda.max_memory_allocated on a GPU, the peak of resident"
    " memory in a fresh process per case on a CPU (Linux; not measured elsewhere, nor for compiled passes)."
)
TIME = "Medians and quartiles of samples taken in turns after a warm-up."


@dataclass(frozen=True)
class Plan:
    """What a command line asks for, known to be possible."""

    config: PretrainedConfig
    linear: ModelSource
    softmax: ModelSource
    settings: Settings
    sizes: list[Size]
    output_dir: Path
    operator: bool
    seconds: float
    max_seconds: float
    notes: tuple[str, ...]


def main(arguments: Sequence[str]) -> None:
    """`vit-adala bench MODEL [--compare TEACHER] [--sizes S,...] [--batch B,...] [--operator] [--json] ...`

    Raises:
        AdaLAError: where a result is wrong, which makes the exit code 1.
    """
    args = _parser().parse_args(list(arguments))
    plan = _plan(args)
    floor, rows, baseline = _measure(plan, quiet=args.json)
    report = _report(plan, floor, rows, baseline)
    title = _title(plan)
    paths = write_files(plan.output_dir, report, rows, baseline, title)
    if args.json:
        print_json(report)
    else:
        _show(report, rows, baseline, title, paths)


def _parser() -> PlainParser:
    parser = PlainParser(
        "bench",
        "MODEL",
        "Linear beside softmax on this machine: time, memory, and how far both are from what the machine allows. Gives"
        " no speed where a result is wrong.",
        "vit-adala bench facebook/dinov2-base --sizes 224,448,896 --batch 1,8",
    )
    parser.add_argument("model", help="folder, Hub id, or config.json (random weights); linear, or softmax to convert")
    parser.add_argument("--compare", help="softmax model to compare with. Default: the teacher, if it is here, else"
                        " the model itself in softmax mode")  # fmt: skip
    parser.add_argument("--sizes", help=f"sides in pixels or HEIGHTxWIDTH, with commas. Default: {SIZES}, rounded"
                        " to whole patches")  # fmt: skip
    parser.add_argument("--batch", default="1", help="images per pass, with commas")
    parser.add_argument("--dtype", help=f"{', '.join(DTYPES)}. Default: bfloat16 where hardware multiplies it")
    parser.add_argument("--device", help="cpu or cuda. Default: cuda if there is one")
    parser.add_argument("--backward", action="store_true", help="forward and backward pass")
    parser.add_argument("--compile", action="store_true", help="torch.compile beside eager (a minute per size)")
    parser.add_argument("--operator", action="store_true", help="the attention of one layer alone")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for the samples of a case")
    parser.add_argument(
        "--max-seconds",
        "--max_seconds",
        type=float,
        default=10.0,
        help="leave out a case of which one pass would take longer",
    )
    parser.add_argument("--output-dir", "--output_dir", default="out/bench", help="for bench.json, .csv and .png")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else on stdout")
    return parser


def _plan(args: argparse.Namespace) -> Plan:
    """All that can be wrong is found here, before any time goes into weights or measurements."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda"):
        raise UsageError(f"device={device!r} is unknown; choose cpu or cuda.")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("device='cuda': PyTorch sees no GPU here (see vit-adala doctor); pass --device cpu.")
    for name in ("seconds", "max_seconds"):
        if not getattr(args, name) > 0:
            raise UsageError(f"{name}={getattr(args, name):g} must be positive.")
    notes = []
    if args.dtype is None:
        args.dtype = "bfloat16" if has_fast_bf16() else "float32"
        notes.append(f"{args.dtype} because this machine {'multiplies' if has_fast_bf16() else 'does not multiply'}"
                     " bfloat16 in hardware")  # fmt: skip
    if args.dtype not in DTYPES:
        raise UsageError(f"dtype={args.dtype!r} is unknown; choose one of {', '.join(DTYPES)}.")
    batches = _batches(args.batch)
    config = check_source(args.model)
    images, rounded = _image_sizes(config, args.sizes)
    if rounded:
        notes.append(f"rounded to whole patches: {', '.join(rounded)}")
    sizes = [Size(batch, size, count_tokens(config, size)) for batch in batches for size in images]
    softmax, note = _softmax_name(args.model, config, args.compare)
    settings = Settings(DTYPES[args.dtype], device, args.backward, args.compile)
    return Plan(
        config,
        ModelSource(args.model, True, settings.dtype, device),
        ModelSource(softmax, False, settings.dtype, device),
        settings,
        sizes,
        Path(args.output_dir),
        args.operator,
        args.seconds,
        args.max_seconds,
        (*notes, *([] if args.operator else note)),
    )


def _softmax_name(model: str, config: PretrainedConfig, compare: str | None) -> tuple[str, list[str]]:
    """The checkpoint of the softmax model, and what to say about the choice."""
    if compare is not None:
        check_same_shape(config, compare)
        return compare, []
    if not config.model_type.startswith("adala_"):
        return model, [f"linear is {model} converted, untrained: as fast as a trained one"]
    teacher = known_teacher(config)
    if teacher is not None:
        return teacher, [f"softmax is the teacher, {teacher}"]
    return model, ["softmax is the model itself with attn_implementation='sdpa'; its teacher is not on this machine"]


def _image_sizes(config: PretrainedConfig, given: str | None) -> tuple[list[tuple[int, int]], list[str]]:
    parsed = [pair(parse_size("sizes", text.strip())) for text in (given or SIZES).split(",")]
    if given is not None:
        parsed = [check_image_size(size, patch_size(config)) for size in parsed]
    sizes = {nearest_size(config, size): size for size in sorted(parsed)}
    changed = {new: old for new, old in sizes.items() if new != old}
    return list(sizes), [f"{old[0]}x{old[1]} -> {new[0]}x{new[1]}" for new, old in changed.items()]


def _batches(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"batch={text!r} must be positive integers with commas between them, such as 1,8.")
    return sorted({int(part) for part in parts})


def _measure(plan: Plan, quiet: bool) -> tuple[Floor, list[Row], str]:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as progress:
        task = progress.add_task("opening the models", total=None)
        subject: ModelSubject | OperatorSubject
        if plan.operator:
            subject = OperatorSubject(plan.config, plan.linear, plan.settings)
        else:
            subject = ModelSubject(plan.config, plan.linear, plan.softmax, plan.settings)
        progress.update(task, description="bandwidth and throughput of this machine")
        floor = measure_floor(plan.settings.dtype, plan.settings.device)
        meter = Meter(floor, plan.settings.device, plan.seconds, plan.max_seconds)
        rows: list[Row] = []
        progress.update(task, total=len(plan.sizes))
        for size in plan.sizes:
            progress.update(task, description=str(size))
            rows += meter(size, list(subject.cases(size)))
            progress.advance(task)
    return floor, rows, subject.baseline


def _report(plan: Plan, floor: Floor, rows: list[Row], baseline: str) -> dict[str, Any]:
    settings = plan.settings
    limits = BOUNDS if plan.operator else TOLERANCES
    return {
        **run_facts(settings.device),
        "model": plan.linear.name,
        "compare": None if plan.operator else plan.softmax.name,
        "what": "operator" if plan.operator else "model",
        "pass": "forward and backward" if settings.backward else "forward",
        "dtype": str(settings.dtype).removeprefix("torch."),
        "tolerance": limits[settings.dtype],
        "floor": {"bytes_per_second": floor.bandwidth, "flops_per_second": floor.throughput, "definition": DEFINITION},
        "time": TIME,
        "memory": MEMORY,
        "notes": list(plan.notes),
        "baseline": baseline,
        "rows": [record(row, rows, baseline) for row in rows],
        "break_even": break_even_record(rows, baseline),
        "sentences": sentences(rows, baseline),
    }


def _title(plan: Plan) -> str:
    what = "operator" if plan.operator else "model"
    kind = "forward and backward" if plan.settings.backward else "forward"
    dtype = str(plan.settings.dtype).removeprefix("torch.")
    return f"{Path(plan.linear.name).name}: {what}, {kind} pass, {dtype}, {plan.settings.device}"


def _show(report: dict[str, Any], rows: list[Row], baseline: str, title: str, paths: list[Path]) -> None:
    console = Console(soft_wrap=True, highlight=False)
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    commit = report["commit"] and report["commit"][:12] + (" and changes" if report["dirty"] else "")
    floor = Floor(report["floor"]["bytes_per_second"], report["floor"]["flops_per_second"], report["dtype"])
    lines = {
        "machine": f"{report['machine']}; {report['device']}, {report['threads']} threads",
        "versions": versions + (f"; commit {commit}" if commit else ""),
        "backend": f"{report['backend']['name']}: {report['backend']['reason']}",
        "floor": str(floor),
        "checked": f"relative error at most {report['tolerance']:.0e} against float64"
        if report["what"] == "operator"
        else f"relative error of the features at most {report['tolerance']:.0e} against the same weights in float32",
    }
    for name, text in lines.items():
        console.print(f"  [dim]{name:<10}[/]{escape(text)}")
    for note in report["notes"]:
        console.print(f"  [dim]{'note':<10}[/]{escape(note)}")
    console.print()
    print_table(rows, baseline, title)
    console.print()
    for sentence in report["sentences"]:
        console.print(escape(sentence))
    console.print(f"[dim]{TIME} {MEMORY} {DEFINITION}[/]")
    console.print(f"written: {', '.join(map(str, paths))}")
