"""The scripts in benchmarks/ run, and the tables of docs/speed.md say what their results say."""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from benchmarks import acceptance, common, gpu, model, operator, scaling, tables
from modeling_adala import DataError
from modeling_adala.errors import AdaLAError
from vit_adala.benchmark.cases import graph_of

ROOT = Path(__file__).parents[1]
SCRIPTS = ("operator", "model", "scaling", "training")


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory) -> tuple[Path, str]:
    """Folder and output of `python -m benchmarks.gpu --dry-run`: every script in one process, at toy size."""
    directory = tmp_path_factory.mktemp("results")
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--output", str(directory)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return directory, result.stdout


@pytest.fixture(scope="module")
def smoke(dry_run) -> Path:
    """A folder of results of smoke runs; a file each, as its script left it."""
    return dry_run[0]


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_result_says_where_it_comes_from(smoke, name):
    result = json.loads((smoke / f"{name}.json").read_text())
    assert result["smoke"] is True and result["rows"]
    facts = ("subject", "command", "commit", "dirty", "machine", "versions", "threads", "backend", "date")
    assert all(fact in result for fact in facts)
    assert re.fullmatch(r"[0-9a-f]{40}", result["commit"])
    for row in result["rows"]:
        assert 0 < row["lower_milliseconds"] <= row["milliseconds"] <= row["upper_milliseconds"]


@pytest.mark.long
def test_linear_rows_carry_their_error(smoke):
    for name in ("operator", "model", "scaling"):
        rows = common.load_json(smoke / f"{name}.json")["rows"]
        linear = [row for row in rows if row["name"].startswith("linear")]
        assert linear and all(row["relative_error"] < 0.05 for row in linear)


@pytest.mark.long
def test_a_smoke_run_is_not_a_result(smoke):
    with pytest.raises(DataError, match="smoke run"):
        tables.load_results(smoke)


def test_a_smoke_run_leaves_the_results_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(common, "SMOKE", tmp_path / "smoke")
    assert common.write_result("some", [], smoke=True) == tmp_path / "smoke" / "some.json"
    assert common.write_result("some", [], subject="it") == tmp_path / "results" / "some.json"
    assert json.loads((tmp_path / "results" / "some.json").read_text())["subject"] == "it"


@pytest.mark.long
def test_tables_show_every_figure_of_their_rows(smoke):
    results = {name: common.load_json(smoke / f"{name}.json") for name in SCRIPTS}
    text = tables.render(results)
    rows = [row for result in results.values() for row in result["rows"]]
    assert all(f"| {tables.three_digits(row['milliseconds'])} |" in text for row in rows)
    shown = [line for line in text.splitlines() if line.startswith("|")]
    asked = len(acceptance.CPU)
    assert len(shown) == asked + len(rows) + 2 * (1 + len(SCRIPTS))  # a heading and a rule each
    softmax = [line for line in shown if "| softmax |" in line or "| SDPA |" in line]
    assert len(softmax) == 6 and all(line.endswith("| 1.00x |") for line in softmax)


def test_without_a_result_nothing_is_claimed():
    text = tables.render({})
    assert text.count("Not measured: ") == 4 and "`python -m benchmarks.gpu` measures model, operator" in text
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


# --- one case, one part at a time ------------------------------------------------------------------------------------


def arguments(tmp_path: Path, seconds: float = math.inf) -> argparse.Namespace:
    return argparse.Namespace(smoke=True, output=tmp_path / "some.json", seconds=seconds)


def test_a_case_that_fails_is_named_and_the_others_are_measured(tmp_path):
    def measure(case: str) -> list[dict]:
        if case == "bad":
            raise ValueError("broken\nbelow us")
        return [{"name": case}]

    with pytest.raises(AdaLAError, match=r"some: 1 measurements failed, the first is bad: ValueError: broken$"):
        common.measure_all("some", ["first", "bad", "last"], measure, arguments(tmp_path), subject="it")
    result = common.load_json(tmp_path / "some.json")
    assert [row["name"] for row in result["rows"]] == ["first", "last"]
    assert result["not_measured"] == {"bad": "ValueError: broken"} and result["subject"] == "it"


def test_what_cannot_be_run_leaves_a_comparison_and_not_its_case(tmp_path):
    def measure(case: str) -> list[dict]:
        runs, failed = common.prepare_all({"ours": lambda: lambda: 1, "graph": lambda: [][0]})
        return [*failed, *({"name": name, "result": run()} for name, run in runs.items())]

    with pytest.raises(AdaLAError, match="a case, graph: IndexError: list index out of range"):
        common.measure_all("some", ["a case"], measure, arguments(tmp_path))
    result = common.load_json(tmp_path / "some.json")
    assert result["rows"] == [{"name": "ours", "result": 1}] and list(result["not_measured"]) == ["a case, graph"]


def test_what_there_is_no_time_for_is_named(tmp_path):
    def measure(case: int) -> list[dict]:
        time.sleep(0.2)
        return [{"name": case}]

    count = {"summary": lambda rows: {"count": len(rows)}}
    common.measure_all("some", [1, 2, 3], measure, arguments(tmp_path, 0.1), **count)
    result = common.load_json(tmp_path / "some.json")
    assert result["count"] == 1 and result["not_measured"] == dict.fromkeys("23", "no time left")
    (tmp_path / "some.json").unlink()
    with pytest.raises(AdaLAError, match="no time for any case"):
        common.measure_all("some", [1], measure, arguments(tmp_path, -1))


PART = """
import os, subprocess, sys, time

def run_script(main):
    main()

def main(arguments):
    if arguments == ["hang"]:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        with open("child", "w") as file:
            file.write(str(child.pid))
        time.sleep(60)
    if arguments == ["crash"]:
        os.kill(os.getpid(), 9)
    if arguments:
        sys.exit("it failed")
"""


@pytest.fixture
def some_part(tmp_path, monkeypatch) -> str:
    (tmp_path / "some_part.py").write_text(PART)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return "some_part"


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_part_ends_alone(some_part, dry_run):
    """As on a GPU, in a fresh process, and as in a dry run, in a forked one."""
    outcomes = [gpu.run_part(some_part, arguments, 60, dry_run) for arguments in ([], ["fail"], ["crash"])]
    assert outcomes == ["ok", "exit status 1", "exit status -9"]


def test_a_part_that_hangs_is_killed_with_the_processes_that_it_started(some_part):
    assert gpu.run_part(some_part, ["hang"], 2, dry_run=True) == "killed after 2 s"
    child = Path("/proc") / Path("child").read_text().strip() / "stat"
    assert not child.exists() or child.read_text().split()[2] == "Z"


# --- what a dry run says ---------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_dry_run_runs_every_part_and_says_what_it_found(dry_run):
    folder, output = dry_run
    parts = common.load_json(folder / "gpu.json")
    assert [row["part"] for row in parts["rows"]] == list(gpu.PARTS)
    assert all(row["outcome"] == "ok" and row["seconds"] < row["most"] for row in parts["rows"])
    assert sum(part.seconds for part in gpu.PARTS.values()) == 540
    assert f"torch {torch.__version__}" in output and "Python.h" in output and "asked, at least" in output
    assert [row["outcome"] for row in common.load_json(folder / "tests.json")["rows"]] == ["passed"]
    distilled = common.load_json(folder / "distillation.json")
    assert [(row["row"], row["images"]) for row in distilled["rows"]] == [
        ("converted", 0),
        ("stage 1", 16),
        ("stages 1+2", 32),
    ]


@pytest.mark.long
def test_tables_of_a_gpu_run_show_asked_and_reached_first(dry_run):
    results = {f"{path.stem}-cuda": common.load_json(path) for path in dry_run[0].glob("*.json")}
    text = tables.render(results)
    titles = [line for line in text.splitlines() if line.startswith("### ")]
    assert titles[0] == "### GPU: asked and reached" and "### Not measured on a GPU" not in titles
    assert len(titles) == len(tables.SECTIONS) + 1 and text.count("Not measured: `python -m") == 4  # those of a CPU
    for title, row in (
        ("Distillation", "| digits | stages 1+2 |"),
        ("Tests", "| passed | 1 |"),
        ("Parts", "| model | ok |"),
    ):
        assert row in text.partition(f"### {title}")[2]


def test_what_a_machine_lacks_is_named(tmp_path, monkeypatch):
    fine = {name: gpu.check_package(Requirement(name)) for name in ("torch>=2.8", "torch>=99", "no-such-package>=1")}
    assert [found for found, _ in fine.values()] == [True, False, False]
    assert [line.partition(":")[2] for _, line in fine.values()][1:] == [" needs >=99", " not installed, needs >=1"]
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert [found for found, _ in gpu.check_folders(tmp_path)] == [True, True, False]


def test_the_wheels_are_all_that_is_required_but_for_what_is_large():
    script = (ROOT / "benchmarks" / "gpu_wheels.sh").read_text()
    large = "|".join(re.findall(r"""^large=['"](?:\$large\|)?(.*)['"]$""", script, flags=re.MULTILINE)).split("|")
    pinned = re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert {wanted.name.replace("_", "-") for wanted in gpu.requirements()} <= set(pinned)
    there = {name for name in pinned if any(re.fullmatch(pattern, name) for pattern in large)}
    assert {"torch", "numpy", "pyarrow"} <= there and not there & {"transformers", "datasets", "mlxtend", "pytest"}
    assert all(any(re.fullmatch(pattern, name) for name in pinned) for pattern in large)


# --- asked and reached -----------------------------------------------------------------------------------------------


def operator_row(name: str, milliseconds: float, tokens: int = 16384, passes: str = "forward", **others) -> dict:
    shape = {"batch": 8, "tokens": tokens, "head_dim": 64, "pass": passes, "dtype": "bfloat16", "feature_map": "elu"}
    return {"name": name, "milliseconds": milliseconds, "floor_share": 0.5, **shape, **others}


def model_row(name: str, milliseconds: float, side: int) -> dict:
    return {"name": name, "milliseconds": milliseconds, "batch": 1, "side": side, "tokens": side, "dtype": "bfloat16"}


def test_asked_and_reached_are_ratios_of_rows_that_were_measured_alike():
    graph, default = operator.GRAPH, model.DEFAULT
    rows = {
        "operator": [
            operator_row("linear", 2.0),
            operator_row("linear" + graph, 1.9, floor_share=0.7),
            operator_row("flash_bla", 4.0),
            operator_row("flash_bla, features given", 2.5),
            operator_row("SDPA", 20.0),
            operator_row("linear", 0.2, 1024),
            operator_row("SDPA", 0.1, 1024),
            operator_row("SDPA", 0.1, 1024, batch=1),  # nothing of ours beside it
            operator_row("SDPA", 0.1, 512),
            operator_row("linear", 0.2, 512),  # fewer tokens than were asked for
        ],
        "model": [
            *(model_row(name, ms, 1024) for name, ms in (("softmax", 9.0), (default, 6.0), (model.FREE, 5.0))),
            *(model_row(f"{name}, CUDA graph", ms, 1024) for name, ms in (("softmax", 8.0), (default, 3.9))),
        ],
    }
    found = {line[0]: line[1:] for line in acceptance.judge(rows, acceptance.GPU)[1:]}
    assert len(found) == len(acceptance.GPU)
    shape = "Operator, 16,384 tokens, batch 8, heads of 64: "
    assert found[f"{shape}speed over the peer"] == ["1.50x", "2.00x", "yes", "forward"]
    assert found[f"{shape}the same, features given to the peer"][1:3] == ["1.25x", "no"]
    assert found[f"{shape}share of the copy bandwidth"] == ["60%", "70%", "yes", "1.900 ms"]
    slowest = "Operator from 1,024 tokens, slowest shape: "
    where = "1,024 tokens, batch 8, heads of 64, elu"
    assert found[f"{slowest}speed over SDPA, eager"] == ["1.00x", "0.50x", "no", where]
    assert found[f"{slowest}the same with backward"][1:] == ["not measured", "", ""]
    assert found["ViT-L, 1,024 px, batch 1: speed over SDPA"] == ["2.00x", "2.05x", "yes", "CUDA graph"]
    del rows["model"][3:]
    eager = {line[0]: line[1:] for line in acceptance.judge(rows, acceptance.GPU)[1:]}[
        "ViT-L, 1,024 px, batch 1: speed over SDPA"
    ]
    assert eager == ["2.00x", "1.50x", "no", "eager; attention for free: 1.80x"]


def test_the_slowest_model_decides_what_a_cpu_has_reached():
    default = model.DEFAULT
    rows = {
        "model": [
            *(model_row(name, ms, 196) | {"model": model.VIT_S} for name, ms in (("softmax", 9.0), (default, 10.0))),
            *(model_row(name, ms, 518) | {"model": model.VIT_S} for name, ms in (("softmax", 15.0), (default, 10.0))),
            model_row(model.FREE, 9.0, 518) | {"model": model.VIT_S},
            model_row("softmax", 1.0, 518) | {"model": model.VIT_B},  # nothing of ours beside it
            *(model_row(name, ms, 112) | {"model": model.VIT_S} for name, ms in (("softmax", 1.0), (default, 5.0))),
        ],
        "operator": [operator_row("linear", 2.0), operator_row("plain PyTorch", 3.0)],
    }
    found = {line[0]: line[1:] for line in acceptance.judge(rows, acceptance.CPU)[1:]}
    assert len(found) == len(acceptance.CPU)
    slowest = "Whole models from 196 tokens, batch 1, slowest: speed over SDPA"
    assert found[slowest] == ["1.00x", "0.90x", "no", "DINOv2-S/14, 196 tokens"]
    assert found["DINOv2-S/14, 518 px, batch 1: speed over SDPA"] == ["1.40x", "1.50x", "yes", "518 tokens, 10 ms"]
    assert found["DINOv2-S/14, 518 px, batch 1: speed over attention for free"][:3] == ["95%", "90%", "no"]
    assert found["ViT-B/16, 512 px, batch 1: speed over SDPA"][1:3] == ["not measured", ""]
    assert found["Operator, slowest shape, forward: speed over plain PyTorch"][1:3] == ["1.50x", "yes"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CPU has no CUDA graphs")
def test_a_replay_makes_all_calls():
    count = torch.zeros(1, device="cuda")
    replay = graph_of(lambda: count.add_(1), calls=10)
    count.zero_()
    assert replay() is count and count.item() == 10


def test_shapes_of_a_gpu_are_those_that_are_asked_for():
    shapes = operator.gpu_shapes()
    assert len({str(shape) for shape in shapes}) == len(shapes)
    first = {(shape.batch, shape.tokens, shape.head_dim, shape.feature_map) for shape in shapes[:4]}
    assert first == {(acceptance.BATCH, acceptance.TOKENS, acceptance.HEAD_DIM, "elu")}
    cases = model.gpu_cases(full=False)
    assert (cases[0].side, cases[1].side) == (1024, 256) and [case.side for case in cases if case.compiled] == [
        256,
        1024,
    ]
    assert {(case.batch, case.side) for case in cases} >= {(batch, side) for batch in (1, 8) for side in (224, 2048)}
    assert len(model.gpu_cases(full=True)) == 20
