"""Labels: all are read before any time is spent, and heads are scored on classes of the same name or not at all."""

import io
import logging
import re
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from training_helpers import LABELS, save_teacher, tiny_vit

from modeling_adala import DataError, UsageError, convert
from trainers import DataConfig, DataModule
from trainers.data.labels import SplitLabels, head_ids
from trainers.evaluation.comparison import Comparison
from vit_adala.cli import main

MODEL = SimpleNamespace(image_size=28, patch_size=7, num_channels=1)
NAMED = datasets.ClassLabel(names=LABELS)
NUMBERS = datasets.Value("int64")
GOOD = list(range(10)) * 2


def png(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (28, 28)).astype(np.uint8)).save(file, "png")
    return file.getvalue()


def rows(labels: list, feature=NUMBERS) -> datasets.Dataset:
    images = [{"bytes": png(seed), "path": None} for seed in range(len(labels))]
    features = datasets.Features(image=datasets.Image(), label=feature)
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


def opened(train, test=None, validation=None, required: bool = True, **settings) -> DataModule:
    splits = {"train": train, "test": test, "validation": validation}
    source = datasets.DatasetDict({name: part for name, part in splits.items() if part is not None})
    return DataModule(DataConfig(dataset=source, **settings), MODEL, require_labels=required)


# --- what a column holds ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int8", "int64", "uint8", "uint64"])
def test_column_is_read_whatever_its_integers(dtype):
    values = [3, None, 0, 3] if dtype.startswith("u") else [3, None, 0, 3, -1]
    labels = SplitLabels.read(
        datasets.Dataset.from_dict({"label": values}).cast_column("label", datasets.Value(dtype)), "label"
    )
    assert labels.numbers.tolist() == [0, 3] and labels.rows == len(values)
    assert labels.missing == len(values) - 3 and labels.first_missing == 1 and labels.is_labeled


def test_labels_of_a_slice_are_read_without_its_images():
    class Untouchable(datasets.Image):
        def decode_example(self, value, token_per_repo_id=None):
            raise AssertionError("decoded")

    table = rows(GOOD).cast_column("image", Untouchable()).select(range(3, 7))
    assert SplitLabels.read(table, "label").numbers.tolist() == [3, 4, 5, 6]


def test_label_column_of_each_split_is_read_once(monkeypatch):
    read, columns = SplitLabels.read, []
    monkeypatch.setattr(SplitLabels, "read", lambda raw, column: columns.append(str(raw.split)) or read(raw, column))
    DataModule(DataConfig(dataset="mnist-digits"), SimpleNamespace(image_size=28, patch_size=7, num_channels=1))
    assert sorted(columns) == ["test", "train"]


def test_classes_are_the_names_or_else_the_numbers(caplog):
    assert SplitLabels.read(rows([1, 1], NAMED), "label").classes() == LABELS
    assert SplitLabels.read(rows([2, 0, 1]), "label").classes() == ["0", "1", "2"]
    assert caplog.messages == []
    assert SplitLabels.read(rows([4, 0, 1]), "label").classes() == ["0", "1", "2", "3", "4"]
    assert caplog.messages == ["label_column='label': no row has class 2, 3 of 0 to 4"]


def test_few_rows_of_many_classes_are_no_mistake():
    assert len(SplitLabels.read(rows([999]), "label").classes()) == 1000


TRAINING = {  # case: labels, what the line says
    "one negative": ([0, 1, -1, 2], ["1 of 4 rows", "row 2"]),
    "one empty": ([0, None, 1], ["1 of 3 rows", "row 1"]),
    "all negative": ([-1, -1], ["no labels"]),
    "all empty": ([None, None], ["no labels"]),
    "a stray million": ([*GOOD, 1_000_000], ["1,000,000", "11 different", "21 rows", "class_encode_column"]),
    "a stray billion": ([*GOOD, 10**9], ["1,000,000,000", "class_encode_column"]),
}


@pytest.mark.parametrize("case", TRAINING)
@pytest.mark.parametrize("streaming", [False, True])
def test_training_labels_that_cannot_be_trained_on_are_refused_at_once(case, streaming):
    labels, words = TRAINING[case]
    with pytest.raises((DataError, UsageError)) as error:
        opened(rows(labels), rows(GOOD), streaming=streaming)
    message = str(error.value)
    assert "label_column='label'" in message and "\n" not in message
    assert streaming or all(word in message for word in words), message


EVALUATION = {  # case: training and evaluation labels, what the line says
    "one negative": (rows(GOOD), rows([0, -1]), ["1 of 2 rows", "row 1"]),
    "one empty": (rows(GOOD), rows([None, 3]), ["1 of 2 rows", "row 0"]),
    "a class too many": (rows(GOOD), rows([3, 11]), ["class 11", "10 classes"]),
    "another name": (rows(GOOD, NAMED), rows([0], datasets.ClassLabel(names=["cat"])), ["'cat'"]),
    "names for numbers": (rows(GOOD), rows([0], datasets.ClassLabel(names=["cat"])), ["'cat'"]),
}


@pytest.mark.parametrize("case", EVALUATION)
def test_evaluation_labels_that_the_model_would_lack_are_refused_at_once(case):
    train, test, words = EVALUATION[case]
    with pytest.raises(DataError) as error:
        opened(train, test)
    assert all(word in str(error.value) for word in ["label_column='label'", *words]), error.value


@pytest.mark.parametrize("case", EVALUATION)
def test_where_labels_are_not_required_those_that_do_not_fit_are_left_out(case, caplog):
    data = opened(*EVALUATION[case][:2], required=False)
    assert "label_column='label'" in caplog.text and "left out" in caplog.text
    assert data.num_eval_images > 0 and "labels" not in data.eval_dataset()[0]


@pytest.mark.parametrize("case", TRAINING)
def test_stages_without_labels_train_on_images_without_them(case, caplog):
    data = opened(rows(TRAINING[case][0]), rows(GOOD, NAMED), required=False)
    assert set(data.train_dataset(0)[0]) == {"pixel_values"} and not data.has_training_labels
    assert "left out" in caplog.text
    assert data.labels == LABELS and data.eval_dataset()[3]["labels"] == 3


def test_evaluation_labels_are_numbered_as_the_training_labels_are():
    order = ["c", "a", "b"]
    data = opened(
        rows([0, 1, 2], datasets.ClassLabel(names=["a", "b", "c"])),
        rows([0, 1, 2, 0], datasets.ClassLabel(names=order)),
    )
    assert data.labels == ["a", "b", "c"]
    dataset = data.eval_dataset()
    assert [dataset[index]["labels"] for index in range(4)] == [2, 0, 1, 2]
    fewer = opened(
        rows([0, 1, 2], datasets.ClassLabel(names=["a", "b", "c"])), rows([0, 0], datasets.ClassLabel(names=["b"]))
    )
    assert fewer.eval_dataset()[0]["labels"] == 1


# --- which split is evaluated ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("unlabeled", [[-1, -1], [None, None]], ids=["negative", "empty"])
@pytest.mark.parametrize("required", [True, False])
def test_split_with_labels_is_preferred(unlabeled, required, caplog):
    data = opened(rows(GOOD), rows(unlabeled), rows([1, 2, 3]), required=required)
    assert data.num_eval_images == 3 and "evaluating on 'validation'" in caplog.text
    caplog.clear()
    assert opened(rows(GOOD), rows([1, 2]), rows([1, 2, 3]), required=required).num_eval_images == 2
    assert not caplog.messages


def test_split_without_a_label_column_comes_last():
    assert (
        opened(rows(GOOD), rows([1, 2]).remove_columns("label"), rows([1, 2, 3]), required=False).num_eval_images == 3
    )


def test_without_any_labeled_split_images_are_evaluated_where_labels_are_not_required(caplog):
    data = opened(rows(GOOD), rows([-1, -1]), required=False)
    assert data.num_eval_images == 2 and "labels" not in data.eval_dataset()[0] and data.labels == LABELS
    assert "no k-NN" in caplog.text
    caplog.clear()
    assert opened(rows(GOOD), rows([-1, -1])).raw_eval is None and "no evaluation: split 'test'" in caplog.text
    with pytest.raises(DataError, match="no labels"):  # named by the user
        opened(rows(GOOD), rows([-1, -1]), eval_split="test")


# --- heads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "classes", "ids"),
    [
        (["cat", "dog"], ["cat", "dog"], [0, 1]),
        (["cat", "dog"], ["dog", "cat"], [1, 0]),
        (["Cat", "dog "], ["dog", "cat"], [1, 0]),
        (["cat", "dog", "cow"], ["cow", "dog"], [2, 1]),
        (["cat", "dog"], ["cat", "cow"], None),
        (["cat"], ["cat", "dog"], None),
        (["LABEL_0", "LABEL_1"], ["0", "1"], [0, 1]),
        (["LABEL_0", "LABEL_1"], ["cat", "dog"], None),
        (["cat", "dog"], ["0", "1"], None),
        (["crane", "crane", "cat"], ["crane", "crane", "cat"], [0, 1, 2]),
        (["crane", "crane", "cat"], ["cat", "crane"], None),
        (["crane", "crane", "cat"], ["cat"], [2]),
    ],
)
def test_head_is_matched_by_name(head, classes, ids):
    assert head_ids(dict(enumerate(head)), classes) == ids


@pytest.fixture(scope="module")
def classifier():
    """A head that tells the digits `"0"` to `"9"` better than chance would: by training on what it is shown."""
    torch.manual_seed(0)
    data = opened(rows(GOOD, NAMED), rows(GOOD, NAMED))
    images = torch.stack([data.eval_dataset()[index]["pixel_values"] for index in range(20)])
    model = tiny_vit()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model(images, labels=torch.tensor(GOOD)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def shown(names: list[str]) -> datasets.Dataset:
    """The images of `GOOD` under class numbers as another order of the names has them."""
    return rows([names.index(LABELS[label]) for label in GOOD], datasets.ClassLabel(names=names))


def test_head_is_scored_on_classes_in_any_order(classifier):
    plain = Comparison(classifier, opened(shown(LABELS), shown(LABELS))).classifier_accuracy(classifier)
    assert plain == 1.0
    turned = LABELS[3:] + LABELS[:3]
    assert Comparison(classifier, opened(shown(turned), shown(turned))).classifier_accuracy(classifier) == plain
    assert Comparison(classifier, opened(shown(LABELS), shown(turned))).classifier_accuracy(classifier) == plain


def test_head_with_more_classes_is_scored_on_those_of_the_data(classifier):
    few = shown(LABELS).filter(lambda label: label in (3, 7), input_columns="label")
    few = few.cast_column("label", NUMBERS).map(lambda row: {"label": [3, 7].index(row["label"])})
    few = few.cast_column("label", datasets.ClassLabel(names=["3", "7"]))
    assert len(few) == 4
    assert Comparison(classifier, opened(few, few)).classifier_accuracy(classifier) == 1.0


def test_head_with_other_classes_gets_no_figure(classifier, caplog):
    animals = datasets.ClassLabel(names=[f"animal {label}" for label in range(10)])
    data = opened(rows(GOOD, animals), rows(GOOD, animals))
    comparison = Comparison(classifier, data, knn_images=20)
    assert comparison.classifier_accuracy(classifier) is None
    (message,) = caplog.messages
    assert "no head accuracy" in message and "animal 0" in message and "10: 0, 1, 2" in message
    student = convert(classifier, check_parity=False)
    results = comparison(student)
    assert "head_accuracy" not in results and "student_knn_accuracy" in results
    assert len(caplog.messages) == 1  # told once


def test_unlabeled_images_give_features_and_no_accuracy_of_anything(classifier, caplog):
    comparison = Comparison(classifier, opened(rows(GOOD, NAMED), rows([-1] * 4, NUMBERS), required=False))
    results = comparison(convert(classifier, check_parity=False))
    assert "relative_error" in results and len(results["block_errors"]) == 2
    assert not [name for name in results if "accuracy" in name or "retention" in name]


# --- commands --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("labels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "cache")
        sets = {
            "good": (rows(GOOD, NAMED), rows(GOOD, NAMED)),
            "animals": (rows(GOOD, datasets.ClassLabel(names=[f"animal {n}" for n in range(10)])),) * 2,
            "negative": (rows([*GOOD, -1]), rows(GOOD)),
            "million": (rows([*GOOD, 10**6]), rows(GOOD)),
            "empty": (rows([None, *GOOD]), rows(GOOD)),
            "eval-empty": (rows(GOOD), rows([*GOOD, None])),
            "eval-big": (rows(GOOD), rows([11] * 4)),
            "eval-unlabeled": (rows(GOOD), rows([-1] * 4)),
        }
        for name, splits in sets.items():
            (root / name).mkdir()
            for split, table in zip(("train", "test"), splits, strict=True):
                table.to_parquet(root / name / f"{split}-00000-of-00001.parquet")
        teacher = save_teacher(root / "teacher")
        student = convert(teacher, check_parity=False)
        student.config.adala_stage = "feature-alignment"
        student.save_pretrained(root / "student")
        yield {path.name: str(path) for path in root.iterdir()}


def finetune(places: dict[str, str], name: str, out: Path) -> int:
    argv = ["finetune", places["student"], "--dataset", places[name], "--output-dir", str(out)]
    argv += ["--max-steps", "1", "--per-device-train-batch-size", "4", "--bf16", "false", "--use-cpu", "true"]
    return main([*argv, "--disable-tqdm", "true"])


@pytest.mark.parametrize("name", ["negative", "million", "empty", "eval-empty", "eval-big"])
def test_finetune_refuses_labels_in_one_line_before_it_trains(places, tmp_path, capsys, name):
    assert finetune(places, name, tmp_path / "out") == 1
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1 and "label_column='label'" in captured.err
    assert not (tmp_path / "out").exists()


def test_finetune_on_an_unlabeled_test_split_trains_and_reports_no_accuracy(places, tmp_path, capsys, caplog):
    assert finetune(places, "eval-unlabeled", tmp_path / "out") == 0
    assert "accuracy" not in capsys.readouterr().out and "no evaluation: split 'test'" in caplog.text
    assert (tmp_path / "out" / "config.json").is_file()


def test_evaluate_reports_no_accuracy_of_a_head_with_other_classes(places, capsys, caplog):
    caplog.set_level(logging.WARNING)
    for name, has_accuracy in (("good", True), ("animals", False)):
        argv = [places["student"], "--teacher", places["teacher"], "--dataset", places[name]]
        assert main(["evaluate", *argv, "--knn-images", "10", "--json"]) == 0
        assert bool(re.search(r'"(teacher_)?head_accuracy"', capsys.readouterr().out)) == has_accuracy
        assert ("no head accuracy" in caplog.text) != has_accuracy
