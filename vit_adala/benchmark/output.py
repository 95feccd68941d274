"""What a benchmark leaves behind: sentences and a table for people, JSON and CSV for programs, a picture for both."""

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from trainers.runs.checkpoints import whole_file

from .cases import Row, Size, break_even, find, ratios

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import NullLocator

MIB = 2**20


def record(row: Row, rows: list[Row], baseline: str) -> dict[str, Any]:
    """A row as plain values: milliseconds, bytes, ratios; `None` for what was not measured."""
    timing = row.timing
    speedup = dict(ratios(rows, row.name, baseline)).get(row.size)
    return {
        "name": row.name,
        "image_size": f"{row.size.image_size[0]}x{row.size.image_size[1]}",
        "tokens": row.size.tokens,
        "batch": row.size.batch,
        "milliseconds": timing and 1000 * timing.median,
        "lower_milliseconds": timing and 1000 * timing.lower,
        "upper_milliseconds": timing and 1000 * timing.upper,
        "samples": timing and timing.samples,
        "images_per_second": row.images_per_second,
        "peak_bytes": row.peak_bytes,
        "flops": row.flops,
        "floor_milliseconds": 1000 * row.floor_seconds,
        "floor_share": row.floor_share,
        "speedup": speedup,
        "relative_error": row.relative_error,
        "skipped": row.skipped,
    }


def sentences(rows: list[Row], baseline: str, name: str = "linear") -> list[str]:
    """Where `name` is slower than `baseline`, where they meet, and what was not measured."""
    lines = []
    for size, ratio in ratios(rows, name, baseline):
        ours, theirs = find(rows, size, name), find(rows, size, baseline)
        assert ours is not None and theirs is not None
        if ratio < 1:
            spread = ", a difference within the spread" if ours.overlaps(theirs) else ""
            lines.append(
                f"{name} is slower than {baseline} at {size}: {_ms(ours.median)} against {_ms(theirs.median)},"
                f" {ratio:.2f}x{spread}."
            )
    for batch in dict.fromkeys(row.size.batch for row in rows):
        if any(size.batch == batch for size, _ in ratios(rows, name, baseline)):
            lines.append(_meeting(rows, name, baseline, batch))
    lines += [f"{row.name} was not measured at {row.size}: {row.skipped}." for row in rows if row.skipped]
    return lines


def break_even_record(rows: list[Row], baseline: str, name: str = "linear") -> dict[str, Any]:
    """Per batch size, `tokens` and `side` from which on `name` is faster; `None` if it is not at the largest size."""
    found = {batch: break_even(rows, name, baseline, batch) for batch in dict.fromkeys(row.size.batch for row in rows)}
    return {
        str(batch): None if met is None else {"tokens": round(met.tokens), "side": round(met.side)}
        for batch, met in found.items()
    }


def print_table(rows: list[Row], baseline: str, title: str) -> None:
    """All rows; ± is half the distance of the quartiles, in percent of the median."""
    console = Console()
    console = Console(width=max(console.width, 120))
    table = Table(title=title, title_justify="left", title_style="bold")
    for heading in ("image", "tokens", "batch"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for heading in ("ms", "±", "images/s", "peak MiB", "GFLOP", "of floor", f"{baseline} = 1"):
        table.add_column(heading, justify="right", no_wrap=True)
    before: Size | None = None
    for row in rows:
        if before is not None and row.size != before:
            table.add_section()
        facts = record(row, rows, baseline)
        size = [facts["image_size"], f"{row.size.tokens:,}", str(row.size.batch)]
        table.add_row(
            *(size if row.size != before else ["", "", ""]),
            escape(row.name),
            three_digits(facts["milliseconds"]),
            "-" if row.timing is None else f"{(row.timing.upper - row.timing.lower) / (2 * row.timing.median):.0%}",
            three_digits(facts["images_per_second"]),
            three_digits(row.peak_bytes and row.peak_bytes / MIB),
            three_digits(row.flops / 1e9),
            "-" if row.floor_share is None else f"{row.floor_share:.0%}",
            "-" if facts["speedup"] is None else f"{facts['speedup']:.2f}x",
        )
        before = row.size
    console.print(table)


def write_files(directory: Path, report: dict[str, Any], rows: list[Row], baseline: str, title: str) -> list[Path]:
    """`bench.json`, `bench.csv` and, if anything was measured, `bench.png`.

    Raises:
        CheckpointError: if one cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    measured = any(row.timing for row in rows)
    paths = [directory / f"bench.{kind}" for kind in ("json", "csv", *(["png"] if measured else []))]
    whole_file(paths[0], json.dumps(report, indent=2) + "\n")
    text = io.StringIO()
    writer = csv.DictWriter(text, list(report["rows"][0]))
    writer.writeheader()
    writer.writerows(report["rows"])
    whole_file(paths[1], text.getvalue())
    if measured:
        draw(paths[2], rows, title)
    return paths


def draw(path: Path, rows: list[Row], title: str) -> None:
    """Time and peak memory over tokens, one curve per case and batch size; the floor is dotted."""
    has_memory = any(row.peak_bytes for row in rows)
    figure, panels = plt.subplots(1, 1 + has_memory, figsize=(5.6 * (1 + has_memory), 4), squeeze=False)
    batches = list(dict.fromkeys(row.size.batch for row in rows))
    for index, name in enumerate(dict.fromkeys(row.name for row in rows)):
        for batch in batches:
            curve = [row for row in rows if row.name == name and row.size.batch == batch and row.timing]
            curve.sort(key=lambda row: row.size.tokens)
            label = name if len(batches) == 1 else f"{name}, batch {batch}"
            style = {"color": f"C{index}", "linestyle": ("-", "--", "-.", ":")[batches.index(batch) % 4]}
            tokens = [row.size.tokens for row in curve]
            times = [row.timing for row in curve if row.timing]
            panels[0, 0].plot(tokens, [1000 * t.median for t in times], marker="o", markersize=4, label=label, **style)
            panels[0, 0].fill_between(
                tokens, [1000 * t.lower for t in times], [1000 * t.upper for t in times], alpha=0.2, color=f"C{index}"
            )
            if name == "linear":
                floors = [1000 * row.floor_seconds for row in curve]
                panels[0, 0].plot(tokens, floors, color="gray", linestyle=":", label=f"floor of {label}")
            if has_memory:
                used = [(row.size.tokens, row.peak_bytes / MIB) for row in curve if row.peak_bytes]
                panels[0, 1].plot(*zip(*used), marker="o", markersize=4, label=label, **style) if used else None
    sizes = sorted({row.size.tokens: row.size for row in rows}.items())
    for axes, label in zip(panels[0], ("milliseconds", "peak memory above the weights, MiB")):
        axes.set(xscale="log", yscale="log", xlabel="tokens (image)", ylabel=label)
        names = [f"{tokens:,}\n({size.image_size[0]}x{size.image_size[1]})" for tokens, size in sizes]
        axes.set_xticks([tokens for tokens, _ in sizes], names, fontsize=8)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _meeting(rows: list[Row], name: str, baseline: str, batch: int) -> str:
    met, start = break_even(rows, name, baseline, batch), f"break-even with {baseline}, batch {batch}: "
    if met is None:
        return start + f"none measured; {name} is slower at the largest size that both were measured at."
    if met.between is None:
        return start + f"below what was measured; {name} is faster at every size from {met.tokens:,.0f} tokens on."
    low, high = (size.tokens for size in met.between)
    return start + (
        f"about {met.tokens:,.0f} tokens, a square image of {met.side:.0f} pixels (interpolated on a log scale between"
        f" {low:,} and {high:,} tokens)."
    )


def _ms(seconds: float) -> str:
    return f"{three_digits(1000 * seconds)} ms"


def three_digits(value: float | None) -> str:
    """A figure for people; a dash where there is none."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(digits, 4)}f}"
