"""benchmarks/quality.py: methods run, cells are skipped when they are done, and the page says what the cells say."""

import json
import sys

import pytest

from benchmarks import latency, methods, protocols, quality, quality_page
from modeling_adala import DataError, convert
from modeling_adala.modeling_adala import models_of
from trainers import AttentionAlignmentConfig, FeatureAlignmentConfig
from trainers.data.digits import DIGITS_TEACHER

# a plain method, one with every option, and one that shares stage 1 with it
SMOKE = ("paper", "hedgehog + mixing", "hedgehog + mixing, auto:1")


@pytest.fixture(scope="module")
def cells(tmp_path_factory) -> dict[str, dict]:
    """Results of a smoke run of three methods, by method."""
    root = tmp_path_factory.mktemp("quality")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "STUDENTS", root / "stage-1")
        patch.setattr(quality, "QUIET", quality.QUIET | {"use_cpu": True, "bf16": False})
        patch.setattr("benchmarks.common.SMOKE", root)
        patch.setattr(sys, "argv", ["quality", "--smoke", "--methods", *SMOKE])
        quality.main()
        assert len(list((root / "stage-1").glob("*/seconds.json"))) == 2
    found = [json.loads(path.read_text()) for path in root.glob("*.json")]
    return {cell["method"]: cell for cell in found}


@pytest.mark.slow
def test_a_cell_has_a_row_for_each_stage_and_says_where_it_comes_from(cells):
    assert set(cells) == set(SMOKE)
    for cell in cells.values():
        assert [row["row"] for row in cell["rows"]] == list(quality_page.ROWS)
        assert all(0 <= row["head_accuracy"] <= 1 and row["teacher_head_accuracy"] > 0.8 for row in cell["rows"])
        assert cell["smoke"] and cell["seed"] == 0 and len(cell["commit"]) == 40
    assert len(cells["hedgehog + mixing, auto:1"]["rows"][1]["softmax_layers"]) == 1
    plain, auto = (cells[name]["rows"] for name in SMOKE[1:])
    assert plain[1]["seconds"] == auto[1]["seconds"]  # the same stage 1


def test_a_finished_cell_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "RESULTS", tmp_path)
    done = quality.path_of("digits", "paper", 0)
    done.parent.mkdir(parents=True)
    done.write_text("{}")
    run = []
    monkeypatch.setattr(quality, "run_cell", lambda *cell: run.append(cell[:3]))
    monkeypatch.setattr(sys, "argv", ["quality", "--methods", "paper", "elu", "--seeds", "0", "1"])
    quality.main()
    assert run == [("digits", "elu", 0), ("digits", "paper", 1), ("digits", "elu", 1)]


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_is_one_that_the_trainers_take(name):
    method = methods.METHODS[name]
    student = convert(str(DIGITS_TEACHER), check_parity=False, **method.options)
    assert type(student) in models_of(student.config).values()
    for protocol in protocols.PROTOCOLS.values():
        AttentionAlignmentConfig(**protocol.stage_1 | method.stage_1)
        FeatureAlignmentConfig(**protocol.stage_2 | method.stage_2)


def cell(method: str, seed: int, final: float) -> dict:
    figures = {"cls_cosine": 0.9, "patches_cosine": 0.8, "teacher_mean_iou": 0.5, "seconds": 60.0}
    rows = [{"row": row, "student_mean_iou": final, **figures} for row in quality_page.ROWS]
    budget = {stage: {"max_steps": 1, "per_device_train_batch_size": 2} for stage in ("stage_1", "stage_2")}
    where = {"machine": "m", "commit": "c" * 40, "date": "2026-11-25 00:00", "bf16": False, "budget": budget}
    about = {"protocol": "dense", "metric": "student_mean_iou", "method": method, "seed": seed}
    return {**about, **where, "rows": rows}


def test_the_page_shows_means_over_seeds_best_first(tmp_path, monkeypatch):
    found = [cell("paper", 0, 0.3), cell("hedgehog", 0, 0.4), cell("hedgehog", 1, 0.44)]
    speeds = {"softmax": {1025: 1.0}, "paper": {1025: 1.5}, "hedgehog": {1025: 1.25}}
    rows = quality_page.rows_of(found, speeds)
    assert [row[0] for row in rows[1:]] == ["softmax", "hedgehog", "paper"]
    assert rows[2][4] == "42.0% ± 2.8" and rows[2][5] == "84.0%" and rows[2][-1] == "1.25"
    assert rows[3][4] == "30.0%" and rows[3][5] == "60.0%"
    text = quality_page.render(found, speeds)
    assert "CamVid, 168x224" in text and "1 and 1 steps of 2 images; float32; m; commits ccccccc" in text
    monkeypatch.setattr(quality_page, "PICTURE", tmp_path / "quality.png")
    quality_page.draw(found, speeds)
    assert (tmp_path / "quality.png").stat().st_size > 5_000


def test_smoke_runs_are_no_results(tmp_path):
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "x.json").write_text(json.dumps({"smoke": True, "protocol": "digits", "method": "paper"}))
    with pytest.raises(DataError, match="smoke run"):
        quality_page.load_cells(tmp_path)


def test_the_latency_of_every_method_is_measured(tmp_path, monkeypatch):
    output = tmp_path / "latency.json"
    arguments = ["latency", "--smoke", "--teacher", str(DIGITS_TEACHER), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(latency, "METHODS", {name: methods.METHODS[name] for name in SMOKE})
    latency.main()
    speeds = quality_page.load_latency(output)
    assert set(speeds) == {"softmax", *SMOKE} and all(
        value > 0 for found in speeds.values() for value in found.values()
    )
