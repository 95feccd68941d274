"""Performance targets on CPU and GPU and what the recorded results reach, one line per target."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from vit_adala.benchmark.cases import LINEAR
from vit_adala.benchmark.operators import PLAIN, SDPA

from .common import Row
from .model import COMPILED_SUFFIX, DEFAULT, FREE, GRAPH_SUFFIX, SOFTMAX, VIT_B, VIT_L_2, VIT_S
from .operator import BACKWARD, FORWARD, GRAPH, PEER, PEER_BARE

TOKENS, BATCH, HEAD_DIM = 16384, 8, 64


@dataclass(frozen=True)
class Asked:
    """A promise.

    Args:
        what (`str`): What is measured.
        script (`str`): Benchmark whose rows decide.
        least (`float`): The least that is asked for.
        reached (`Callable`): Called with those rows; yields figures and where each was measured. The least counts.
        percent (`bool`, *optional*, defaults to `False`): A share, not a speed-up.
    """

    what: str
    script: str
    least: float
    reached: Callable[[list[Row]], Iterator[tuple[float, str]]]
    percent: bool = False

    def text(self, value: float) -> str:
        return f"{value:.0%}" if self.percent else f"{value:.2f}x"


def ratios(rows: list[Row], ours: str, theirs: str) -> Iterator[tuple[float, Row]]:
    """Yield how much faster `ours` is than `theirs`, wherever both were measured alike, with the row of ours."""
    keys = ("model", "batch", "tokens", "side", "head_dim", "pass", "dtype", "feature_map")
    of = {
        name: {tuple(row.get(key) for key in keys): row for row in rows if row["name"] == name}
        for name in (ours, theirs)
    }
    for place, row in of[ours].items():
        if place in of[theirs]:
            yield of[theirs][place]["milliseconds"] / row["milliseconds"], row


def over(
    ours: str, theirs: str, where: Callable[[Row], str], chosen: Callable[[Row], bool] = lambda row: True
) -> Callable[[list[Row]], Iterator[tuple[float, str]]]:
    """Yield the speed-up of `ours` over `theirs` in the rows that are `chosen`, and where it was measured."""

    def reached(rows: list[Row]) -> Iterator[tuple[float, str]]:
        for ratio, row in ratios(rows, ours, theirs):
            if chosen(row):
                yield ratio, where(row)

    return reached


def over_peer(peer: str) -> Callable[[list[Row]], Iterator[tuple[float, str]]]:
    return over(LINEAR, peer, lambda row: row["pass"])


def over_sdpa(passes: str, suffix: str) -> Callable[[list[Row]], Iterator[tuple[float, str]]]:
    return over(
        LINEAR + suffix,
        SDPA + suffix,
        lambda row: (
            f"{row['tokens']:,} tokens, batch {row['batch']}, heads of {row['head_dim']}, {row['feature_map']}"
        ),
        lambda row: row["pass"] == passes and row["tokens"] >= 1024,
    )


def over_plain(passes: str) -> Callable[[list[Row]], Iterator[tuple[float, str]]]:
    return over(
        LINEAR,
        PLAIN,
        lambda row: f"{row['feature_map']}, {row['tokens']:,} tokens, batch {row['batch']}, {row['dtype']}",
        lambda row: row["pass"] == passes,
    )


def over_softmax(batch: int) -> Callable[[list[Row]], Iterator[tuple[float, str]]]:
    """Yield the speed-up of every whole model from 196 tokens."""
    return over(
        DEFAULT,
        SOFTMAX,
        lambda row: f"{row['model']}, {row['tokens']:,} tokens",
        lambda row: row["batch"] == batch and row["tokens"] >= 196,
    )


def model_of(name: str, side: int, theirs: str = SOFTMAX) -> Callable[[list[Row]], Iterator[tuple[float, str]]]:
    """Yield the speed-up of one model at batch 1 over another with its weights."""
    return over(
        DEFAULT,
        theirs,
        lambda row: f"{row['tokens']:,} tokens, {row['milliseconds']:,.0f} ms",
        lambda row: (row["model"], row["batch"], row["side"]) == (name, 1, side),
    )


def copy_share(rows: list[Row]) -> Iterator[tuple[float, str]]:
    """Yield the share of the copy bandwidth, which is what bounds a forward pass of that size."""
    for row in rows:
        place = (row["tokens"], row["batch"], row["head_dim"], row["pass"], row["feature_map"])
        if place == (TOKENS, BATCH, HEAD_DIM, FORWARD, "elu") and row["name"] == LINEAR + GRAPH:
            yield row["floor_share"], f"{row['milliseconds']:.3f} ms"


def model_at(side: int, *suffixes: str) -> Callable[[list[Row]], Iterator[tuple[float, str]]]:
    """Yield the speed-up of the faster of the variants, at batch 1; beside it, that of a model without attention."""

    def reached(rows: list[Row]) -> Iterator[tuple[float, str]]:
        here = [row for row in rows if (row["batch"], row["side"]) == (1, side)]
        found = {suffix: ratio for suffix in suffixes for ratio, _ in ratios(here, DEFAULT + suffix, SOFTMAX + suffix)}
        bound = {suffix: ratio for suffix in suffixes for ratio, _ in ratios(here, FREE + suffix, SOFTMAX + suffix)}
        if found:
            best = max(found, key=found.__getitem__)
            limit = f"; attention for free: {bound[best]:.2f}x" if best in bound else ""
            yield found[best], (best.removeprefix(", ") or "eager") + limit

    return reached


CPU = (
    *(
        Asked(
            f"Whole models from 196 tokens, batch {batch}, slowest: speed over SDPA", "model", 1.0, over_softmax(batch)
        )
        for batch in (1, 8)
    ),
    *(
        Asked(f"{name}, {side:,} px, batch 1: speed over SDPA", "model", least, model_of(name, side))
        for name, side, least in ((VIT_S, 518, 1.4), (VIT_B, 512, 1.3), (VIT_L_2, 512, 1.3), (VIT_S, 1036, 2.7))
    ),
    *(
        Asked(
            f"{name}, {side:,} px, batch 1: speed over attention for free",
            "model",
            0.95,
            model_of(name, side, FREE),
            percent=True,
        )
        for name, side in ((VIT_S, 518), (VIT_B, 512), (VIT_S, 1036))
    ),
    *(
        Asked(f"Operator, slowest shape, {passes}: speed over plain PyTorch", "operator", 1.0, over_plain(passes))
        for passes in (FORWARD, BACKWARD)
    ),
)

_SHAPE = f"{TOKENS:,} tokens, batch {BATCH}, heads of {HEAD_DIM}"
GPU = (
    Asked(f"Operator, {_SHAPE}: speed over the peer", "operator", 1.5, over_peer(PEER)),
    Asked(f"Operator, {_SHAPE}: the same, features given to the peer", "operator", 1.5, over_peer(PEER_BARE)),
    Asked(f"Operator, {_SHAPE}: share of the copy bandwidth", "operator", 0.6, copy_share, percent=True),
    Asked(
        "Operator from 1,024 tokens, slowest shape: speed over SDPA, CUDA graph",
        "operator",
        1.0,
        over_sdpa(FORWARD, GRAPH),
    ),
    Asked(
        "Operator from 1,024 tokens, slowest shape: speed over SDPA, eager", "operator", 1.0, over_sdpa(FORWARD, "")
    ),
    Asked(
        "Operator from 1,024 tokens, slowest shape: the same with backward", "operator", 1.0, over_sdpa(BACKWARD, "")
    ),
    Asked("ViT-L, 1,024 px, batch 1: speed over SDPA", "model", 2.0, model_at(1024, "", GRAPH_SUFFIX)),
    Asked(
        "ViT-L, 1,024 px, batch 1: the same, compiled",
        "model",
        2.0,
        model_at(1024, COMPILED_SUFFIX, COMPILED_SUFFIX + GRAPH_SUFFIX),
    ),
    Asked("ViT-L, 256 px, batch 1, compiled: speed over SDPA", "model", 1.0, model_at(256, COMPILED_SUFFIX)),
    Asked(
        "ViT-L, 256 px, batch 1, compiled, CUDA graph: speed over SDPA",
        "model",
        1.0,
        model_at(256, COMPILED_SUFFIX + GRAPH_SUFFIX),
    ),
)


def judge(rows: dict[str, list[Row]], promises: tuple[Asked, ...]) -> list[list[str]]:
    """Return the table of what was asked for and what was reached, with its heading, from the rows by script."""
    lines = [["", "asked, at least", "reached", "", "where, or how"]]
    for asked in promises:
        value, where = min(asked.reached(rows.get(asked.script, [])), default=(None, ""))
        reached, verdict = (
            ("not measured", "") if value is None else (asked.text(value), "yes" if value >= asked.least else "no")
        )
        lines.append([asked.what, asked.text(asked.least), reached, verdict, where])
    return lines
