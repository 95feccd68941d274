"""`vit-adala bench`: time and memory of linear beside softmax attention on this machine."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PretrainedConfig

from modeling_adala.configuration_adala import pair
from modeling_adala.errors import UsageError
from modeling_adala.families import is_adala
from modeling_adala.inspection.flops import count_tokens, nearest_size
from modeling_adala.inspection.towers import patch_size
from trainers.base_config import COUNT, has_fast_bf16
from trainers.data.transforms import check_image_size, parse_size
from trainers.runs.settings import Interval, check_settings

from ..arguments import CommandParser, print_json
from ..benchmark.cases import Row, Settings, Size
from ..benchmark.facts import run_facts
from ..benchmark.floor import DEFINITION, Floor, measure_floor
from ..benchmark.measure import SOFTMAX, bench_model, bench_operator
from ..benchmark.models import TOLERANCES, check_same_shape, check_source, known_teacher
from ..benchmark.operators import BOUNDS, SDPA
from ..benchmark.output import find_crossing, print_table, sentences, write_files
from ..benchmark.runtimes import LABELS
from ..export.formats import check_packages, package_versions

SIZES = ("224", "512", "1024", "2048")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MEMORY = (
    "Peak memory of one pass above weights and inputs: torch.cuda.max_memory_allocated on a GPU, the peak of resident"
    " memory in a fresh process per case on a CPU (Linux; not measured elsewhere, nor for compiled or exported ones)."
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
    backward: bool = field(default=False, metadata={"help": "Time forward and backward pass."})
    compile: bool = field(default=False, metadata={"help": "Also time torch.compile (a minute per size)."})
    runtime: list[str] = field(
        default_factory=list,
        metadata={"help": f"Also time exported models: {', '.join(LABELS)}. float32, on the CPU."},
    )
    operator: bool = field(default=False, metadata={"help": "Time the attention of one layer alone."})
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
    output_dir: str = field(default="out/bench", metadata={"help": "Folder for bench.json and bench.png."})
    json: bool = field(default=False, metadata={"help": "Print JSON and nothing else on stdout."})

    def __post_init__(self):
        check_settings(self, {})
        wrong = [size for size in self.batch if COUNT.complaint(size)]
        if wrong or not self.batch:
            raise UsageError(f"batch={self.batch}: pass numbers of images, 1 or more each, such as 1,8.")
        unknown = [name for name in self.runtime if name not in LABELS]
        if unknown:
            raise UsageError(f"runtime={unknown[0]!r} is not supported; choose from {', '.join(LABELS)}.")
        others = {"dtype": self.dtype not in (None, "float32"), "device": self.device == "cuda"}
        others |= {"backward": self.backward, "operator": self.operator}
        if self.runtime and any(others.values()):
            name = next(name for name, is_set in others.items() if is_set)
            raise UsageError(
                f"runtime={self.runtime[0]!r} runs whole models forward, in float32 on the CPU; drop --{name}."
            )


def main(arguments: Sequence[str]) -> None:
    """Run `vit-adala bench MODEL [--teacher T] [--sizes S ...] [--batch B ...] [--operator] [--json] ...`.

    Raises:
        AdaLAError: If a result is wrong.
    """
    parser = CommandParser(
        "bench",
        "Measure linear beside softmax attention on this machine: time, memory, and the distance to what the machine"
        " allows. A wrong result gets no speed.",
        "vit-adala bench facebook/dinov2-base --sizes 224 448 896 --batch 1 8",
        BenchArguments,
    )
    (args,) = parser.parse(arguments)
    # all that can be wrong is found here, before any time goes into weights or measurements
    settings, notes = _settings(args)
    config = check_source(args.model)
    images, rounded = _image_sizes(config, args.sizes)
    if rounded:
        notes.append(f"rounded to whole patches: {', '.join(rounded)}")
    sizes = [Size(batch, size, count_tokens(config, size)) for batch in sorted(set(args.batch)) for size in images]
    softmax, note = _softmax_name(args.model, config, args.teacher)
    notes += [] if args.operator else note

    floor, rows = _measure(args, config, softmax, sizes, settings)
    report = _report(args, softmax, settings, floor, rows) | {"notes": notes}
    title = f"{Path(args.model).name}: {report['what']}, {report['pass']} pass, {report['dtype']}, {settings.device}"
    paths = write_files(Path(args.output_dir), report, rows, title)
    if args.json:
        print_json(report)
    else:
        _show(report, rows, title, floor, paths)


def _settings(args: BenchArguments) -> tuple[Settings, list[str]]:
    for name in args.runtime:
        check_packages(name)
    device = args.device or ("cuda" if torch.cuda.is_available() and not args.runtime else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("device='cuda': PyTorch sees no GPU here (see vit-adala doctor); pass --device cpu.")
    dtype, notes = args.dtype or ("float32" if args.runtime else None), []
    for name in args.runtime:
        versions = " ".join(" ".join(pair) for pair in package_versions(name).items())
        notes.append(f"{LABELS[name]}: graphs of any size and batch, {versions}")
    if dtype is None:
        dtype, verb = ("bfloat16", "multiplies") if has_fast_bf16() else ("float32", "does not multiply")
        notes.append(f"{dtype} because this machine {verb} bfloat16 in hardware")
    shared = DTYPES[dtype], device, args.backward, args.compile, tuple(args.runtime)
    return Settings(*shared, args.seconds, args.max_seconds), notes


def _softmax_name(model: str, config: PretrainedConfig, given: str | None) -> tuple[str, list[str]]:
    """Return the checkpoint of the softmax model, and a note on the choice."""
    if given is not None:
        check_same_shape(config, given)
        return given, []
    if not is_adala(config):
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


def _measure(
    args: BenchArguments, config: PretrainedConfig, softmax: str, sizes: list[Size], settings: Settings
) -> tuple[Floor, list[Row]]:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    rows: list[Row] = []
    with Progress(*columns, console=console, transient=True, disable=args.json or not console.is_terminal) as progress:
        task = progress.add_task("bandwidth and throughput of this machine", total=len(sizes))
        floor = measure_floor(settings.dtype, settings.device)
        progress.update(task, description="measuring")
        if args.operator:
            measured = bench_operator(config, args.model, sizes, settings, floor)
        else:
            measured = bench_model(config, args.model, softmax, sizes, settings, floor)
        for found in measured:
            rows += found
            progress.advance(task)
    return floor, rows


def _report(args: BenchArguments, softmax: str, settings: Settings, floor: Floor, rows: list[Row]) -> dict[str, Any]:
    baseline = SDPA if args.operator else SOFTMAX
    met = {batch: find_crossing(rows, batch) for batch in sorted(set(args.batch))}
    return {
        **run_facts(settings.device),
        "model": args.model,
        "compare": None if args.operator else softmax,
        "what": "operator" if args.operator else "model",
        "pass": "forward and backward" if settings.backward else "forward",
        "dtype": str(settings.dtype).removeprefix("torch."),
        "tolerance": (BOUNDS if args.operator else TOLERANCES)[settings.dtype],
        "floor": {"bytes_per_second": floor.bandwidth, "flops_per_second": floor.throughput, "definition": DEFINITION},
        "time": TIME,
        "memory": MEMORY,
        "baseline": baseline,
        "rows": [asdict(row) for row in rows],
        "break_even": {
            str(batch): found and {"tokens": round(found[0]), "side": round(found[1])} for batch, found in met.items()
        },
        "sentences": sentences(rows, baseline),
    }


def _show(report: dict[str, Any], rows: list[Row], title: str, floor: Floor, paths: list[Path]) -> None:
    console = Console(soft_wrap=True, highlight=False)
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    commit = report["commit"] and report["commit"][:12] + (" and changes" if report["dirty"] else "")
    reference = "float64" if report["what"] == "operator" else "the same weights in float32"
    lines = [
        ("machine", f"{report['machine']}; {report['device']}, {report['threads']} threads"),
        ("versions", versions + (f"; commit {commit}" if commit else "")),
        ("backend", f"{report['backend']['name']}: {report['backend']['reason']}"),
        ("floor", str(floor)),
        ("checked", f"relative error at most {report['tolerance']:.0e} against {reference}"),
        *(("note", note) for note in report["notes"]),
    ]
    for name, text in lines:
        console.print(f"  [dim]{name:<10}[/]{escape(text)}")
    console.print()
    print_table(rows, report["baseline"], title)
    console.print()
    for sentence in report["sentences"]:
        console.print(escape(sentence))
    console.print(f"[dim]{TIME} {MEMORY} {DEFINITION}[/]")
    console.print(f"written: {', '.join(map(str, paths))}")
