"""Behavior of the demo: updates of named parts of the page when something is picked, clicked or moved. No Gradio."""

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from html import escape
from typing import Any

import torch
from torch import Tensor

from modeling_adala.configuration_adala import vision_config
from modeling_adala.errors import AdaLAError
from modeling_adala.inspection.flops import count_tokens

from . import charts
from .measure import Cost, measure
from .pair import Pair
from .uploads import read_upload
from .views import attention_pictures, class_scores, feature_pictures, prepare, text_scores

Updates = Iterator[dict[str, Any]]
Costs = dict[int, Mapping[str, Cost]]
Point = tuple[float, float]

CENTER: Point = (0.5, 0.5)
MAX_TEXTS = 12
SWEEP = 8  # resolutions of a sweep


def telling(handler: Callable[..., Updates]) -> Callable[..., Updates]:
    """Return a handler that turns a mistake of the user, or a lack of memory, into a note on the page."""

    @functools.wraps(handler)
    def run(*args: Any) -> Updates:
        try:
            yield from handler(*args)
        except AdaLAError as error:
            yield {"note": _note(str(error), "problem")}
        except (MemoryError, RuntimeError) as error:
            is_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(
                error
            )
            if not is_memory:
                raise
            yield {"note": _note("Not enough memory for this resolution; choose a lower one.", "problem")}

    return run


@telling
def show(
    pair: Pair, path: str | None, side: float | None, layer: float | None, point: Point, texts: str, costs: Costs
) -> Updates:
    """Show an image at a resolution: pictures first, then scores, then what both models cost.

    Args:
        pair (`Pair`): The models.
        path (`str`, *optional*): Image file.
        side (`float`, *optional*), layer (`float`, *optional*): Positions of the sliders.
        point (`tuple[float, float]`): Place of the patch that attends, from the top and from the left, in 0..1.
        texts (`str`): Captions for zero-shot scores, separated by commas.
        costs (`dict[int, Mapping[str, Cost]]`): What was measured in this session, by side.
    """
    if path is None:
        yield {"note": _note("Pick an example, or upload an image.")}
        return
    image, note = read_upload(path)
    side = check_side(pair, side)
    pixels, picture = prepare(pair, image, side)
    pictures, cosine = feature_pictures(pair.models, pixels)
    yield {"note": _note(note)} | _by_role("features", pictures)
    yield _by_role("attention", attention_pictures(pair.models, pixels, picture, check_layer(pair, layer), point))
    yield _scores(pair, pixels, texts)
    costs = costs | {side: measure(pair.models, pixels)}
    tokens = count_tokens(pair.config, (side, side))
    summary = f"{side} px, {tokens:,} tokens: the student is {charts.verdict(costs[side])}; its patch features have a"
    summary += f" cosine of {cosine:.3f} with the teacher's."
    yield {"costs": costs, "summary": summary} | _figures(pair, costs, side)


@telling
def attend(pair: Pair, path: str | None, side: float | None, layer: float | None, point: Point) -> Updates:
    """Show the attention of another patch, or in another layer."""
    if path is not None:
        pixels, picture = _prepared(pair, path, side)
        pictures = attention_pictures(pair.models, pixels, picture, check_layer(pair, layer), point)
        yield {"point": point} | _by_role("attention", pictures)


@telling
def score(pair: Pair, path: str | None, side: float | None, texts: str) -> Updates:
    """Show the scores of other captions."""
    if path is not None:
        yield _scores(pair, _prepared(pair, path, side)[0], texts)


@telling
def sweep(pair: Pair, path: str | None, side: float | None, costs: Costs) -> Updates:
    """Measure resolutions from the smallest to the largest, a point of the curves each."""
    smallest, _, largest = pair.sides
    channels, device = vision_config(pair.config).num_channels, pair.models["student"].device
    sides = {check_side(pair, smallest + (largest - smallest) * step / (SWEEP - 1)) for step in range(SWEEP)}
    for other in sorted(sides - costs.keys()):
        costs = costs | {other: measure(pair.models, torch.randn(1, channels, other, other, device=device))}
        yield {"costs": costs, "curves": charts.curves(costs, check_side(pair, side), (smallest, largest))}


def check_side(pair: Pair, side: float | None) -> int:
    """Return the nearest side that whole patches tile. The number box of a slider gives any number, or none."""
    smallest, first, largest = pair.sides
    return first if side is None else min(max(round(side / pair.step) * pair.step, smallest), largest)


def check_layer(pair: Pair, layer: float | None) -> int:
    """Return the nearest layer; the last one for none."""
    last = vision_config(pair.config).num_hidden_layers - 1
    return last if layer is None else min(max(round(layer), 0), last)


def _prepared(pair: Pair, path: str, side: float | None) -> tuple[Tensor, Tensor]:
    return prepare(pair, read_upload(path)[0], check_side(pair, side))


def _scores(pair: Pair, pixels: Tensor, texts: str) -> dict[str, str]:
    captions = [text.strip() for text in re.split(r"[,\n]", texts) if text.strip()][:MAX_TEXTS]
    updates = {}
    for role, model in pair.models.items():
        if pair.tokenizer is not None and captions:
            found = text_scores(model, pair.tokenizer, pixels, captions)
        else:
            found = class_scores(model, pixels) or []
        updates[f"{role}_scores"] = charts.score_bars(role, found)
    return updates


def _figures(pair: Pair, costs: Costs, side: int) -> dict[str, str]:
    smallest, _, largest = pair.sides
    updates = {f"{role}_costs": charts.cost_bars(role, costs[side]) for role in pair.models}
    return updates | {"curves": charts.curves(costs, side, (smallest, largest))}


def _by_role(part: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{role}_{part}": value for role, value in values.items()}


def _note(text: str, kind: str = "hint") -> str:
    return f'<p class="note {kind}">{escape(text)}</p>' if text else ""
