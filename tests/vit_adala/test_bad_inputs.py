"""Bad inputs: exit code 1 or 2, one line that names the argument and the remedy, and nothing written anywhere.

The table is in bad_inputs.txt. A row runs in this process, in a folder that holds everything it names (`places`).
"""

import dataclasses
import hashlib
import json
import logging
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from safetensors.torch import load_file, save_file
from training_helpers import save_teacher
from transformers import BertConfig, PreTrainedModel, SwinConfig

from modeling_adala import convert
from trainers.base_config import RANGES
from trainers.data.digits import load_digits
from trainers.runs.stages import STAGES
from vit_adala.cli import COMMANDS, main

# what a recipe holds, and parts of the line

RECIPES = {
    "duplicate": ("teacher: a\nseed: 1\nseed: 2\n", "'duplicate.yaml'; 'seed' is given twice in line 3"),
    "duplicate-inside": ("supervised: {seed: 1, seed: 2}\n", "'seed' is given twice in line 1"),
    "alias": ("a: &x [1]\nb: *x\n", "aliases such as *x; line 2"),
    "bomb": (
        "feature_map_kwargs:\n  a0: &a0 [x, x, x]\n"
        + "".join(f"  a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)),
        "aliases such as *a0; line 3",
    ),
    "deep": ("feature_map_kwargs: " + "[" * 2000 + "]" * 2000, "nested more than 20 deep"),
    "binary": ("teacher: !!binary aGVsbG8=\n", "!!binary; not supported"),
    "object": ("teacher: !!python/object/apply:os.system [id]\n", "!!python; not supported"),
    "set": ("stages: !!set {supervised}\n", "!!set; not supported"),
    "list": ("- teacher\n", "name: value"),
    "empty": ("", "name: value"),
    "text": ("teacher", "name: value"),
    "open": ("teacher: [1, 2\nx", "could not be read; line 2"),
    "tab": ("teacher:\n\tx: 1\n", "could not be read; line 2"),
    "two": ("teacher: a\n---\nteacher: b\n", "another document"),
    "control": ("teacher: a\x00b\n", "could not be read"),
    "latin": (b"teacher: caf\xe9\n", "could not be read"),
    "long": ("#" * 200_000, "100,000 characters"),
    "digits": ("seed: " + "9" * 5000, "could not be read"),
    "typo": ("teacher: a\nleraning_rate: 1\n", "'leraning_rate'; vit-adala run --help"),
    "near": ("teacher: a\nknn_image: 1\n", "'knn_image'; did you mean 'knn_images'?"),
    "number-for-text": ("teacher: 7\ndataset: digits\n", "teacher=7; put it in quotes"),
    "text-for-number": ("teacher: teacher\ndataset: digits\nseed: many\n", "seed='many'; must be an integer"),
    "true-for-number": ("teacher: teacher\ndataset: digits\nseed: true\n", "seed=True; must be an integer"),
    "nan": ("teacher: teacher\ndataset: digits\nknn_images: .nan\n", "knn_images=nan; must be an integer"),
    "section-nan": (
        "teacher: teacher\ndataset: digits\nattention_alignment: {learning_rate: .nan}\n",
        "attention_alignment.learning_rate=nan; finite",
    ),
    "section-zero": (
        "teacher: teacher\ndataset: digits\nfeature_alignment: {save_steps: 0}\n",
        "feature_alignment.save_steps=0; above 0",
    ),
    "section-list": ("teacher: teacher\ndataset: digits\nsupervised: [1]\n", "supervised=[1]; must be a mapping"),
    "section-fsdp": (
        "teacher: teacher\ndataset: digits\nsupervised: {fsdp: full_shard}\n",
        "supervised.fsdp; accelerate launch",
    ),
    "section-token": (
        "teacher: teacher\ndataset: digits\nattention_alignment: {hub_token: hf_abc}\n",
        "attention_alignment.hub_token; hf auth login",
    ),
    "section-resume": (
        "teacher: teacher\ndataset: digits\nattention_alignment: {resume_from_checkpoint: x}\n",
        "attention_alignment.resume_from_checkpoint; resumes by itself",
    ),
    "section-push": (
        "teacher: teacher\ndataset: digits\nsupervised: {push_to_hub: true}\n",
        "supervised.push_to_hub; vit-adala push",
    ),
    "unknown-map": ("teacher: teacher\ndataset: digits\nfeature_map: gelu\n", "feature_map='gelu'; elu, hedgehog"),
}


def read_rows(path: Path) -> dict[str, list[tuple[str, int, list[str]]]]:
    """By section: command line, exit code and the parts of what is said."""
    sections: dict[str, list[tuple[str, int, list[str]]]] = {}
    for line in path.read_text().splitlines():
        if line.startswith("["):
            rows = sections.setdefault(line[1:].partition("]")[0], [])
        elif line and not line.startswith("#"):
            command, code, parts = line.split("|")
            rows.append((" ".join(command.split()), int(code), parts.strip().split("; ")))
    return sections


SECTIONS = read_rows(Path(__file__).with_name("bad_inputs.txt"))
SECTIONS["recipes"] = [(f"run {name}.yaml", 2, parts.split("; ")) for name, (_, parts) in RECIPES.items()]
ROWS = [row for rows in SECTIONS.values() for row in rows]
# refused before any model or image is looked at
CHEAP = {line for section in ("settings", "grammar", "recipes") for line, *_ in SECTIONS[section]}
STEPS = ["--max-steps", "1"]
QUICK = {"align": STEPS, "distill": STEPS, "finetune": STEPS}
QUICK["run"] = ["--set", "attention_alignment.max_steps=1", "--set", "feature_alignment.max_steps=1"]


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    """The folder in which every row runs."""
    root = tmp_path_factory.mktemp("places")
    teacher, deep = save_teacher(root / "teacher"), save_teacher(root / "deep", layers=3)
    for name, source, stage in (
        ("student", teacher, "attention-alignment"),
        ("deep-student", deep, "attention-alignment"),
        ("done", teacher, "supervised"),
    ):
        student = convert(source, check_parity=False)
        student.config.adala_stage = stage
        student.save_pretrained(root / name)
        shutil.copy(f"{teacher}/preprocessor_config.json", root / name)
    BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(root / "bert")
    SwinConfig(embed_dim=8, depths=[1], num_heads=[1]).save_pretrained(root / "swin")
    for name, config in (("unknown", '{"model_type": "vit-of-tomorrow"}'), ("badconfig", '{"model_type": ')):
        (root / name).mkdir()
        (root / name / "config.json").write_text(config)
    for name in ("pickled", "truncated"):
        shutil.copytree(teacher, root / name)
    weights = root / "pickled" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    weights = root / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    damage_models(root)
    images = load_digits("train").select(range(16))
    datasets.DatasetDict(train=images, test=images).save_to_disk(root / "digits")
    images.save_to_disk(root / "notest")
    images.select_columns("image").save_to_disk(root / "unlabeled")
    columns = {"image": images["image"]}
    for name, wrong in (("minus", -1), ("huge", 10**6), ("none", None)):
        labels = [wrong if row == 3 else row % 3 for row in range(16)]
        features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
        odd = datasets.Dataset.from_dict(columns | {"label": labels}, features=features)
        datasets.DatasetDict(train=odd, test=odd).save_to_disk(root / f"label-{name}")
    rows = {split: [value % 3 + 10 * (split == "test") for value in range(16)] for split in ("train", "test")}
    splits = {split: datasets.Dataset.from_dict(columns | {"label": labels}) for split, labels in rows.items()}
    datasets.DatasetDict(splits).save_to_disk(root / "label-new")
    images[0]["image"].save(root / "image.png")
    (root / "text.png").write_text("no image")
    for name in ("nothing", "recipes", "thesis"):
        (root / name).mkdir()
    (root / "thesis" / "thesis.tex").write_text("the only copy")
    for name, (text, _) in RECIPES.items():
        (root / f"{name}.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return root


def damage_models(root: Path) -> None:
    """Copies of the teacher and the student, one thing wrong with each."""

    def change_weights(name: str, source: str, change: Callable[[dict], dict]) -> None:
        path = Path(shutil.copytree(root / source, root / name)) / "model.safetensors"
        save_file(change(load_file(path)), path, metadata={"format": "pt"})

    def change_json(name: str, source: str, file: str, change: Callable[[dict], Any]) -> None:
        path = Path(shutil.copytree(root / source, root / name)) / file
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    def without_a_layer(tensors: dict) -> dict:
        return {name: tensor for name, tensor in tensors.items() if "layer.1." not in name and "layers.1." not in name}

    for source, prefix in (("teacher", ""), ("student", "student-")):
        change_weights(f"{prefix}missing", source, without_a_layer)
        change_weights(f"{prefix}nan", source, lambda tensors: {n: t * float("nan") for n, t in tensors.items()})
    change_weights("renamed", "teacher", lambda tensors: {f"zzz.{name}": t for name, t in tensors.items()})
    change_json("student-elu", "student", "config.json", lambda config: config | {"feature_map": "elu"})
    for name, fields in {
        "wider": {"hidden_size": 64},
        "activation": {"hidden_act": "evil"},
        "quantized": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        "kernel": {"attn_implementation": "org/kernel"},
    }.items():
        change_json(name, "teacher", "config.json", lambda config, fields=fields: config | fields)
    for name, change in {
        "broken": lambda config: "not a mapping",
        "list": lambda config: [config],
        "nan": lambda config: config | {"image_mean": [float("nan")]},
        "text": lambda config: config | {"image_mean": ["a"]},
    }.items():
        change_json(f"processor-{name}", "teacher", "preprocessor_config.json", change)


def listing(folder: Path) -> dict[str, str]:
    """Every file and folder, with a hash of what it holds."""
    found = sorted(folder.rglob("*"))
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "" for path in found}


@pytest.mark.parametrize(("line", "code", "parts"), ROWS, ids=[line for line, *_ in ROWS])
def test_bad_input_ends_in_one_line_and_writes_nothing(places, monkeypatch, capsys, caplog, line, code, parts):
    monkeypatch.chdir(places)
    if line in CHEAP:
        monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
        monkeypatch.setattr(datasets, "load_from_disk", lambda *_, **__: pytest.fail("data were read"))
    shutil.rmtree(places / "out", ignore_errors=True)  # of a row before that went wrong
    before = listing(places)
    argv = shlex.split(line.replace("$D", "--dataset digits"))
    if line not in CHEAP:  # or a row that goes wrong would train for minutes
        argv[1:1] = QUICK.get(argv[0], [])
    assert main(argv) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    (said,) = captured.err.splitlines()
    assert said.startswith(f"vit-adala {argv[0]}: ") and "Traceback" not in said and "please report" not in said
    assert not [part for part in parts if part not in said], said
    # under pytest, log lines go to caplog instead of stderr
    assert not [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert listing(places) == before


def test_the_table_is_as_large_as_it_says_and_has_every_command():
    assert len({line for line, *_ in ROWS}) == len(ROWS) >= 200
    assert {line.split()[0] for line, *_ in ROWS} == set(COMMANDS)


@pytest.mark.parametrize("stage", STAGES.values(), ids=list(STAGES))
def test_every_number_of_a_stage_has_a_range(stage):
    numbers = [
        item
        for item in dataclasses.fields(stage.config_class)
        if item.init and set(str(item.type).replace("<class '", "").replace("'>", "").split(" | ")) & {"int", "float"}
    ]
    assert len(numbers) > 25
    without = [item.name for item in numbers if item.name not in RANGES and "range" not in item.metadata]
    assert set(without) <= {"window", "stride"}  # they have a check of their own
