"""`vit-adala bench`: linear beside softmax on this machine, in time and memory, or the operator alone."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PretrainedConfig

from modeling_adala.configuration_adala import pair
from modeling_adala.errors import UsageError
from modeling_adala.inspection.flops import count_tokens, nearest_size
from modeling_adala.inspection.towers import patch_size
from trainers.base_config import COUNT, has_fast_bf16
from trainers.data.transforms import check_image_size, parse_size
from trainers.runs.settings import Interval, check_settings

from ..arguments import CommandParser, print_json
from ..benchmark.cases import Meter, Row, Size
from ..benchmark.facts import run_facts
from ..benchmark.floor import DEFINITION, Floor, measure_floor
from ..benchmark.models import TOLERANCES, ModelSource, check_same_shape, check_source, known_teacher
from ..benchmark.operators import BOUNDS
from ..benchmark.output import break_even_record, print_table, record, sentences, write_files
from ..benchmark.subjects import ModelSubject, OperatorSubject, Settings

SIZES = ("224", "512", "1024", "2048")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MEMORY = (
    "Peak memory of one pass above weights and inputs: torch.cuda.max_memory_allocated on a GPU, the peak of resident"
    " memory in a fresh process per case on a CPU (Linux; not measured elsewhere, nor for compiled passes)."
)
TIME = "Medians and quartiles of samples taken in turns after a warm-up."


@dataclass
class BenchArguments:
    model: str = field(
        metadata={
            "help": "Folder, Hub id, or config.json (random weights); linear, or softmax to convert.",
            "positional": "MODEL",
        }
    )
    teacher: str | None = field(
        default=None,
        metadata={
            "help": "Softmax model to compare with. Default: the one that a linear MODEL came from, if it is here,"
            " else MODEL itself in softmax mode."
        },
    )
    sizes: list[str] = field(
        default_factory=list,
        metadata={"help": f"Sides in pixels or HEIGHTxWIDTH. Default: {', '.join(SIZES)}, in whole patches."},
    )
    batch: list[int] = field(default_factory=lambda: [1], metadata={"help": "Images per pass. Default: 1."})
    dtype: str | None = field(
        default=None,
        metadata={
            "help": f"{', '.join(DTYPES)}. Default: bfloat16 where hardware multiplies it.",
            "choices": list(DTYPES),
        },
    )
    device: str | None = field(
        default=None, metadata={"help": "cpu or cuda. Default: cuda if there is one.", "choices": ["cpu", "cuda"]}
    )
    backward: bool = field(default=False, metadata={"help": "Forward and backward pass."})
    compile: bool = field(default=False, metadata={"help": "torch.compile beside eager (a minute per size)."})
    operator: bool = field(default=False, metadata={"help": "The attention of one layer alone."})
    seconds: float = field(
        default=2.0, metadata={"help": "Time for the samples of a case.", "range": Interval(0, above=True)}
    )
    max_seconds: float = field(
        default=10.0,
        metadata={
            "help": "Skip cases whose forward pass would take longer.",
            "range": Interval(0, above=True),
        },
    )
    output_dir: str = field(default="out/bench", metadata={"help": "For bench.json, .csv and .png."})
    json: bool = field(default=False, metadata={"help": "Print JSON and nothing else on stdout."})

    def __post_init__(self):
        check_settings(self, {})
        wrong = [size for size in self.batch if COUNT.complaint(size)]
        if wrong or not self.batch:
            raise UsageError(f"batch={self.batch}: pass numbers of images, 1 or more each, such as 1,8.")


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
    """`vit-adala bench MODEL [--teacher T] [--sizes S ...] [--batch B ...] [--operator] [--json] ...`

    Raises:
        AdaLAError: where a result is wrong, which makes the exit code 1.
    """
    parser = CommandParser(
        "bench",
        "Linear beside softmax on this machine: time, memory, and how far both are from what the machine allows. Gives"
        " no speed where a result is wrong.",
        "vit-adala bench facebook/dinov2-base --sizes 224 448 896 --batch 1 8",
        BenchArguments,
    )
    (args,) = parser.parse(arguments)
    plan = _plan(args)
    floor, rows, baseline = _measure(plan, quiet=args.json)
    report = _report(plan, floor, rows, baseline)
    title = _title(plan)
    paths = write_files(plan.output_dir, report, rows, baseline, title)
    if args.json:
        print_json(report)
    else:
        _show(report, rows, baseline, title, paths)


def _plan(args: BenchArguments) -> Plan:
    """All that can be wrong is found here, before any time goes into weights or measurements."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("device='cuda': PyTorch sees no GPU here (see vit-adala doctor); pass --device cpu.")
    notes = []
    if args.dtype is None:
        args.dtype = "bfloat16" if has_fast_bf16() else "float32"
        notes.append(f"{args.dtype} because this machine {'multiplies' if has_fast_bf16() else 'does not multiply'}"
                     " bfloat16 in hardware")  # fmt: skip
    batches = sorted(set(args.batch))
    config = check_source(args.model)
    images, rounded = _image_sizes(config, args.sizes)
    if rounded:
        notes.append(f"rounded to whole patches: {', '.join(rounded)}")
    sizes = [Size(batch, size, count_tokens(config, size)) for batch in batches for size in images]
    softmax, note = _softmax_name(args.model, config, args.teacher)
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


def _softmax_name(model: str, config: PretrainedConfig, given: str | None) -> tuple[str, list[str]]:
    """The checkpoint of the softmax model, and what to say about the choice."""
    if given is not None:
        check_same_shape(config, given)
        return given, []
    if not config.model_type.startswith("adala_"):
        return model, [f"linear is {model} converted, untrained: as fast as a trained one"]
    teacher = known_teacher(config)
    if teacher is not None:
        return teacher, [f"softmax is the teacher, {teacher}"]
    return model, ["softmax is the model itself with attn_implementation='sdpa'; its teacher is not on this machine"]


def _image_sizes(config: PretrainedConfig, given: Sequence[str]) -> tuple[list[tuple[int, int]], list[str]]:
    parsed = [pair(parse_size("sizes", text)) for text in given or SIZES]
    if given:
        parsed = [check_image_size(size, patch_size(config)) for size in parsed]
    sizes = {nearest_size(config, size): size for size in sorted(parsed)}
    changed = {new: old for new, old in sizes.items() if new != old}
    return list(sizes), [f"{old[0]}x{old[1]} -> {new[0]}x{new[1]}" for new, old in changed.items()]


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
