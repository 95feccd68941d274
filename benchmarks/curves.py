"""The pictures of docs/performance.md."""

from pathlib import Path
from typing import Any

import matplotlib

from .claims import OPERATOR_KEYS, select, speedups

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

Row = dict[str, Any]
GRID: dict[str, Any] = {"alpha": 0.3, "which": "both", "linewidth": 0.4}


def draw_operator(path: Path, rows: list[Row], dtype: str = "bfloat16") -> None:
    """Time over tokens of one layer's attention: forward, and forward and backward."""
    passes = [name for name in ("forward", "forward and backward") if select(rows, dtype=dtype, **{"pass": name})]
    figure, panels = plt.subplots(1, len(passes), figsize=(5.6 * len(passes), 4.2), squeeze=False, sharey=True)
    for axes, which in zip(panels[0], passes):
        chosen = select(rows, dtype=dtype, **{"pass": which})
        for name in dict.fromkeys(row["name"] for row in chosen):
            _curve(axes, select(chosen, name=name), "tokens", name)
        ours = select(chosen, name="linear")
        _floor(axes, [row["tokens"] for row in ours], [row["floor_milliseconds"] for row in ours])
        axes.set(xlabel="tokens", title=which)
        _log_scales(axes, sorted({row["tokens"] for row in chosen}))
    panels[0, 0].set_ylabel("milliseconds")
    panels[0, 0].legend(fontsize=8)
    _save(figure, path)


def draw_sweep(path: Path, rows: list[Row]) -> None:
    """How many times as fast as plain PyTorch, at every shape of the sweep; below the line it is slower."""
    figure, axes = plt.subplots(figsize=(7.5, 4.2))
    for index, plain in enumerate(("plain PyTorch", "plain PyTorch, input dtype")):
        for which, marker in (("forward", "o"), ("forward and backward", "x")):
            found = speedups(select(rows, **{"pass": which}), "linear", plain, OPERATOR_KEYS)
            points = [(row["batch"] * row["tokens"], ratio) for row, _, ratio in found]
            if points:
                tokens, ratios = zip(*points)
                axes.scatter(tokens, ratios, marker=marker, s=16, color=f"C{index}", label=f"against {plain}: {which}")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(xlabel="tokens of all images together", ylabel="times as fast")
    _log_scales(axes, None)
    axes.legend(fontsize=8)
    _save(figure, path)


def draw_model(path: Path, rows: list[Row]) -> None:
    """Time of a whole model over resolution, batch 1."""
    figure, axes = plt.subplots(figsize=(7.5, 4.4))
    chosen = select(rows, batch=1)
    for name in dict.fromkeys(row["name"] for row in chosen):
        _curve(axes, select(chosen, name=name), "side", name)
    ours = select(chosen, name="linear (elu)")
    _floor(axes, [row["side"] for row in ours], [row["floor_milliseconds"] for row in ours])
    sides = sorted({row["side"] for row in chosen})
    axes.set(xlabel="side of the image, pixels", ylabel="milliseconds")
    _log_scales(axes, sides)
    axes.legend(fontsize=8)
    _save(figure, path)


def draw_scaling(path: Path, rows: list[Row], time_exponent: float, memory_exponent: float | None) -> None:
    """Time and peak memory over tokens."""
    has_memory = memory_exponent is not None
    figure, panels = plt.subplots(1, 1 + has_memory, figsize=(5.2 * (1 + has_memory), 3.8), squeeze=False)
    _curve(panels[0, 0], rows, "tokens", f"measured, exponent {time_exponent:.3f}")
    panels[0, 0].set(ylabel="milliseconds")
    if memory_exponent is not None:
        label = f"measured, exponent {memory_exponent:.3f}"
        known = [row for row in rows if row["peak_bytes"]]
        peaks = [row["peak_bytes"] / 2**20 for row in known]
        panels[0, 1].plot([row["tokens"] for row in known], peaks, marker="o", markersize=4, label=label)
        panels[0, 1].set(ylabel="peak memory above the inputs, MiB")
    for axes in panels[0]:
        axes.set(xlabel="tokens")
        _log_scales(axes, None)
        axes.legend(fontsize=8)
    _save(figure, path)


def _log_scales(axes: Any, ticks: list[int] | None) -> None:
    """Both axes, with numbers as people write them; `ticks` along x, or powers of ten."""
    axes.set(xscale="log", yscale="log")
    if ticks is not None:
        axes.set_xticks(ticks)
        axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.grid(**GRID)


def _curve(axes: Any, rows: list[Row], x: str, label: str) -> None:
    rows = sorted(rows, key=lambda row: row[x])
    where = [row[x] for row in rows]
    style = "--" if "compiled" in label else "-"
    (line,) = axes.plot(where, [row["milliseconds"] for row in rows], style, marker="o", markersize=4, label=label)
    spread = ([row[f"{side}_milliseconds"] for row in rows] for side in ("lower", "upper"))
    axes.fill_between(where, *spread, color=line.get_color(), alpha=0.2)


def _floor(axes: Any, where: list[float], floors: list[float]) -> None:
    points = sorted(zip(where, floors))
    axes.plot(*zip(*points), ":", color="gray", label="floor of linear") if points else None


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
