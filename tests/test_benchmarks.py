"""The scripts in benchmarks/ run, and the tables of docs/speed.md say what their results say."""

import json
import re
import sys
from pathlib import Path

import pytest

from benchmarks import common, model, operator, scaling, tables
from modeling_adala import DataError

SCRIPTS = {"operator": operator, "model": model, "scaling": scaling}


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
    facts = ("subject", "command", "commit", "dirty", "machine", "versions", "threads", "backend", "date")
    assert all(fact in result for fact in facts)
    assert re.fullmatch(r"[0-9a-f]{40}", result["commit"])
    for row in result["rows"]:
        assert 0 < row["lower_milliseconds"] <= row["milliseconds"] <= row["upper_milliseconds"]


def test_linear_rows_carry_their_error(smoke):
    for name in SCRIPTS:
        rows = json.loads((smoke / f"{name}.json").read_text())["rows"]
        linear = [row for row in rows if row["name"].startswith("linear")]
        assert linear and all(row["relative_error"] < 0.05 for row in linear)


def test_a_smoke_run_is_not_a_result(smoke):
    with pytest.raises(DataError, match="smoke run"):
        tables.load_results(smoke)


def test_a_smoke_run_leaves_the_results_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(common, "SMOKE", tmp_path / "smoke")
    assert common.write_result("some", [], smoke=True) == tmp_path / "smoke" / "some.json"
    assert common.write_result("some", [], subject="it") == tmp_path / "results" / "some.json"
    assert json.loads((tmp_path / "results" / "some.json").read_text())["subject"] == "it"


def test_tables_show_every_figure_of_their_rows(smoke):
    results = {name: json.loads((smoke / f"{name}.json").read_text()) for name in SCRIPTS}
    text = tables.render(results)
    rows = [row for result in results.values() for row in result["rows"]]
    assert all(f"| {tables.three_digits(row['milliseconds'])} |" in text for row in rows)
    shown = [line for line in text.splitlines() if line.startswith("|")]
    assert len(shown) == len(rows) + 2 * len(SCRIPTS)  # a heading and a rule each
    softmax = [line for line in shown if "| softmax |" in line or "| SDPA |" in line]
    assert len(softmax) == 6 and all(line.endswith("| 1.00x |") for line in softmax)


def test_without_a_result_nothing_is_claimed():
    text = tables.render({})
    assert text.count("Not measured") == 2 * len(tables.SECTIONS)
    assert "|" not in text


def test_a_backend_that_is_gone_is_named():
    result = json.loads((common.RESULTS / "model.json").read_text())
    assert ("since been removed" in tables.render({"model": result})) == (result["backend"]["name"] == "cpu")
    result["backend"]["name"] = "torch"
    assert "since been removed" not in tables.render({"model": result})


def test_tables_on_the_page_are_those_of_the_committed_results():
    page = tables.PAGE.read_text()
    expected = tables.replace_tables(page, tables.render(tables.load_results(common.RESULTS)))
    assert page == expected, "run python -m benchmarks.tables"


def test_only_the_tables_of_a_page_are_replaced():
    page = f"before\n{tables.START}\nold\n{tables.END}\nafter\n"
    assert tables.replace_tables(page, "new\n") == f"before\n{tables.START}\n\nnew\n\n{tables.END}\nafter\n"


def test_exponent_of_a_power_law():
    rows = [{"tokens": tokens, "milliseconds": 3 * tokens**1.25, "peak_bytes": None} for tokens in (10, 100, 5000)]
    assert scaling.exponent(rows, "milliseconds") == pytest.approx(1.25)
    assert scaling.exponent(rows, "peak_bytes") is None
