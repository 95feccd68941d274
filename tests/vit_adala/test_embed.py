"""`vit-adala embed`: the features of every image in one parquet file, the same one after a kill."""

import json
import re
from pathlib import Path

import datasets
import pytest
import torch
from datasets import load_dataset
from pyarrow import parquet
from training_helpers import save_teacher, tiny_dinov2
from transformers import ViTImageProcessorPil

from modeling_adala import convert, load_image_processor
from modeling_adala.conversion.loading import load_student, load_teacher
from modeling_adala.inspection.towers import forward_features
from trainers import DataConfig, DataModule, KNNAccuracy
from trainers.data.digits import load_digits
from trainers.evaluation import embeddings
from trainers.evaluation.probes import extract_features
from vit_adala.cli import main

COUNT = 20
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    """A teacher, a linear student, and digits in a folder of `datasets`, one of them broken."""
    root = tmp_path_factory.mktemp("embed")
    save_teacher(root / "teacher", layers=1)
    convert(tiny_dinov2(layers=1), check_parity=False).save_pretrained(root / "student")
    size = {"height": 28, "width": 28}
    ViTImageProcessorPil(size=size, image_mean=[0.5], image_std=[0.5]).save_pretrained(root / "student")
    images = load_digits("test").select(range(0, 1000, 1000 // COUNT))
    datasets.DatasetDict(train=images).save_to_disk(root / "digits")
    rows = images.cast_column("image", datasets.Image(decode=False)).to_list()
    rows[7]["image"] = {"bytes": b"no image", "path": None}
    datasets.Dataset.from_list(rows, features=images.features).save_to_disk(root / "broken")
    return root


@pytest.fixture
def run(places, tmp_path, monkeypatch, capsys):
    """Runs `embed` with batches of 4 in parts of 8 images; the exit code and what was said."""
    monkeypatch.setattr(embeddings, "_ROWS_PER_PART", 8)
    monkeypatch.setattr("vit_adala.commands.embed.evaluation_dtype", lambda: None)  # bfloat16 on some machines
    monkeypatch.chdir(tmp_path)

    def run(*options: str, model: str = "student", data: str = "digits", output: str = "a.parquet") -> tuple[int, str]:
        command = ["embed", str(places / model), str(places / data), "-o", output, "--batch-size", "4", *options]
        code = main(command)
        said = capsys.readouterr()
        return code, said.err.splitlines()[-1] if code else said.out

    return run


def opened(path: str, tmp_path: Path) -> datasets.Dataset:
    return load_dataset("parquet", data_files=path, split="train", cache_dir=str(tmp_path / "cache"))


def test_rows_are_the_features_of_the_images_with_their_labels(run, places, tmp_path):
    assert run("--patches", model="teacher") == (0, f"embedded {COUNT} images; saved a.parquet\n")
    rows = opened("a.parquet", tmp_path)
    source = datasets.load_from_disk(str(places / "digits"))["train"]
    assert rows.column_names == ["row", "label", "cls", "patch_mean", "patches"]
    assert rows.features["label"] == source.features["label"] and rows["label"][:] == source["label"][:]
    assert rows["row"][:] == list(range(COUNT))
    model = load_teacher(str(places / "teacher"))
    data = DataModule(DataConfig(str(places / "digits")), model.config, load_image_processor(str(places / "teacher")))
    images = torch.stack([example["pixel_values"] for example in data.bank_dataset()])
    with torch.no_grad():
        expected = forward_features(model, images)
    found = {name: rows.with_format("torch")[name][:] for name in ("cls", "patch_mean", "patches")}
    assert found["patches"].shape == (COUNT, 16, 32)
    torch.testing.assert_close(found["cls"], expected[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(found["patches"], expected[:, 1:], rtol=0, atol=1e-5)
    torch.testing.assert_close(found["patch_mean"], found["patches"].mean(dim=1), rtol=0, atol=1e-5)


def test_the_k_nn_of_the_docs_is_that_of_an_evaluation(run, places, tmp_path, monkeypatch, capsys):
    assert run(output="train.parquet")[0] == 0
    (tmp_path / "test.parquet").symlink_to("train.parquet")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text(), flags=re.S)
    (block,) = [block for block in blocks if "KNNAccuracy" in block]
    capsys.readouterr()
    exec(block, {})
    model = load_student(str(places / "student"))
    data = DataModule(DataConfig(str(places / "digits")), model.config, load_image_processor(str(places / "student")))
    bank = extract_features(model, data.loader(data.bank_dataset()))
    expected = KNNAccuracy(bank.cls, bank.labels).compute(predictions=bank.cls, references=bank.labels)
    assert capsys.readouterr().out == f"{expected}\n"


def test_a_killed_run_goes_on_and_leaves_the_same_file(run, tmp_path, monkeypatch):
    assert run(output="whole.parquet")[0] == 0
    assert parquet.ParquetFile("whole.parquet").num_row_groups == 3
    write, seen = embeddings.EmbeddingFile.write_part, []

    def killed(file, index, table):
        if index == 2:
            raise KeyboardInterrupt
        seen.append(index)
        write(file, index, table)

    with monkeypatch.context() as patch:
        patch.setattr(embeddings.EmbeddingFile, "write_part", killed)
        assert run(output="b.parquet")[0] == 130
    assert seen == [0, 1] and not Path("b.parquet").exists()
    assert sorted(path.name for path in Path("b.parquet.parts").iterdir()) == [
        *("part-000000.parquet", "part-000001.parquet", "settings.json")
    ]
    code, said = run("--dtype", "float16", output="b.parquet")
    assert code == 2 and "dtype='float32', not 'float16'" in said
    before = Path("b.parquet.parts/part-000001.parquet").stat().st_mtime_ns

    def kept(file, index, table):
        seen.append(index)
        assert Path("b.parquet.parts/part-000001.parquet").stat().st_mtime_ns == before
        write(file, index, table)

    with monkeypatch.context() as patch:
        patch.setattr(embeddings.EmbeddingFile, "write_part", kept)
        assert run(output="b.parquet")[0] == 0
    assert seen == [0, 1, 2]  # those that were done were not done again
    assert Path("b.parquet").read_bytes() == Path("whole.parquet").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"whole.parquet", "b.parquet"}


def test_a_second_call_does_nothing_and_other_settings_are_refused(run):
    assert run()[0] == 0
    before = Path("a.parquet").stat().st_mtime_ns
    assert run() == (0, "embed: already done, in a.parquet\n")
    code, said = run("--image-size", "14")
    assert code == 2 and "image_size='28x28', not '14x14'" in said
    assert Path("a.parquet").stat().st_mtime_ns == before


def test_a_broken_image_is_left_out_and_the_others_keep_their_numbers(run, tmp_path):
    code, said = run(data="broken")
    assert code == 1 and "1 of 20 images cannot be read" in said and not list(tmp_path.iterdir())
    code, said = run("--max-broken-fraction", "0.1", data="broken")
    assert code == 0 and "embedded 19 images, 1 left out as unreadable" in said
    rows = opened("a.parquet", tmp_path)
    assert rows["row"][:] == [*range(7), *range(8, COUNT)]
    assert rows["label"][:] == [label for row, label in enumerate(load_digits("test")["label"][::50]) if row != 7]


def test_float16_and_files_of_others(run, places, tmp_path):
    assert run("--dtype", "float16", "--split", "train[:4]")[0] == 0
    assert str(parquet.read_schema("a.parquet").field("cls").type) == "fixed_size_list<element: halffloat>[32]"
    datasets.Dataset.from_dict({"x": [1]}).to_parquet("theirs.parquet")
    code, said = run(output="theirs.parquet")
    assert code == 2 and "was not written by this command" in said
    Path("c.parquet.parts").mkdir()
    Path("c.parquet.parts/thesis.tex").write_text("the only copy")
    code, said = run(output="c.parquet")
    assert code == 2 and "'thesis.tex'" in said and Path("c.parquet.parts/thesis.tex").is_file()
    code, said = run(output=str(places / "digits" / "a.parquet"))
    assert code == 2 and "which is read" in said
    assert json.loads(parquet.read_schema("a.parquet").metadata[b"vit_adala"])["split"] == "train[:4]"
