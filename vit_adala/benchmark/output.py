"""Output of a benchmark: sentences, a table and a picture for people, JSON for programs."""

import itertools
import math
from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hub_cards.records import write_json

from .cases import LINEAR, Row

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import NullLocator

MIB = 2**20


def find_crossing(rows: list[Row], batch: int) -> tuple[float, float, tuple[int, int] | None] | None:
    """Return from where on linear attention is faster than the baseline at all measured sizes of a batch size.

    Returns:
        `tuple`: Tokens and side in pixels of a square image, interpolated on a log scale, and the tokens of the two
        measured sizes around it; `None` for those if it is faster at the smallest already. `None` if it is slower at
        the largest.
    """
    points = [
        (row.tokens, math.sqrt(math.prod(map(int, row.image_size.split("x")))), row.speedup)
        for row in sorted(rows, key=lambda row: row.tokens)
        if row.name == LINEAR and row.batch == batch and row.speedup is not None
    ]
    slower = [index for index, (_, _, speedup) in enumerate(points) if speedup < 1]
    if not points or (slower and slower[-1] == len(points) - 1):
        return None
    if not slower:
        return (*points[0][:2], None)
    low, high = points[slower[-1]], points[slower[-1] + 1]
    share = math.log(low[2]) / (math.log(low[2]) - math.log(high[2]))
    tokens, side = (math.exp((1 - share) * math.log(low[i]) + share * math.log(high[i])) for i in (0, 1))
    return tokens, side, (low[0], high[0])


def sentences(rows: list[Row], baseline: str) -> list[str]:
    """Say where linear attention is slower than the baseline, where they meet, and what was not measured."""
    lines = []
    others = {row.size: row for row in rows if row.name == baseline}
    compared = [row for row in rows if row.name == LINEAR and row.speedup is not None]
    for row in (row for row in compared if row.speedup < 1):
        other = others[row.size]
        overlap = row.lower_milliseconds <= other.upper_milliseconds
        lines.append(
            f"{row.name} is slower than {baseline} at {row.size}: {three_digits(row.milliseconds)} ms against"
            f" {three_digits(other.milliseconds)} ms, {row.speedup:.2f}x"
            f"{', a difference within the spread' if overlap else ''}."
        )
    for batch in dict.fromkeys(row.batch for row in compared):
        start, met = f"break-even with {baseline}, batch {batch}: ", find_crossing(rows, batch)
        if met is None:
            lines.append(f"{start}none measured; {LINEAR} is slower at the largest size that both were measured at.")
        elif met[2] is None:
            lines.append(
                f"{start}below what was measured; {LINEAR} is faster at every size from {met[0]:,} tokens on."
            )
        else:
            lines.append(
                f"{start}about {met[0]:,.0f} tokens, a square image of {met[1]:.0f} pixels (interpolated on a log"
                f" scale between {met[2][0]:,} and {met[2][1]:,} tokens)."
            )
    return lines + [f"{row.name} was not measured at {row.size}: {row.skipped}." for row in rows if row.skipped]


def print_table(rows: list[Row], baseline: str, title: str) -> None:
    """Print all rows; ± is half the distance of the quartiles, in percent of the lower one."""
    console = Console()
    console = Console(width=max(console.width, 120))
    table = Table(title=title, title_justify="left", title_style="bold")
    for heading in ("image", "tokens", "batch"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for heading in ("ms", "±", "images/s", "peak MiB", "GFLOP", "of floor", f"{baseline} = 1"):
        table.add_column(heading, justify="right", no_wrap=True)
    before = None
    for row in rows:
        if before is not None and row.size != before:
            table.add_section()
        size = [row.image_size, f"{row.tokens:,}", str(row.batch)] if row.size != before else ["", "", ""]
        spread = "-" if row.samples is None else f"{(row.upper_milliseconds / row.lower_milliseconds - 1) / 2:.0%}"
        table.add_row(
            *size,
            escape(row.name),
            three_digits(row.milliseconds),
            spread,
            three_digits(row.images_per_second),
            three_digits(row.peak_bytes and row.peak_bytes / MIB),
            three_digits(row.flops / 1e9),
            "-" if row.floor_share is None else f"{row.floor_share:.0%}",
            "-" if row.speedup is None else f"{row.speedup:.2f}x",
        )
        before = row.size
    console.print(table)


def write_files(directory: Path, report: dict[str, Any], rows: list[Row], title: str) -> list[Path]:
    """Write `bench.json` and, if anything was measured, `bench.png`; return their paths.

    Raises:
        CheckpointError: If one cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / "bench.json"]
    write_json(paths[0], report)
    if any(row.samples for row in rows):
        paths.append(directory / "bench.png")
        draw(paths[1], rows, title)
    return paths


def draw(path: Path, rows: list[Row], title: str) -> None:
    """Draw time and peak memory over tokens, one curve per case and batch size; the floor is dotted."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4))
    measured = [row for row in rows if row.milliseconds is not None]
    for index, name in enumerate(dict.fromkeys(row.name for row in measured)):
        for batch, line in zip(dict.fromkeys(row.batch for row in measured), itertools.cycle(("-", "--", "-.", ":"))):
            curve = [row for row in measured if row.name == name and row.batch == batch]
            tokens, style = [row.tokens for row in curve], {"color": f"C{index}", "linestyle": line, "marker": "."}
            panels[0].plot(tokens, [row.milliseconds for row in curve], label=f"{name}, batch {batch}", **style)
            panels[1].plot(tokens, [(row.peak_bytes or math.nan) / MIB for row in curve], **style)
            if name == LINEAR:
                panels[0].plot(tokens, [row.floor_milliseconds for row in curve], ":", color="gray", label="its floor")
    names = {row.tokens: f"{row.tokens:,}\n({row.image_size})" for row in measured}
    for axes, label in zip(panels, ("milliseconds", "peak memory above the weights, MiB")):
        axes.set(xscale="log", yscale="log", xlabel="tokens (image)", ylabel=label)
        axes.set_xticks(list(names), list(names.values()), fontsize=8)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def three_digits(value: float | None) -> str:
    """Return a figure for people; a dash for `None`."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(digits, 4)}f}"
