"""The scripts in benchmarks/ run, and docs/performance.md says what their results say."""

import json
import re
import sys
from pathlib import Path

import pytest

from benchmarks import claims, common, model, operator, report, scaling
from modeling_adala import DataError

SCRIPTS = {"operator": operator, "model": model, "scaling": scaling}
NOW = {"lower_milliseconds": 1.0, "upper_milliseconds": 1.0, "floor_share": 0.5}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> Path:
    """A folder of results of smoke runs; a file each, as its script left it."""
    directory = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        for name, script in SCRIPTS.items():
            patch.setattr(sys, "argv", [name, "--smoke", "--output", str(directory / f"{name}.json")])
            script.main()
    return directory


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_result_says_where_it_comes_from(smoke, name):
    result = json.loads((smoke / f"{name}.json").read_text())
    assert result["smoke"] is True and result["rows"]
    facts = ("claim", "command", "commit", "dirty", "machine", "versions", "threads", "backend", "date")
    assert all(fact in result for fact in facts)
    assert re.fullmatch(r"[0-9a-f]{40}", result["commit"])
    for row in result["rows"]:
        assert 0 < row["lower_milliseconds"] <= row["milliseconds"] <= row["upper_milliseconds"]


def test_linear_rows_carry_their_error(smoke):
    for name in SCRIPTS:
        rows = json.loads((smoke / f"{name}.json").read_text())["rows"]
        linear = [row for row in rows if row["name"].startswith("linear")]
        assert linear and all(row["relative_error"] < 0.05 for row in linear)


def test_a_smoke_run_is_no_result(smoke):
    with pytest.raises(DataError, match="smoke run"):
        report.load_results(smoke)


def test_a_smoke_run_leaves_the_results_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(common, "SMOKE", tmp_path / "smoke")
    assert common.write_result("some", [], smoke=True) == tmp_path / "smoke" / "some.json"
    assert common.write_result("some", [], claim="fast") == tmp_path / "results" / "some.json"
    assert json.loads((tmp_path / "results" / "some.json").read_text())["claim"] == "fast"


def test_page_shows_every_figure_of_its_rows(smoke, tmp_path):
    results = {name: json.loads((smoke / f"{name}.json").read_text()) for name in SCRIPTS}
    page = report.render(results)
    for name in SCRIPTS:
        shown = [row for row in results[name]["rows"] if row.get("section") in ("headline", None)]
        assert all(report.three_digits(row["milliseconds"]) in page for row in shown)
    pictures = {path.name for path in report.draw(results, tmp_path)}
    assert pictures == set(re.findall(r"\]\(images/performance/(.*?)\)", page))
    assert all((tmp_path / name).stat().st_size > 5000 for name in pictures)


def test_performance_page_is_what_the_committed_results_say():
    results = report.load_results(common.RESULTS)
    page = report.PAGE.read_text()
    assert page == report.render(results), "run python -m benchmarks.report"
    shown = re.findall(r"\]\(images/performance/(.*?)\)", page)
    assert all((report.PICTURES / name).is_file() for name in shown), "run python -m benchmarks.report"


def operator_rows(linear: float, sdpa: float, tokens: int) -> list[dict]:
    shape = {"pass": "forward", "dtype": "bfloat16", "batch": 1, "heads": 12, "tokens": tokens, "head_dim": 64}
    return [
        {"section": "headline", "name": name, **shape, **NOW, "milliseconds": milliseconds}
        for name, milliseconds in (("linear", linear), ("SDPA", sdpa))
    ]


def verdicts(results: dict) -> dict[str, claims.Claim]:
    return {claim.what: claim for claim in claims.claims(results)}


def test_claims_are_reached_or_missed_with_the_figure():
    rows = [*operator_rows(1.0, 57.0, 4097), *operator_rows(1.0, 20.5, 1025)]
    found = verdicts({"operator": {"rows": rows}})
    missed = found["Operator against SDPA, bf16, B1 H12 D64, N = 4,097"]
    assert (missed.asked, missed.measured, missed.verdict) == ("at least 60x", "57x", "**missed**")
    reached = found["Operator against SDPA, bf16, B1 H12 D64, N = 1,025"]
    assert (reached.measured, reached.verdict) == ("20.5x", "reached")
    assert found["Operator against SDPA, bf16, B1 H12 D64, N = 197"].verdict == "unmeasured"
    floor = found["Operator, time over floor, from N = 4,097 on"]
    assert (floor.measured, floor.verdict) == ("2.00", "**missed**")


def test_without_results_nothing_is_claimed():
    assert {claim.verdict for claim in claims.claims({})} == {"unmeasured"}


@pytest.mark.parametrize(("upper", "verdict"), [(1.15, "reached"), (1.05, "**missed**")])
def test_slower_is_what_the_spread_does_not_explain(upper, verdict):
    shape = {"section": "sweep", "pass": "forward", "dtype": "float32", "batch": 1, "heads": 1, "tokens": 1}
    ours = {"name": "linear", "milliseconds": 1.2, "lower_milliseconds": 1.1, "upper_milliseconds": 1.3}
    theirs = {"name": "plain PyTorch", "milliseconds": 1.0, "lower_milliseconds": 0.9, "upper_milliseconds": upper}
    rows = [shape | {"head_dim": 8, "floor_share": 1} | row for row in (ours, theirs)]
    claim = verdicts({"operator": {"rows": rows}})["Operator against plain PyTorch, in float32"]
    assert claim.verdict == verdict and claim.measured.startswith("0.83x at worst")


def test_exponent_of_a_power_law():
    rows = [{"tokens": tokens, "milliseconds": 3 * tokens**1.25, "peak_bytes": None} for tokens in (10, 100, 5000)]
    assert scaling.exponent(rows, "milliseconds") == pytest.approx(1.25)
    assert scaling.exponent(rows, "peak_bytes") is None
