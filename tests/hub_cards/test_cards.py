"""Model cards: what they say, where each number comes from, and that no record can make them say anything else.

After a wanted change of the card, rewrite the golden file:
`UPDATE_GOLDEN=1 python -m pytest tests/hub_cards/test_cards.py`
"""

import copy
import dataclasses
import itertools
import json
import os
import re
from collections import Counter
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml
from huggingface_hub import ModelCard, metadata_load
from markdown_it import MarkdownIt
from PIL import Image
from training_helpers import QUIET, NoiseImages, save_teacher, tiny_dinov2, tiny_vit
from transformers import ViTImageProcessorPil

import hub_cards.records
import trainers.report.report
from hub_cards import AdaLACardData, build_card, write_card
from hub_cards.card import render_card
from hub_cards.card_data import TAGS
from hub_cards.exports import OnnxExport
from hub_cards.records import EVALUATIONS, FIGURES
from hub_cards.usage import FOLDER, onnx_usage, usage
from modeling_adala import CheckpointError, UsageError, convert
from modeling_adala.conversion.loading import load_student
from modeling_adala.modeling_adala import MODELS
from trainers import FeatureAlignmentConfig, FeatureAlignmentTrainer, SupervisedConfig, SupervisedTrainer
from trainers.runs.stages import STAGES, run_stage
from vit_adala.cli import main

GOLDEN = Path(__file__).parent / "golden" / "model_card.md"
ONNX_GOLDEN = GOLDEN.with_name("onnx.md")
REVISION = "3f1c9a7d0b2e4f5a6c8d9e0f1a2b3c4d5e6f7a8b"
LAST = "3-supervised"


def facts() -> dict[str, Any]:
    """The records of a whole run, by file. Every number is its own, so that it can be found again."""
    figures = {
        "converted": (0.1517, None, 0.4127, 0.3021, 1.2093, 511, 1999),
        "attention-alignment": (0.6183, None, 0.9018, 0.9107, 0.4419, 511, 1999),
        "feature-alignment": (0.7021, None, 0.9643, 0.9711, 0.2873, 511, 1999),
        "supervised": (0.8137, 0.8461, 0.9529, 0.9387, 0.3361, 5003, 1999),
    }
    evaluations: dict[str, dict] = {"teacher": {"head_accuracy": 0.9731}}
    for name, (knn, probe, cls, patch, error, images, train_images) in figures.items():
        line = {"student_knn_accuracy": knn, "teacher_knn_accuracy": 0.8342}
        line |= {"cls_cosine": cls, "patch_mean_cosine": patch, "relative_error": error}
        line |= {"num_eval_images": images, "num_train_images": train_images, "block_errors": [0.1, 0.2]}
        if probe:
            line |= {"student_linear_probe_accuracy": probe, "teacher_linear_probe_accuracy": 0.8675}
            line["head_accuracy"] = 0.9617
        evaluations[name] = line
    settings = {"learning_rate": 0.00037, "max_steps": 457, "bf16": False}
    stages = {
        "attention-alignment": {"steps": 457, "images_per_step": 31, "seconds": 369.7, "settings": settings},
        "feature-alignment": {"steps": 389, "images_per_step": 17, "seconds": 433.1, "resumed_from_step": 61},
        "supervised": {"steps": 293, "images_per_step": 33, "seconds": 1241.0, "resumed_from_step": 0},
    }
    for record in stages.values():
        record |= {"images": "40,009 images, 3 skipped as unreadable", "dataset": "org/digits", "machine": "AMD EPYC"}
    manifest = {
        "teacher_license": {"license": "apache-2.0"},
        "teacher_sha256": "34463929fb84",
        "dataset": "org/digits",
        "dataset_id": "org/digits",
        "eval_split": "test",
        "image_size": 56,
        "data_fingerprint": "b6a5b73ba6d2ad5e",
        "versions": {"vit-adala": "0.1.0", "torch": "2.13.0+cpu"},
        "stages": stages,
        "evaluations": evaluations,
    }
    rows = [
        {"size": 112, "tokens": 65, "teacher": 0.0375, "student": 0.0629},
        {"size": 448, "tokens": 1025, "teacher": 0.4023, "student": 0.2945},
    ]
    for row, megabytes in zip(rows, (7, 19)):
        row |= {"teacher_bytes": megabytes * 2**20, "student_bytes": 3.3 * megabytes * 2**20}
    speed = {"machine": "AMD EPYC, 2 cores", "batch_size": 1, "autocast": "bfloat16", "teacher_attention": "sdpa"}
    return {"manifest": manifest, "speed": speed | {"rows": rows}}


def config(architecture: str = "AdaLADinov2ForImageClassification", **changes) -> dict[str, Any]:
    family = next(f for f in MODELS.values() if architecture in {cls.__name__ for cls in f.values()})
    values = family["Model"].config_class().to_dict() | {"architectures": [architecture]}
    if "Classification" in architecture:
        values["id2label"] = {0: "cat", 1: "dog"}
        values["label2id"] = {"cat": 0, "dog": 1}
    known = {
        "teacher_name_or_path": "facebook/dinov2-small",
        "teacher_revision": REVISION,
        "adala_stage": "supervised",
    }
    values.get("vision_config", values).update(known | changes)
    return values


def write(out: Path, records: dict[str, Any], folder: str = LAST, **changes) -> Path:
    """A run folder with one stage folder. Returns the stage folder."""
    directory = out / folder
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config(**changes)))
    (directory / "preprocessor_config.json").write_text("{}")
    if "manifest" in records:
        (out / "manifest.json").write_text(json.dumps(records["manifest"]))
    if "speed" in records:
        (out / "speed.json").write_text(json.dumps(records["speed"]))
        for name in ("speed.png", "features.png", "blocks.png", "holiday.png"):
            (out / name).write_bytes(b"\x89PNG")
    return directory


@pytest.fixture
def whole(tmp_path) -> Path:
    return write(tmp_path / "out", facts())


def body(card: ModelCard) -> str:
    return card.text


def front_matter(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


# --- what a card says ------------------------------------------------------------------------------------------------


def test_whole_card(whole):
    card = str(build_card(whole, "org/vit-adala-digits"))
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(card)
    assert card == GOLDEN.read_text()


def onnx_exports(folder: Path) -> list[OnnxExport]:
    """A graph in float32 with its weights in a file of their own, and one in int8 of one size."""
    for name, size in {"model.onnx": 1_000, "model.onnx_data": 2_199_000, "model_quantized.onnx": 640_000}.items():
        (folder / name).write_bytes(bytes(size))
    accuracy = {"head_accuracy": [0.9617, 0.9583]}
    files = [folder / "model.onnx", folder / "model.onnx_data"]
    return [
        OnnxExport(files, "float32", difference=4.13e-06),
        OnnxExport([folder / "model_quantized.onnx"], "int8", ["56x56"], 1, 0.137, accuracy),
    ]


def test_onnx_section_is_there_with_an_export_and_only_then(whole, tmp_path):
    data = AdaLACardData.from_checkpoint(whole, "org/vit-adala-digits")
    card = str(render_card(dataclasses.replace(data, exports=onnx_exports(tmp_path))))
    before, section, after = re.split(r"(## ONNX\n.*?)(?=## Results\n)", card, flags=re.S)
    if os.environ.get("UPDATE_GOLDEN"):
        ONNX_GOLDEN.write_text(section)
    assert section == ONNX_GOLDEN.read_text()
    assert before + after == GOLDEN.read_text()


def test_metadata_are_what_the_hub_reads(whole):
    path = write_card(whole, "org/vit-adala-digits")
    metadata = metadata_load(path)
    index = metadata.pop("model-index")
    assert metadata == {
        "library_name": "transformers",
        "pipeline_tag": "image-classification",
        "base_model": "facebook/dinov2-small",
        "base_model_relation": "finetune",
        "license": "apache-2.0",
        "tags": TAGS,
        "datasets": ["org/digits"],
        "metrics": ["accuracy"],
    }
    assert index[0]["name"] == "vit-adala-digits"
    (result,) = index[0]["results"]
    assert result["dataset"] == {"name": "org/digits", "type": "org/digits", "split": "test"}
    assert [metric["value"] for metric in result["metrics"]] == [0.9617, 0.8137, 0.8461]
    card = ModelCard.load(path)
    assert len(card.data.eval_results) == 3 and str(card) == path.read_text()


def test_teacher_in_a_folder_is_no_base_model_and_its_path_stays_at_home(tmp_path):
    directory = write(tmp_path, {}, teacher_name_or_path="/home/alice/models/my-vit", teacher_revision=None)
    card = build_card(directory)
    assert card.data.base_model is None and "base_model_relation" not in card.data
    assert "`my-vit`" in card.text and "alice" not in str(card)


def test_data_in_a_folder_are_no_dataset_of_the_hub(tmp_path):
    records = facts()
    records["manifest"] |= {"dataset": "../shared/data/cifar10", "dataset_id": None}
    for record in records["manifest"]["stages"].values():
        record["dataset"] = "../shared/data/cifar10"
    card = build_card(write(tmp_path, records))
    assert card.data.datasets is None
    assert {(result.dataset_type, result.dataset_name) for result in card.data.eval_results} == {("custom", "cifar10")}
    assert "cifar10" in card.text and "shared" not in card.text


@pytest.mark.parametrize("architecture", [c.__name__ for family in MODELS.values() for c in family.values()])
def test_every_class_has_its_task_and_an_example_that_opens_it(tmp_path, architecture):
    expected = {"ForImageClassification": "image-classification", "ForSemanticSegmentation": "image-segmentation"}
    data = AdaLACardData.from_checkpoint(write(tmp_path, {}, architecture=architecture))
    both_towers = "vision_config" in config(architecture) and architecture.endswith("Model")
    tag = next((expected[end] for end in expected if architecture.endswith(end)), "image-feature-extraction")
    tag = None if architecture.endswith("ForMaskedImageModeling") else tag
    assert data.metadata().pipeline_tag == ("zero-shot-image-classification" if both_towers else tag)
    for text in (usage(data), usage(data, trust_remote_code=True)):
        compile(text, "usage", "exec")
    exported = dataclasses.replace(data, repo_id="org/model", exports=onnx_exports(tmp_path))
    assert "onnx/model.onnx_data" in onnx_usage(exported)
    compile(onnx_usage(exported), "usage", "exec")
    if data.head.auto_class.startswith("Auto"):
        auto = getattr(transformers, data.head.auto_class)
        assert auto._model_mapping[type(data.config)].__name__ == architecture
    else:  # a head that no Auto class opens, such as CLIP's projection
        assert data.head.auto_class == architecture


@pytest.mark.parametrize("head", ["Model", "ForImageClassification"])
def test_example_runs_as_it_is_pasted(tmp_path, monkeypatch, head):
    student = convert(tiny_vit(), head="ForImageClassification", check_parity=False)
    if head == "Model":
        student = convert(tiny_dinov2(), check_parity=False)
    student.save_pretrained(tmp_path)
    size = {"height": 28, "width": 28}
    ViTImageProcessorPil(size=size, image_mean=[0.5], image_std=[0.5]).save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    Image.new("L", (40, 40)).save("image.jpg")
    text = write_card(tmp_path).read_text()
    example = re.search(r"```python\n(.*?)```", text, flags=re.S)[1].replace(FOLDER, str(tmp_path))
    names: dict[str, Any] = {}
    exec(example.replace("print(", "printed = ("), names)
    assert names["features"].shape == (1, 17, 32) if head == "Model" else names["printed"] in "0123456789"


def test_card_tells_how_far_a_model_is_trained(tmp_path):
    texts = {stage: body(build_card(write(tmp_path, {}, adala_stage=stage))) for stage in (None, "converted", *STAGES)}
    assert len(set(texts.values())) == len(texts)
    assert "not trained" in texts["converted"] and "stage 1 of 3" in texts["attention-alignment"]


def test_softmax_layers_are_named(tmp_path):
    text = body(build_card(write(tmp_path, {}, softmax_layers=[3, 11])))
    assert "all layers but 3, 11" in text


def test_local_mixing_is_named_where_there_is_some(tmp_path):
    text = body(build_card(write(tmp_path, {}, local_mixing=5)))
    assert "\n| Local mixing | 5x5 depthwise convolution of the values |\n| Size |" in text
    text = body(build_card(write(tmp_path, {}, dynamic_mixing=True)))
    assert "3x3 depthwise convolution of the values, with a kernel of each image's own |\n" in text
    assert "Local mixing" not in body(build_card(write(tmp_path, {}, local_mixing=0)))


# --- where it comes from ---------------------------------------------------------------------------------------------


def numbers_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?", text))


def leaves(record: Any) -> list[Any]:
    if isinstance(record, dict):
        return [leaf for key in record for leaf in [key, *leaves(record[key])]]
    return [leaf for value in record for leaf in leaves(value)] if isinstance(record, list) else [record]


def test_every_number_is_on_record(whole, tmp_path):
    without_records = body(build_card(write(tmp_path / "bare", {}), "org/bare"))
    records = facts()
    recorded = [leaf for name in records for leaf in leaves(records[name])] + leaves(config())
    known = numbers_in(without_records)
    for leaf in recorded:
        if isinstance(leaf, str):
            known |= numbers_in(leaf)
        elif isinstance(leaf, int | float) and not isinstance(leaf, bool):
            known |= {
                f"{leaf:.1%}"[:-1],
                f"{leaf:.4f}",
                f"{leaf:.3f}",
                f"{leaf:,.0f}",
                f"{leaf:.0f}",
                json.dumps(leaf),
            }
            known |= {f"{1e3 * leaf:.1f}", f"{leaf / 2**20:,.1f}"}
    known |= {f"{row['teacher'] / row['student']:.2f}" for row in records["speed"]["rows"]}
    known.add(str(389 + 61))  # steps of a resumed stage, before and after
    shown = numbers_in(body(build_card(whole, "org/bare")))
    assert len(shown - numbers_in(without_records)) > 50
    assert shown <= known, shown - known


def paths_in(record: Any, path: tuple = ()) -> list[tuple]:
    items = record.items() if isinstance(record, dict) else enumerate(record) if isinstance(record, list) else ()
    return [deeper for key, value in items for deeper in [(*path, key), *paths_in(value, (*path, key))]]


@pytest.mark.parametrize("damage", ["missing", "unfit"])
def test_a_fact_that_is_missing_or_unfit_leaves_its_line_out(tmp_path, damage):
    unfit = itertools.cycle([None, "x", [1, [2]], float("nan"), {"y": {}}])
    records = facts()
    for path in paths_in(records):
        changed = copy.deepcopy(records)
        target = changed
        for key in path[:-1]:
            target = target[key]
        if damage == "missing":
            del target[path[-1]]
        else:
            target[path[-1]] = next(unfit)
        text = str(build_card(write(tmp_path, changed)))
        assert front_matter(text)["library_name"] == "transformers"
        assert "settings" in path or not re.search(r"\b(None|nan|null)\b", text), path


def test_without_any_record_the_card_is_about_the_model_alone(tmp_path):
    card = build_card(write(tmp_path, {}, teacher_name_or_path=None, teacher_revision=None))
    assert re.findall("^## (.*)", card.text, flags=re.M) == ["Usage", "Limits", "Citation"]
    assert set(card.data.to_dict()) == {"library_name", "pipeline_tag", "tags", "model_name"}


def test_records_of_the_run_count_only_for_its_own_stage_folders(tmp_path):
    first = body(build_card(write(tmp_path, facts(), "1-attention-alignment", adala_stage="attention-alignment")))
    assert "61.8%" in first and "82%" not in first and "feature alignment |" not in first and "1,241" not in first
    for name in ("control-feature-alignment", "model", "4-quantized"):
        text = body(build_card(write(tmp_path, facts(), name, adala_stage="feature-alignment")))
        assert "## Training" not in text and "## Results" not in text and "png" not in text


def test_records_in_the_folder_itself_come_first(whole):
    own = {"student_knn_accuracy": 0.7777, "teacher_knn_accuracy": 0.8888, "num_eval_images": 321}
    (whole / "evaluation.json").write_text(json.dumps(own))
    (whole / "manifest.json").write_text(json.dumps({"stages": {"supervised": {"steps": 4321}}}))
    text = body(build_card(whole))
    assert "| k-NN accuracy | 88.9% | 77.8% |" in text and "96.2%" not in text.split("## Training")[0]
    assert "4,321" in text and "450" in text and "293" not in text


def test_rows_and_columns_of_cards_and_reports_come_from_one_table(tmp_path):
    assert [name for name in EVALUATIONS if name not in ("teacher", "converted", "control")] == list(STAGES)
    manifest = facts()["manifest"]
    shown = trainers.report.report.summary_table(manifest["evaluations"], manifest)
    assert [row[0] for row in shown[1:]] == [EVALUATIONS[name] for name in manifest["evaluations"]]
    known = [figure for figure in FIGURES if not figure.student.endswith("mean_iou")]  # of masks
    assert shown[0][1:-2] == [figure.heading for figure in known]
    text = body(build_card(write(tmp_path, facts())))
    history = text.split("## Training")[1]
    assert all(f"| {EVALUATIONS[name]} |" in history for name in ("converted", *STAGES))
    assert all(figure.name in history for figure in known)


def test_unreadable_record_counts_as_missing(whole):
    (whole.parent / "speed.json").write_text("{")
    text = body(build_card(whole))
    assert "## Results" in text and "## Speed" not in text and "## Training" in text
    (whole.parent / "manifest.json").write_text('{"stages": {"supervised": {')
    text = body(build_card(whole))
    assert "## Results" not in text and "## Training" not in text


def test_pictures_lie_beside_the_card_on_the_hub_and_where_they_are_at_home(whole):
    (whole / "features.png").write_bytes(b"\x89PNG own")
    (whole.parent / "alignment.png").symlink_to(GOLDEN)
    pictures = AdaLACardData.from_checkpoint(whole).pictures
    assert sorted(pictures) == sorted(
        [whole / "features.png", whole.parent / "speed.png", whole.parent / "blocks.png"]
    )
    hub, home = str(build_card(whole)), write_card(whole).read_text()
    assert all(f"]({name})" in hub for name in ("features.png", "speed.png", "blocks.png"))
    assert "](features.png)" in home and "](../speed.png)" in home
    assert "holiday" not in hub and "alignment.png" not in hub


def test_license_is_that_of_the_teacher_unless_one_is_stated(tmp_path):
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    front = {"license": "other", "license_name": "my-license", "license_link": "LICENSE", "tags": ["x"]}
    (teacher / "README.md").write_text(f"---\n{yaml.safe_dump(front)}---\n# A teacher\n")
    directory = write(tmp_path, {}, teacher_name_or_path=str(teacher), teacher_revision=None)
    card = build_card(directory)
    assert (card.data.license, card.data.license_name, card.data.license_link) == ("other", "my-license", "LICENSE")
    assert "my-license, that of its teacher" in card.text
    stated = ModelCard.load(write_card(directory, license="mit", tags=["digits"], language="en"))
    assert stated.data.license == "mit" and stated.data.license_name is None and stated.data.language == "en"
    assert stated.data.tags == [*TAGS, "digits"] and "teacher" not in stated.text.split("## License")[1][:20]


# --- hostile records -------------------------------------------------------------------------------------------------

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "{{ 7 * 7 }} {% for x in () %} {# #}",
    "[click](javascript:alert) ![](http://e.vil/x.png)",
    "a\n---\nlicense: mit\n---\n# b\n\n- c",
    "../../etc/passwd",
    "| a | b |\n| --- | --- |",
    "`` ` ``` code` *b* _i_ ~~s~~ **x**",
    "&lt;b&gt; &#60; \\<b> \\",
    "'\"; yaml: [x, {y: *z}] !!python/object:os.system #",
    "\u202egnp.exe\x00\x1b[31m\u2028line",
]


def structure(text: str) -> tuple[Counter, str]:
    """How often each Markdown element occurs, and all visible text."""
    tokens = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(text)
    flat = [child for token in tokens for child in [token, *(token.children or [])]]
    shown = "".join(token.content for token in flat if not token.children)
    kinds = Counter(token.type for token in flat if token.type not in ("text", "softbreak"))
    return kinds, shown


def everywhere(text: str, out: Path) -> ModelCard:
    """The card of a run in which every text that is not a name of ours is this one."""
    records = facts()

    def replaced(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: replaced(item) for key, item in value.items()}
        return [replaced(item) for item in value] if isinstance(value, list) else text if type(value) is str else value

    manifest = replaced(records["manifest"])
    manifest["versions"][text] = text
    manifest["stages"]["attention-alignment"]["settings"] = {text: text}
    manifest["stages"] = {text: {"steps": 5, "dataset": text}} | manifest["stages"]
    records |= {"manifest": manifest, "speed": replaced(records["speed"])}
    labels = {"id2label": {0: text, 1: "dog"}, "label2id": {text: 0, "dog": 1}}
    return build_card(write(out, records, teacher_name_or_path=text, teacher_revision=text, **labels))


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_plain_text(tmp_path, text):
    card, harmless = everywhere(text, tmp_path / "hostile"), everywhere("harmless", tmp_path / "harmless")
    assert set(card.data.to_dict()) <= set(harmless.data.to_dict())
    assert card.data.base_model is None and card.data.datasets is None and len(str(card).split("\n---\n")) == 2
    kinds, shown = structure(card.text)
    expected, _ = structure(harmless.text)
    expected["link_open"] -= 1  # "harmless" is a valid Hub id, hence a link and no code
    expected["link_close"] -= 1
    expected["code_inline"] += kinds["code_inline"] - expected["code_inline"]
    assert +kinds == +expected
    line = "".join(character for character in " ".join(text.split()) if character.isprintable())
    assert line in shown or line.replace("|", "&#124;") in shown
    assert "49" not in numbers_in(card.text.replace("[", " "))
    again = front_matter(str(card))
    assert again["license"] == line and again["model-index"][0]["results"][0]["dataset"]["split"] == line


def test_repo_id_that_is_none_opens_nothing(whole):
    for name in ('x"); import os; ("', "a/b/c", "../x"):
        assert name not in str(build_card(whole, name))


# --- writing ---------------------------------------------------------------------------------------------------------


def test_card_that_would_not_change_is_not_touched(whole):
    path = write_card(whole)
    before = {p: p.stat().st_mtime_ns for p in (whole, path)}
    assert write_card(whole) == path
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert sorted(p.name for p in whole.iterdir()) == ["README.md", "config.json", "preprocessor_config.json"]


def test_card_that_cannot_be_written_leaves_the_old_one(whole, monkeypatch):
    path = write_card(whole)
    before = path.read_text()
    (whole / "evaluation.json").write_text(json.dumps({"cls_cosine": 0.5}))

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub_cards.records.os, "replace", full)
    with pytest.raises(CheckpointError, match=r"README\.md"):
        write_card(whole)
    assert path.read_text() == before and not (whole / ".README.md.writing").exists()


def test_folder_of_a_softmax_model_is_refused_in_one_line(tmp_path):
    with pytest.raises((CheckpointError, UsageError)) as caught:
        build_card(save_teacher(tmp_path / "teacher"))
    assert "\n" not in str(caught.value) and "AdaLA" in str(caught.value)


# --- who writes it ---------------------------------------------------------------------------------------------------


def classifier(source=None):
    student = convert(source or tiny_vit(), check_parity=False)
    return student


def test_trainer_writes_this_card_with_its_own_facts(tmp_path):
    args = SupervisedConfig(output_dir=str(tmp_path), max_steps=2, eval_strategy="steps", eval_steps=1, **QUIET)
    data = {"train_dataset": NoiseImages(32), "eval_dataset": NoiseImages(8, seed=3)}
    trainer = SupervisedTrainer(model=classifier(), args=args, **data)
    trainer.train()
    trainer.create_model_card(license="mit", tags="digits", model_name="x")
    card = ModelCard.load(tmp_path / "README.md")
    accuracy = [line["eval_accuracy"] for line in trainer.state.log_history if "eval_accuracy" in line][-1]
    assert [result.metric_value for result in card.data.eval_results or []] in ([], [accuracy])
    assert card.data.license == "mit" and card.data.tags == [*TAGS, "digits"]
    assert f"| Accuracy | {accuracy:.1%} |" in card.text and "32 images" in card.text
    assert "generated_from_trainer" not in str(card)
    recorded = json.loads((tmp_path / "manifest.json").read_text())["stages"]["supervised"]
    assert recorded["steps"] == 2 and recorded["settings"]["learning_rate"] == 3e-5


def test_trainer_of_a_softmax_model_writes_the_stock_card(tmp_path):
    args = SupervisedConfig(output_dir=str(tmp_path), max_steps=1, **QUIET)
    trainer = SupervisedTrainer(model=tiny_vit(), args=args, train_dataset=NoiseImages(16))
    trainer.train()
    trainer.create_model_card()
    assert "generated_from_trainer" in (tmp_path / "README.md").read_text()


class FakeHub:
    """Notes what the folder holds whenever it is uploaded."""

    def __init__(self):
        self.uploads: list[dict[str, str]] = []

    def create_repo(self, name, **kwargs):
        return type("Url", (), {"repo_id": f"org/{name}"})

    def upload_folder(self, folder_path, **kwargs):
        found = {path.name: path for path in Path(folder_path).rglob("*") if path.is_file() or path.name == ".writing"}
        self.uploads.append({name: path.read_text() if name == "README.md" else "" for name, path in found.items()})
        finished: Future = Future()
        finished.set_result(None)
        return finished


@pytest.mark.parametrize("strategy", ["end", "every_save"])
def test_push_of_a_trainer_takes_this_card_along(tmp_path, monkeypatch, strategy):
    hub = FakeHub()
    monkeypatch.setattr("transformers.trainer.hf_api", lambda *args, **kwargs: hub)
    options = {"push_to_hub": True, "hub_strategy": strategy, "hub_always_push": True, "save_steps": 1}
    args = FeatureAlignmentConfig(
        output_dir=str(tmp_path / "x"), max_steps=2, calibration_images=8, **options, **QUIET
    )
    data = NoiseImages(32, labels=False)
    teacher = tiny_dinov2()
    trainer = FeatureAlignmentTrainer(classifier(tiny_dinov2()), teacher, args, train_dataset=data)
    trainer.train()
    trainer.push_to_hub()
    assert len(hub.uploads) == (1 if strategy == "end" else 3)
    for step, upload in enumerate(hub.uploads, start=1):
        assert {"README.md", "model.safetensors", "config.json", "manifest.json"} <= set(upload)
        assert ".writing" not in upload  # the upload goes on while the next checkpoint is being written
        assert '"org/x"' in upload["README.md"]
        assert f"| {min(step, 2) if strategy == 'every_save' else 2} |" in upload["README.md"]


def test_stage_folder_appears_with_its_card_and_knows_the_stages_before(tmp_path):
    teacher = save_teacher(tmp_path / "teacher")
    (Path(teacher) / "README.md").write_text("---\nlicense: bsd-3-clause\n---\n")
    student = convert(teacher, check_parity=False)
    for name in ("attention-alignment", "feature-alignment"):
        directory = tmp_path / STAGES[name].directory
        args = STAGES[name].config_class(output_dir=str(directory), max_steps=1, calibration_images=8, **QUIET)
        kwargs = {"teacher_model": teacher, "train_dataset": NoiseImages(16)}
        run_stage(STAGES[name], student, args, facts={"dataset": "noise", "image_size": 28}, **kwargs)
        student = load_student(str(directory))
    recorded = json.loads((directory / "manifest.json").read_text())
    assert list(recorded["stages"]) == ["attention-alignment", "feature-alignment"]
    card = ModelCard.load(directory / "README.md")
    assert card.data.license == "bsd-3-clause" and card.data.pipeline_tag == "image-classification"
    assert "| stage 1, attention alignment | noise |" in card.text
    assert "| stage 2, feature alignment | noise |" in card.text


def test_recipe_leaves_a_card_with_results_in_every_stage_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(
        trainers.report.report, "measure_speed", partial(trainers.report.report.measure_speed, budget=0.0)
    )
    teacher, out = save_teacher(tmp_path / "teacher"), tmp_path / "out"
    steps = [f"{name.replace('-', '_')}.{item}" for name in STAGES for item in ("max_steps=1", "use_cpu=true")]
    flags = {"teacher": teacher, "output-dir": out, "dataset": "mnist-digits", "train-split": "train[:32]"}
    flags |= {"image-size": 28, "knn-images": 16, "eval-images": 16}
    command = ["run", *(str(part) for name, value in flags.items() for part in (f"--{name}", value))]
    assert main([*command, *(part for step in steps for part in ("--set", step))]) == 0
    evaluations = json.loads((out / "manifest.json").read_text())["evaluations"]
    assert list(evaluations) == [name for name in EVALUATIONS if name != "control"]
    for stage in STAGES.values():
        card = ModelCard.load(out / stage.directory / "README.md")
        line = evaluations[stage.name]
        values = {result.metric_name: result.metric_value for result in card.data.eval_results}
        assert values["k-NN accuracy"] == line["student_knn_accuracy"]
        assert values["Accuracy"] == line["head_accuracy"]
        assert "## Speed and memory" in card.text and "](../speed.png)" in card.text
        assert "`mnist-digits`, split `test`, at 28 pixels" in card.text
    rows = json.loads((out / "speed.json").read_text())["rows"]
    assert rows and all(f"| {1e3 * row['student']:.1f} |" in card.text for row in rows)
