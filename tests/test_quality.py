"""benchmarks/quality.py: methods run, cells are skipped when they are done, and the page says what the cells say."""

import json
import sys

import pytest
import torch

from benchmarks import latency, methods, protocols, quality, quality_page
from modeling_adala import DataError, load_teacher
from modeling_adala.modeling_adala import models_of
from trainers import AttentionAlignmentConfig, FeatureAlignmentConfig
from trainers.data.digits import DIGITS_TEACHER

# a rival, a method with every option, and one that shares stage 1 with it
SMOKE = ("polaformer", "hedgehog + mixing", "hedgehog + mixing, auto:1")


@pytest.fixture(scope="module")
def cells(tmp_path_factory) -> dict[str, dict]:
    """Results of a smoke run, by method; of the rival, stage 2 alone under its name and a star."""
    root = tmp_path_factory.mktemp("quality")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "STUDENTS", root / "stage-1")
        patch.setattr(quality, "QUIET", quality.QUIET | {"use_cpu": True, "bf16": False})
        patch.setattr("benchmarks.common.SMOKE", root)
        patch.setattr(sys, "argv", ["quality", "--smoke", "--methods", *SMOKE])
        quality.main()
        assert len(list((root / "stage-1").glob("*/seconds.json"))) == 2
        patch.setattr(sys, "argv", ["quality", "--smoke", "--without-stage-1", "--methods", SMOKE[0]])
        quality.main()
        assert len(list((root / "stage-1").glob("*/seconds.json"))) == 2
    found = [json.loads(path.read_text()) for path in root.glob("*.json")]
    return {cell["method"] + "*" * (len(cell["rows"]) == 1): cell for cell in found}


@pytest.mark.long
@pytest.mark.slow
def test_a_cell_has_a_row_for_each_stage_and_says_where_it_comes_from(cells):
    alone = cells.pop(f"{SMOKE[0]}*")
    assert [row["row"] for row in alone["rows"]] == [quality_page.ALONE]
    assert alone["budget"]["stage_2_alone"]["max_steps"] == 2 and alone["counterpart"] == "polaformer"
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
    monkeypatch.setattr(quality, "run_cell", lambda *cell: run.append(cell[1:4]))
    monkeypatch.setattr(sys, "argv", ["quality", "--methods", "paper", "elu", "--seeds", "0", "1"])
    quality.main()
    assert run == [("elu", 0, False), ("paper", 1, False), ("elu", 1, False)]
    quality.path_of("digits", "elu", 0, alone=True).write_text("{}")
    run.clear()
    monkeypatch.setattr(sys, "argv", ["quality", "--methods", "paper", "elu", "--without-stage-1"])
    quality.main()
    assert run == [("paper", 0, True)]


def test_stage_2_alone_sees_the_images_of_both_stages_and_of_no_method_that_needs_stage_1(monkeypatch, capsys):
    one, two = ({"max_steps": steps, "per_device_train_batch_size": size} for steps, size in ((100, 8), (120, 16)))
    assert quality.steps_alone(one, two) == 170
    monkeypatch.setattr(sys, "argv", ["quality", "--without-stage-1"])
    assert {methods.METHODS[name].auto for name in quality.parse().methods} == {0}
    monkeypatch.setattr(sys, "argv", ["quality", "--without-stage-1", "--methods", "elu", SMOKE[2]])
    with pytest.raises(SystemExit):
        quality.parse()
    assert f"leave out {SMOKE[2]}" in capsys.readouterr().err


class NoTrainer:
    """Stands for a stage 1 that moves all parameters by one."""

    def __init__(self, student):
        self.student = student

    def train(self):
        for parameter in self.student.parameters():
            parameter.data += 1


def test_a_rival_comes_back_from_the_students_of_stage_1(tmp_path, teacher):
    method = methods.METHODS["polaformer"]

    def align(folder):
        student = method.student(teacher, (14, 14))
        return student, NoTrainer(student)

    (trained, _, seconds), (found, trainer, again) = (quality.stage_1(align, tmp_path / "kept") for _ in range(2))
    assert seconds == again and found is trainer.student is not trained
    assert all(map(torch.equal, found.parameters(), trained.parameters()))


@pytest.fixture(scope="module")
def teacher():
    return load_teacher(str(DIGITS_TEACHER))


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_is_one_that_the_trainers_take(name, teacher):
    method = methods.METHODS[name]
    student = method.student(teacher, (14, 14))
    assert type(student) in models_of(student.config).values()
    assert method.kind in methods.KINDS
    for protocol in protocols.PROTOCOLS.values():
        AttentionAlignmentConfig(**protocol.stage_1 | method.stage_1)
        FeatureAlignmentConfig(**protocol.stage_2 | method.stage_2)


def cell(method: str, seed: int, final: float, rows: tuple[str, ...] = quality_page.ROWS) -> dict:
    figures = {"cls_cosine": 0.9, "patches_cosine": 0.8, "teacher_mean_iou": 0.5, "seconds": 60.0}
    budget = {stage: {"max_steps": 1, "per_device_train_batch_size": 2} for stage in ("stage_1", "stage_2")}
    where = {"machine": "m", "commit": "c" * 40, "date": "2026-11-25 00:00", "bf16": False, "budget": budget}
    about = {"protocol": "dense", "metric": "student_mean_iou", "method": method, "seed": seed}
    return {**about, **where, "rows": [{"row": row, "student_mean_iou": final, **figures} for row in rows]}


def test_the_page_shows_means_over_seeds_by_kind_and_best_first(tmp_path, monkeypatch):
    found = [cell("paper", 0, 0.3), cell("hedgehog", 0, 0.4), cell("hedgehog", 1, 0.44), cell("relu + mixing", 0, 0.1)]
    found += [cell(name, 0, 0.25, rows=(quality_page.ALONE,)) for name in ("hedgehog", "mala")]
    speeds = {"softmax": {1025: 1.0}, "paper": {1025: 1.5}, "hedgehog": {1025: 1.25}}
    rows = {row[1]: row for row in quality_page.rows_of(found, speeds)}
    ours, blocks, maps = (f"**{kind}**" for kind in methods.KINDS[:3])
    assert list(rows) == ["", "softmax", ours, "relu + mixing", blocks, "mala", maps, "hedgehog", "paper"]
    assert {len(row) for row in rows.values()} == {12}
    assert [rows[name][0] for name in ("hedgehog", "paper", "relu + mixing", "mala")] == ["1", "2", "3", ""]
    assert rows["hedgehog"][5:] == ["42.0% ± 2.8", "25.0%", "84.0%", "0.900", "0.800", "2", "1.25"]
    assert rows["paper"][5:8] == ["30.0%", "", "60.0%"] and rows["mala"][3:8] == ["", "", "", "25.0%", ""]
    text = quality_page.render(found, speeds)
    assert "CamVid, 168x224" in text and "1 and 1 steps of 2 images; float32; m; commits ccccccc" in text
    assert "stage 2 alone" in text and "stage 2 alone" not in quality_page.render(found[:3], speeds)
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
    monkeypatch.setattr(latency, "METHODS", {name: methods.METHODS[name] for name in ("paper", "elu", SMOKE[0])})
    latency.main()
    measured = {row["name"] for row in json.loads(output.read_text())["rows"]}
    assert measured == {"softmax", "paper", SMOKE[0]}
    speeds = quality_page.load_latency(output)
    assert set(speeds) == {*measured, "elu", "softmax, trained"} and speeds["elu"] == speeds["paper"]
    assert all(value > 0 for found in speeds.values() for value in found.values())


def test_methods_that_differ_in_their_training_alone_are_timed_once():
    timed = {name: methods.timed_as(name) for name in methods.METHODS}
    assert timed["elu"] == "paper" and timed["hedgehog, 5e-5"] == "hedgehog" and timed["softmax, trained"] == "softmax"
    assert timed["random mixing"] is None
    assert len(set(timed.values()) - {"softmax", None}) == len(timed) - 4
