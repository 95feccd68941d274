"""benchmarks/quality.py: methods run, cells are skipped when they are done, and the page says what the cells say."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import finetuning, latency, methods, protocols, quality, quality_page, quality_pictures, students
from modeling_adala import DataError, load_teacher
from modeling_adala.modeling_adala import models_of
from trainers import AttentionAlignmentConfig, FeatureAlignmentConfig, SupervisedConfig
from trainers.data.digits import DIGITS_TEACHER

# a rival, a method with every option, and one that shares stage 1 with it
SMOKE = ("polaformer", "hedgehog + mixing", "hedgehog + mixing, auto:1")


@pytest.fixture(scope="module")
def cells(tmp_path_factory) -> dict[str, dict]:
    """Results of a smoke run, by method; of the rival, stage 2 alone under its name and a star."""
    root = tmp_path_factory.mktemp("quality")
    with pytest.MonkeyPatch.context() as patch:
        in_folder(patch, root)
        patch.setattr(sys, "argv", ["quality", "--smoke", "--methods", *SMOKE])
        quality.main()
        # of three methods, two share stage 1
        assert len(list((root / "students").glob("*/trained.json"))) == 2 + 3
        patch.setattr(sys, "argv", ["quality", "--smoke", "--without-stage-1", "--methods", SMOKE[0]])
        quality.main()
        assert len(list((root / "students").glob("*/trained.json"))) == 2 + 3 + 1
    found = [json.loads(path.read_text()) for path in root.glob("*.json")]
    return {cell["method"] + "*" * (len(cell["rows"]) == 1): cell for cell in found}


def in_folder(patch: pytest.MonkeyPatch, root: Path) -> None:
    """Write students and results of smoke runs to a folder, and train in float32 on the CPU."""
    for module in (students, finetuning):
        patch.setattr(module, "KEPT", root / "students")
        patch.setattr(module, "QUIET", students.QUIET | {"use_cpu": True, "bf16": False})
    patch.setattr("benchmarks.common.SMOKE", root)


@pytest.mark.long
@pytest.mark.slow
def test_a_cell_has_a_row_for_each_stage_and_says_where_it_comes_from(cells):
    alone = cells.pop(f"{SMOKE[0]}*")
    assert [row["row"] for row in alone["rows"]] == [students.ALONE]
    assert alone["budget"]["stage_2_alone"]["max_steps"] == 2 and alone["counterpart"] == "polaformer"
    assert set(cells) == set(SMOKE)
    for cell in cells.values():
        assert [row["row"] for row in cell["rows"]] == list(students.STAGES)
        assert all(0 <= row["head_accuracy"] <= 1 and row["teacher_head_accuracy"] > 0.8 for row in cell["rows"])
        assert cell["smoke"] and cell["seed"] == 0 and len(cell["commit"]) == 40
    assert len(cells["hedgehog + mixing, auto:1"]["rows"][1]["softmax_layers"]) == 1
    plain, auto = (cells[name]["rows"] for name in SMOKE[1:])
    assert plain[1]["seconds"] == auto[1]["seconds"]  # the same stage 1


@pytest.mark.long
@pytest.mark.slow
def test_fine_tuning_starts_from_any_stage_and_learns_from_the_fine_tuned_teacher(tmp_path, monkeypatch):
    in_folder(monkeypatch, tmp_path)
    names = ["softmax", "power + mixing"]
    for options in (["--methods", *names, "--stages", "converted"], ["--methods", names[1], "--with-teacher"]):
        monkeypatch.setattr(sys, "argv", ["finetuning", "--smoke", *options])
        finetuning.main()
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("finetuning-*.json")}
    assert set(found) == {
        f"finetuning-{name}-0" for name in ("softmax", "power-mixing-converted", "power-mixing-teacher")
    }
    figures = {name.split("-", 1)[1]: cell["rows"][0]["accuracy"] for name, cell in found.items()}
    # a fine-tuned teacher knows the digits already; a student that nothing aligned does not
    assert figures["softmax-0"] > 0.8 > figures["power-mixing-converted-0"]
    assert found["finetuning-power-mixing-teacher-0"]["with_teacher"]
    assert [path.name for path in (tmp_path / "students" / "softmax").iterdir() if path.is_dir()] == [
        "vit-digits-head-accuracy-1-0"
    ]


def test_the_softmax_model_is_fine_tuned_once_and_in_one_way():
    arguments = argparse.Namespace(protocol="digits", seeds=[0], smoke=True, with_teacher=True)
    arguments.methods, arguments.stages = ["softmax", "paper"], ["converted", "stage 1"]
    cells = [(cell.method, cell.stage, cell.with_teacher) for cell in finetuning.cells_of(arguments)]
    assert cells == [("softmax", "stages 1+2", False), ("paper", "converted", True), ("paper", "stage 1", True)]
    paths = {finetuning.Cell("dense", "paper", stage, told).path for stage in students.STAGES for told in (0, 1)}
    assert len(paths) == 6


def test_a_finished_cell_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "RESULTS", tmp_path)
    done = quality.Cell("digits", "paper").path
    done.parent.mkdir(parents=True)
    done.write_text("{}")
    run = []
    monkeypatch.setattr(quality, "run_cell", lambda cell: run.append((cell.method, cell.seed, cell.alone)))
    monkeypatch.setattr(sys, "argv", ["quality", "--methods", "paper", "elu", "--seeds", "0", "1"])
    quality.main()
    assert run == [("elu", 0, False), ("paper", 1, False), ("elu", 1, False)]
    quality.Cell("digits", "elu", alone=True).path.write_text("{}")
    run.clear()
    monkeypatch.setattr(sys, "argv", ["quality", "--methods", "paper", "elu", "--without-stage-1"])
    quality.main()
    assert run == [("paper", 0, True)]
    cells = quality.Cell("digits", "elu"), quality.Cell("digits", "elu", scale=0.4), quality.Cell("digits", "elu", 1)
    assert len({cell.path for cell in cells}) == 3


def test_stage_2_alone_sees_the_images_of_both_stages_and_of_no_method_that_needs_stage_1(monkeypatch, capsys):
    one, two = ({"max_steps": steps, "per_device_train_batch_size": size} for steps, size in ((100, 8), (120, 16)))
    protocol = replace(protocols.PROTOCOLS["digits"], stage_1=one, stage_2=two)
    assert students.Students(protocol, methods.METHODS["elu"], 0, None, None).budget_alone["max_steps"] == 170
    monkeypatch.setattr(sys, "argv", ["quality", "--without-stage-1"])
    assert {methods.METHODS[name].auto for name in quality.parse().methods} == {0}
    monkeypatch.setattr(sys, "argv", ["quality", "--without-stage-1", "--methods", "elu", SMOKE[2]])
    with pytest.raises(SystemExit):
        quality.parse()
    assert f"leave out {SMOKE[2]}" in capsys.readouterr().err


def test_a_scaled_protocol_has_more_steps_and_the_rest_as_it_was():
    protocol = protocols.PROTOCOLS["dense"]
    scaled = protocol.scaled(0.4)
    assert (scaled.stage_1["max_steps"], scaled.stage_2["max_steps"]) == (40, 48)
    assert scaled.with_settings(protocol.stage_1, protocol.stage_2) == protocol


class NoTrainer:
    """Stands for a stage that moves all parameters by one."""

    def __init__(self, student, *args, **kwargs):
        self.student = student

    def train(self):
        for parameter in self.student.parameters():
            parameter.data += 1

    def calibration_batches(self):
        return [torch.randn(2, 1, 28, 28)]


@pytest.mark.parametrize("name", ["polaformer", "power + mixing, auto:1"])
def test_a_student_comes_back_from_those_that_were_trained(name, tmp_path, teacher, monkeypatch):
    for kind in ("AttentionAlignmentTrainer", "FeatureAlignmentTrainer"):
        monkeypatch.setattr(students, kind, NoTrainer)
    data = SimpleNamespace(image_size=(28, 28), train_dataset=lambda seed: None)
    made = students.Students(protocols.PROTOCOLS["digits"], methods.METHODS[name], 0, teacher, data, tmp_path)
    one = made.after("stage 1")
    assert len(one.chosen.get("softmax_layers", [])) == methods.METHODS[name].auto
    trained = {stage: made.after(stage) for stage in students.STAGES}
    again = {stage: made.after(stage) for stage in students.STAGES}
    alone = made.after(students.ALONE) if not methods.METHODS[name].auto else trained["converted"]
    for stage, found in again.items():
        assert found.seconds == trained[stage].seconds and found.student is not trained[stage].student
        same = zip(found.student.state_dict().values(), trained[stage].student.state_dict().values(), strict=True)
        assert all(torch.equal(*pair) for pair in same)
    name = "embeddings.cls_token"
    token = {stage: found.student.get_parameter(f"vit.{name}") for stage, found in trained.items()}
    torch.testing.assert_close(token["stages 1+2"], token["converted"] + 2)
    assert trained["stages 1+2"].chosen.get("softmax_layers") == one.chosen.get("softmax_layers")
    if alone is not trained["converted"]:
        torch.testing.assert_close(alone.student.get_parameter(f"vit.{name}"), token["converted"] + 1)


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
        SupervisedConfig(**protocol.stage_3)


def cell(method: str, seed: int, final: float, rows: tuple[str, ...] = students.STAGES) -> dict:
    figures = {"cls_cosine": 0.9, "patches_cosine": 0.8, "teacher_mean_iou": 0.5, "seconds": 60.0}
    budget = {stage: {"max_steps": 1, "per_device_train_batch_size": 2} for stage in ("stage_1", "stage_2")}
    where = {"machine": "m", "commit": "c" * 40, "date": "2026-11-25 00:00", "bf16": False, "budget": budget}
    about = {"protocol": "dense", "metric": "student_mean_iou", "method": method, "seed": seed}
    return {**about, **where, "rows": [{"row": row, "student_mean_iou": final, **figures} for row in rows]}


def test_the_page_shows_means_over_seeds_by_kind_and_best_first(tmp_path, monkeypatch):
    found = [cell("paper", 0, 0.3), cell("hedgehog", 0, 0.4), cell("hedgehog", 1, 0.44), cell("relu + mixing", 0, 0.1)]
    found += [cell(name, 0, 0.25, rows=(students.ALONE,)) for name in ("hedgehog", "mala")]
    speeds = {"softmax": {1025: 1.0}, "paper": {1025: 1.5}, "hedgehog": {1025: 1.25}}
    rows = {row[1]: row for row in quality_page.rows_of(found, speeds)}
    ours, blocks, maps = (f"**{kind}**" for kind in methods.KINDS[:3])
    assert list(rows) == ["", "softmax", ours, "relu + mixing", blocks, "mala", maps, "hedgehog", "paper"]
    assert {len(row) for row in rows.values()} == {12}
    assert [rows[name][0] for name in ("hedgehog", "paper", "relu + mixing", "mala")] == ["1", "2", "3", ""]
    assert rows["hedgehog"][5:] == ["42.0% ± 2.8", "25.0%", "84.0%", "0.900", "0.800", "2", "1.25"]
    assert rows["paper"][5:8] == ["30.0%", "", "60.0%"] and rows["mala"][3:8] == ["", "", "", "25.0%", ""]
    text = quality_page.render(found, speeds, [])
    assert "CamVid, 168x224" in text and "1 and 1 steps of 2 images; float32; m; commits ccccccc" in text
    assert "stage 2 alone" in text and "stage 2 alone" not in quality_page.render(found[:3], speeds, [])
    quality_pictures.draw_speed({"paper": 0.6, "hedgehog": 0.84}, speeds, tmp_path / "quality.png")
    assert (tmp_path / "quality.png").stat().st_size > 5_000


def test_the_page_shows_the_time_of_training_and_what_fine_tuning_makes_of_it(tmp_path):
    name = quality_page.DEFAULT
    found = [cell(name, 0, 0.45), cell(name, 1, 0.47), cell(name, 0, 0.5) | {"scale": 4.0}]
    points = quality_pictures.curve_of(quality_page.of_default(found))
    assert [point["seeds"] for point in points] == [2, 1]
    assert quality_page.rows_of_curve(points)[1:] == [
        ["1", "4", *["92.0%"] * 3, "2"],
        ["1", "4", *["100.0%"] * 3, "1"],
    ]
    quality_pictures.draw_curve(points, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 5_000
    tuned = [
        {"protocol": "dense", "metric": "mean_iou", "method": method, "stage": stage, "with_teacher": told, "seed": 0}
        | {"rows": [{"mean_iou": figure}]}
        for method, stage, told, figure in (
            (name, "stages 1+2", False, 0.45),
            (name, "stages 1+2", True, 0.5),
            ("softmax", "stages 1+2", False, 0.5),
            (name, "converted", False, 0.4),
        )
    ]
    assert quality_page.rows_of_tuned(tuned)[1:] == [
        ["softmax", "", "50.0%", "100.0%", "", ""],
        [name, "converted", "40.0%", "80.0%", "", ""],
        [name, "stages 1+2", "45.0%", "90.0%", "50.0%", "100.0%"],
    ]
    text = quality_page.render(found, {}, tuned)
    assert "how much training is needed" in text and "fine-tuned at equal steps" in text
    main_table = text.partition("###")[2].partition("###")[0]
    assert "46.0% ± 1.4" in main_table  # the cells of other budgets are not in it


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
