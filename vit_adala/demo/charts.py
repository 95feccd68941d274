"""Bars and curves of the demo, as HTML and SVG: they take the page's font and both its color schemes."""

import io
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

import matplotlib

from trainers.report.pictures import new_figure

from .measure import Cost

COLORS = {"teacher": "#4e79a7", "student": "#f28e2b"}
_GRAY = "#8b8f98"  # legible on white and on black


def bars(role: str, rows: Iterable[tuple[str, float, str]]) -> str:
    """Return horizontal bars, one per row.

    Args:
        role (`str`): `"teacher"` or `"student"`, whose color they get.
        rows (`Iterable[tuple[str, float, str]]`): Name, length in 0..1 and text of each.
    """
    lines = [
        f'<div class="bar"><span>{escape(name)}</span>'
        f'<i><b style="width:{100 * min(max(share, 0), 1):.1f}%;background:{COLORS[role]}"></b></i>'
        f"<em>{escape(text)}</em></div>"
        for name, share, text in rows
    ]
    return f'<div class="bars">{"".join(lines)}</div>'


def score_bars(role: str, scores: Iterable[tuple[str, float]]) -> str:
    """Return class or zero-shot scores as bars."""
    return bars(role, [(name, score, f"{100 * score:.1f} %") for name, score in scores])


def cost_bars(role: str, costs: Mapping[str, Cost]) -> str:
    """Return time and memory of one model as bars, the longest being that of the model that takes more."""
    own = costs[role]
    longest = max(cost.milliseconds for cost in costs.values())
    largest = max(cost.megabytes for cost in costs.values())
    return bars(
        role,
        [
            ("time", own.milliseconds / longest, f"{_round(own.milliseconds)} ms"),
            ("memory", own.megabytes / largest, f"{_round(own.megabytes)} MB"),
        ],
    )


def verdict(costs: Mapping[str, Cost]) -> str:
    """Return how the student's time compares with the teacher's, in words."""
    ratio = costs["teacher"].milliseconds / costs["student"].milliseconds
    if 0.95 < ratio < 1.05:
        return "as fast as the teacher"
    return f"{ratio:.1f}x as fast as the teacher" if ratio > 1 else f"{1 / ratio:.1f}x slower than the teacher"


def curves(costs: Mapping[int, Mapping[str, Cost]], side: int, sides: tuple[int, int]) -> str:
    """Return time and memory over the resolution as SVG.

    Args:
        costs (`Mapping[int, Mapping[str, Cost]]`): Costs of both models by side in pixels, one or more.
        side (`int`): Side that is shown, marked by a line.
        sides (`tuple[int, int]`): Smallest and largest side, the limits of the axis.
    """
    # text stays text, in the font of the page
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10}):
        figure = new_figure(11, 2.7)
        axes = figure.subplots(1, 2)
        figure.subplots_adjust(left=0.045, right=0.995, bottom=0.18, top=0.9, wspace=0.12)
        for axis, name, unit in zip(axes, ("milliseconds", "megabytes"), ("ms per image", "MB per image")):
            _draw_curve(axis, costs, name)
            axis.margins(y=0.15)
            axis.axvline(side, color=_GRAY, linewidth=0.8, linestyle=":")
            axis.set(xlim=(0, 1.03 * sides[1]), ylim=(0, None))
            axis.set_xlabel("side of the image in pixels", color=_GRAY)
            axis.set_title(unit, loc="left", color=_GRAY, fontsize=10)
        axes[0].legend(frameon=False, labelcolor=_GRAY, loc="upper left")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    return f'<div class="curves">{text[text.index("<svg") :]}</div>'


def _draw_curve(axis: Any, costs: Mapping[int, Mapping[str, Cost]], name: str) -> None:
    for role, color in COLORS.items():
        points = sorted((side, getattr(row[role], name)) for side, row in costs.items())
        axis.plot(*zip(*points), color=color, marker="o", markersize=4, linewidth=1.8, label=role)
    axis.grid(axis="y", color=_GRAY, alpha=0.25, linewidth=0.6)
    axis.tick_params(colors=_GRAY, length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)


def _round(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:,.0f}"
