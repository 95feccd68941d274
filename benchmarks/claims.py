"""What was asked for, what the committed results say, and whether that is enough."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

Row = dict[str, Any]
Results = dict[str, dict[str, Any]]

SDPA_FACTORS = {197: 4.0, 1025: 20.0, 4097: 60.0}
MODEL_FACTORS = {224: 1.1, 512: 2.1, 1024: 4.2}
FLOOR_FACTOR, FLOOR_TOKENS = 1.5, 4097
EXPONENT = 1.05
STAGE_1_SHARE, STAGE_2_SHARE, STAGE_1_FACTOR = 0.8, 0.9, 1.5
PEER_FACTOR, BANDWIDTH_SHARE, LARGE_FACTOR = 1.5, 0.6, 2.0
PLAIN = {"plain PyTorch": "in float32", "plain PyTorch, input dtype": "all in the dtype of the input"}
MAPS = {"elu": "elu", "hedgehog": "hedgehog, the default map"}


@dataclass(frozen=True)
class Claim:
    """One line of the table.

    Args:
        what (`str`), asked (`str`), measured (`str`): In words.
        reached (`bool` or `None`): `None` where nothing was measured.
        source (`str`): The script that measures it.
    """

    what: str
    asked: str
    measured: str
    reached: bool | None
    source: str

    @property
    def verdict(self) -> str:
        return {True: "reached", False: "**missed**", None: "unmeasured"}[self.reached]


def claims(results: Results) -> list[Claim]:
    """All of them, those of a GPU last. A result that is not there leaves its claims unmeasured."""
    found = [*_operator(_rows(results, "operator")), *_model(_rows(results, "model"))]
    found += [*_scaling(results.get("scaling", {})), *_training(results.get("training", {}))]
    return [*found, *_gpu(results)]


def select(rows: list[Row], **wanted: Any) -> list[Row]:
    """Rows with these values."""
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def speedups(rows: list[Row], name: str, baseline: str, keys: tuple[str, ...]) -> list[tuple[Row, Row, float]]:
    """Rows of `name` and `baseline` that agree in `keys`, and how many times as fast `name` is."""
    others = {tuple(row[key] for key in keys): row for row in select(rows, name=baseline)}
    pairs = [(row, others.get(tuple(row[key] for key in keys))) for row in select(rows, name=name)]
    return [(row, other, other["milliseconds"] / row["milliseconds"]) for row, other in pairs if other is not None]


def is_slower(row: Row, other: Row) -> bool:
    """By more than the spread: the quartiles do not overlap."""
    return row["lower_milliseconds"] > other["upper_milliseconds"]


OPERATOR_KEYS = ("section", "pass", "dtype", "batch", "heads", "tokens", "head_dim")


def _operator(rows: list[Row]) -> Iterator[Claim]:
    source = "benchmarks.operator"
    layer = select(rows, section="headline", dtype="bfloat16", **{"pass": "forward"})
    for tokens, factor in SDPA_FACTORS.items():
        ratios = [ratio for _, _, ratio in speedups(select(layer, tokens=tokens), "linear", "SDPA", OPERATOR_KEYS)]
        what = f"Operator against SDPA, bf16, B1 H12 D64, N = {tokens:,}"
        yield _at_least(what, factor, ratios, source)
    above = [1 / row["floor_share"] for row in select(layer, name="linear") if row["tokens"] >= FLOOR_TOKENS]
    yield Claim(
        f"Operator, time over floor, from N = {FLOOR_TOKENS:,} on",
        f"at most {FLOOR_FACTOR}",
        f"{max(above):.2f}" if above else "",
        max(above) <= FLOOR_FACTOR if above else None,
        source,
    )
    sweep = select(rows, section="sweep")
    for plain, how in PLAIN.items():
        yield _never_slower(f"Operator against plain PyTorch, {how}", sweep, "linear", plain, OPERATOR_KEYS, source)


def _model(rows: list[Row]) -> Iterator[Claim]:
    source, keys = "benchmarks.model", ("batch", "side")
    for name, label in MAPS.items():
        linear = f"linear ({name})"
        for side, factor in MODEL_FACTORS.items():
            found = speedups(select(rows, batch=1, side=side), linear, "softmax", keys)
            what = f"ViT-B ({label}) against softmax, bf16, batch 1, {side:,} pixels"
            claim = _at_least(what, factor, [ratio for _, _, ratio in found], source)
            for _, _, limit in speedups(select(rows, batch=1, side=side), "attention for free", "softmax", keys):
                claim = replace(claim, measured=f"{claim.measured} (attention for free: {limit:.4g}x)")
            yield claim
        yield _never_slower(f"ViT-B ({label}) against softmax, all sizes", rows, linear, "softmax", keys, source)


def _scaling(result: dict[str, Any]) -> Iterator[Claim]:
    for what, key in (("Time", "time_exponent"), ("Peak memory", "memory_exponent")):
        value = result.get(key)
        yield Claim(
            f"{what} against N, 4,096 to 1,048,576: exponent of the power law",
            f"at most {EXPONENT}",
            "" if value is None else f"{value:.3f}",
            None if value is None else value <= EXPONENT,
            "benchmarks.scaling",
        )


def _training(result: dict[str, Any]) -> Iterator[Claim]:
    for what, key, asked, form in (
        ("Stage 1, share of the rate of the teacher's forward pass alone", "stage_1_share", STAGE_1_SHARE, "{:.0%}"),
        ("Stage 2, share of teacher forward + 3 x student forward", "stage_2_share", STAGE_2_SHARE, "{:.0%}"),
        ("Stage 1 against hooks on everything", "stage_1_speedup", STAGE_1_FACTOR, "{:.2f}x"),
    ):
        value = result.get(key)
        yield Claim(
            what,
            f"at least {form.format(asked)}",
            "" if value is None else form.format(value),
            None if value is None else value >= asked,
            "benchmarks.training",
        )


def _gpu(results: Results) -> Iterator[Claim]:
    rows, source = _rows(results, "operator-cuda"), "benchmarks.operator (GPU)"
    for passes in ("forward", "forward and backward"):
        ratios = [r for _, _, r in speedups(select(rows, **{"pass": passes}), "linear", "flash_bla", OPERATOR_KEYS)]
        yield _at_least(f"GPU: operator against the peer library, {passes}", PEER_FACTOR, ratios, source)
    long = [row for row in select(rows, name="linear", batch=8, **{"pass": "forward"}) if row["tokens"] >= 16384]
    floors = results.get("operator-cuda", {}).get("floors", {})
    shares = [
        1000 * row["bytes_moved"] / row["milliseconds"] / floors[row["dtype"]]["bytes_per_second"] for row in long
    ]
    yield Claim(
        "GPU: share of the copy bandwidth, batch 8, from N = 16,384 on",
        f"at least {BANDWIDTH_SHARE:.0%}",
        f"{min(shares):.0%}" if shares else "",
        min(shares) >= BANDWIDTH_SHARE if shares else None,
        source,
    )
    yield _never_slower("GPU: operator against SDPA, from N = 1,024 on", rows, "linear", "SDPA", OPERATOR_KEYS, source)
    rows, source = select(_rows(results, "model-cuda"), batch=1), "benchmarks.model (GPU)"
    for name, side, factor in (("linear (elu)", 1024, LARGE_FACTOR), ("linear (elu), compiled", 256, 1.0)):
        baseline = "softmax" + name.removeprefix("linear (elu)")
        found = speedups(select(rows, side=side), name, baseline, ("batch", "side"))
        what = f"GPU: ViT-L {name} against {baseline}, {side:,} pixels, batch 1"
        yield _at_least(what, factor, [ratio for _, _, ratio in found], source)


def _at_least(what: str, factor: float, ratios: list[float], source: str) -> Claim:
    measured = f"{min(ratios):.4g}x" if ratios else ""
    return Claim(what, f"at least {factor:g}x", measured, min(ratios) >= factor if ratios else None, source)


def _never_slower(what: str, rows: list[Row], name: str, baseline: str, keys: tuple[str, ...], source: str) -> Claim:
    """A shape counts as slower if its quartiles lie above those of the baseline."""
    found = speedups(rows, name, baseline, keys)
    slower = [pair for pair in found if is_slower(pair[0], pair[1])]
    least: Callable[[tuple[Row, Row, float]], float] = lambda pair: pair[2]  # noqa: E731
    measured = f"{min(map(least, found)):.2f}x at worst; slower at {len(slower)} of {len(found)}" if found else ""
    return Claim(what, "nowhere slower", measured, not slower if found else None, source)


def _rows(results: Results, name: str) -> list[Row]:
    return results.get(name, {}).get("rows", [])
