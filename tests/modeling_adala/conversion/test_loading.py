"""Opening models and image processors: nothing stays at random, nothing is trusted, a mistake is one line."""

import builtins
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from family_helpers import CASES, is_vision_text, stock_model, tiny_config
from safetensors.torch import load_file, save_file
from training_helpers import save_teacher
from transformers import (
    CLIPConfig,
    CLIPModel,
    PreTrainedModel,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
    ViTMSNConfig,
    ViTMSNModel,
)

from modeling_adala import CheckpointError, DataError, UsageError, convert
from modeling_adala.conversion.checkpoint_safety import ATTENTIONS, check_checkpoint
from modeling_adala.conversion.loading import (
    load_classifier,
    load_config,
    load_image_processor,
    load_segmenter,
    load_student,
    load_teacher,
)
from modeling_adala.conversion.stored_weights import is_finite
from modeling_adala.inspection.towers import attention_modules, vision_tower
from modeling_adala.modeling_adala import MODELS, stock_class
from vit_adala.cli import main

every_family = pytest.mark.parametrize("name", MODELS)
LABELS = ["a", "b", "c"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`saved(name, head, kind)`: the folder of a tiny stock (`"teacher"`) or AdaLA (`"student"`) model, made once."""
    root, made = tmp_path_factory.mktemp("saved"), {}

    def get(name: str, head: str = "Model", kind: str = "teacher") -> Path:
        if (key := (name, head, kind)) not in made:
            made[key] = root / "-".join(key)
            if kind == "teacher":
                stock_model(name, head).save_pretrained(made[key])
            else:
                torch.manual_seed(0)
                MODELS[name][head](tiny_config(MODELS[name]["Model"].config_class)).save_pretrained(made[key])
        return made[key]

    return get


@pytest.fixture
def copy_of(saved, tmp_path) -> Callable[..., Path]:
    """The same, as a copy to be damaged."""
    return lambda *key: Path(shutil.copytree(saved(*key), tmp_path / "-".join(key)))


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> Path:
    """A tiny stock classifier with its image processor."""
    return Path(save_teacher(tmp_path_factory.mktemp("vit") / "teacher"))


@pytest.fixture
def folder(vit, tmp_path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(vit, tmp_path / "teacher"))


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    file = folder / "model.safetensors"
    tensors = edit(load_file(file))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})


def set_json(folder: Path, file: str = "config.json", **values) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refused(load: Callable[[], object], *names: str, error: type[Exception] = CheckpointError) -> str:
    with pytest.raises(error) as caught:
        load()
    line = str(caught.value)
    assert "\n" not in line and len(line) < 500
    assert line.endswith("."), "the way out ends the line"
    assert not [name for name in names if name not in line], line
    return line


def in_attention(tensors: dict[str, torch.Tensor]) -> str:
    """A bias in the last layer of the vision tower, by its name on disk."""
    names = sorted(n for n in tensors if n.endswith(".bias") and ".1." in n and "text" not in n and "norm" not in n)
    return names[0]


# what is done to the weights, and the kind of problem that the line names
DAMAGE = {
    "all renamed": (lambda tensors: {f"zzz.{name}": tensor for name, tensor in tensors.items()}, "missing"),
    "no second layer": (lambda tensors: {n: t for n, t in tensors.items() if ".1." not in n}, "missing"),
    "no bias": (lambda tensors: {n: t for n, t in tensors.items() if n != in_attention(tensors)}, "missing"),
    "one shape": (lambda tensors: tensors | {in_attention(tensors): torch.zeros(7)}, "another size"),
    "one too many": (lambda t: t | {in_attention(t).replace(".1.", ".2."): torch.zeros(32)}, "does not have"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@every_family
def test_weights_that_did_not_load_are_one_line_for_every_family_and_every_opening(name, damage, copy_of):
    edit, problem = DAMAGE[damage]
    teacher, student = copy_of(name), copy_of(name, "Model", "student")
    openings = [(convert, teacher), (load_student, student)]
    heads = {"ForImageClassification": load_classifier, "ForSemanticSegmentation": load_segmenter}
    for load in [load for head, load in heads.items() if head in MODELS[name]]:
        chosen = (teacher, student) if damage in ("no bias", "one too many") else ()  # the others take the same way
        openings += [(lambda path, load=load: load(path, LABELS), folder) for folder in chosen]
    for folder in (teacher, student):
        change(folder, edit)
    for load, folder in openings:
        refused(lambda load=load, folder=folder: load(str(folder)), repr(str(folder)), problem)


@pytest.mark.parametrize(("name", "head"), CASES)
def test_sound_checkpoints_of_every_family_and_head_open_whole(name, head, saved):
    family = MODELS[name]
    student = load_student(str(saved(name, head, "student")))
    assert type(student) is family[head]
    assert vision_tower(student).config._attn_implementation == "adala"
    if stock_class(family[head]):
        assert type(load_teacher(str(saved(name, head)))) is stock_class(family[head])
    if head != "Model":  # a head that the checkpoint does not have starts at random, where it is asked for
        assert type(load_teacher(str(saved(name)), head)) is (
            stock_class(family[head]) or stock_class(family["Model"])
        )
    for folder in {saved(name), saved(name, head, "student")}:
        for load, opened in ((load_classifier, "ForImageClassification"), (load_segmenter, "ForSemanticSegmentation")):
            # a head that is not of the family's own kind (a projection, a teacher's second head) is left out
            if opened in family and head in ("Model", "Backbone", opened, "ForMaskedImageModeling"):
                model = load(str(folder), LABELS)
                assert model.config.num_labels == 3
                assert all(is_finite(tensor) for tensor in model.state_dict().values())


@every_family
def test_a_teacher_is_opened_as_another_head_of_its_family(name, saved):
    heads = [head for head in MODELS[name] if stock_class(MODELS[name][head])]
    for stored in heads:
        for head in heads:
            if (stored, head) == ("ForImageClassification", "Model") and is_vision_text(name):
                refused(lambda stored=stored: load_teacher(str(saved(name, stored)), "Model"), "text_model")
                continue
            model = load_teacher(str(saved(name, stored)), head)
            assert type(model) is stock_class(MODELS[name][head])


def test_the_feature_map_of_a_student_cannot_be_changed_in_its_config(saved, tmp_path):
    for before, after in (("hedgehog", "elu"), ("elu", "hedgehog"), ("t2r", "hedgehog")):
        student = convert(str(saved("vit")), feature_map=before, check_parity=False)
        student.save_pretrained(tmp_path / before)
        set_json(tmp_path / before, feature_map=after)
        for load in (load_student, lambda path: load_classifier(path, LABELS)):
            refused(lambda load=load, before=before: load(str(tmp_path / before)), "layers.0.attention.feature_map.")


def test_a_layer_that_config_json_leaves_out_is_not_dropped_in_silence(copy_of):
    for name, part in (("vit", {"num_hidden_layers": 1}), ("ijepa", {"num_hidden_layers": 1})):
        for kind, load in (("teacher", load_teacher), ("student", load_student)):
            folder = copy_of(name, "Model", kind)
            set_json(folder, **part, **({"out_features": None, "out_indices": None} if kind == "student" else {}))
            refused(lambda load=load, folder=folder: load(str(folder)), "does not have: ", ".1.")


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_a_head_may_be_new_and_only_where_it_is_asked_for(kind, saved, copy_of):
    base, classifier = str(saved("vit", "Model", kind)), str(saved("vit", "ForImageClassification", kind))
    own = list(load_config(classifier).id2label.values())
    kept = load_classifier(classifier, own).classifier.weight
    assert torch.equal(kept, load_file(f"{classifier}/model.safetensors")["classifier.weight"])
    assert load_classifier(classifier, LABELS).classifier.weight.shape == (3, 32)
    assert load_classifier(base, LABELS).classifier.weight.shape == (3, 32)
    headless = copy_of("vit", "ForImageClassification", kind)
    change(headless, lambda tensors: {n: t for n, t in tensors.items() if not n.startswith("classifier")})
    refused(lambda: load_classifier(str(headless), own), "missing weights: 2 of", "classifier.bias")
    other, nine = headless, {"classifier.weight": torch.zeros(9, 32), "classifier.bias": torch.zeros(9)}
    change(other, lambda tensors: tensors | nine)
    refused(lambda: load_classifier(str(other), own), "classifier.bias", "(9,) stored, (2,) expected")
    load = load_teacher if kind == "teacher" else load_student
    refused(lambda: load(str(other)), "classifier.bias", "(9,) stored, (2,) expected")
    assert load_classifier(str(other), LABELS).classifier.weight.shape == (3, 32)


def test_a_teacher_without_a_pooler_opens_as_dinos_checkpoints_do(tmp_path, caplog):
    ViTModel(tiny_config(ViTConfig), add_pooling_layer=False).save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path))
    assert "has no pooler" in caplog.text
    assert convert(teacher)
    half = load_file(tmp_path / "model.safetensors") | {"pooler.dense.weight": torch.zeros(32, 32)}
    save_file(half, tmp_path / "model.safetensors", {"format": "pt"})
    refused(lambda: load_teacher(str(tmp_path)), "missing weights: 1 of 40", "'pooler.dense.bias'")


def test_encoders_that_are_a_vit_by_another_name_are_teachers_too(tmp_path):
    decoder = {f"decoder_{n}": v for n, v in DECODER.items()}
    for config_class, model_class, extra in (
        (ViTMAEConfig, ViTMAEForPreTraining, decoder),
        (ViTMSNConfig, ViTMSNModel, {}),
    ):
        model = model_class(config_class(**tiny_config(config_class).to_dict() | extra))
        model.save_pretrained(tmp_path / model_class.__name__)
        student = convert(str(tmp_path / model_class.__name__))
        theirs, ours = attention_modules(model.base_model)[1], attention_modules(student)[1]
        assert torch.equal(ours.q_proj.weight, theirs.q_proj.weight)


DECODER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"), [*((name, float("nan")) for name in MODELS), ("vit", float("inf")), ("vit", -float("inf"))]
)
def test_weights_that_are_not_finite_are_named_as_the_culprit(name, value, copy_of):
    teacher, student = copy_of(name), copy_of(name, "Model", "student")

    def spoil(tensors):
        tensors[in_attention(tensors)][3] = value
        return tensors

    for folder in (teacher, student):
        change(folder, spoil)
    refused(lambda: load_student(str(student)), "model", "non-finite weights in 1 of", "(first: ")
    line = refused(lambda: convert(str(teacher)), f"teacher {str(teacher)!r} holds non-finite weights in 1 of")
    assert "report" not in line
    opened = load_teacher(str(teacher), finite=False)
    refused(lambda: convert(opened), "teacher", "holds non-finite weights in 1 of")
    refused(lambda: load_teacher(opened), "teacher", "holds non-finite weights in 1 of")


def test_a_teacher_whose_features_overflow_is_the_culprit_too(copy_of):
    folder = copy_of("vit")
    change(folder, lambda tensors: tensors | {"layernorm.weight": torch.full((32,), 3e38)})
    line = refused(lambda: convert(str(folder)), "teacher", "non-finite features")
    assert "report" not in line


def test_a_sum_that_overflows_is_no_infinity():
    assert is_finite(torch.full((4,), 3e38)) and is_finite(torch.tensor([1, 2]))
    assert not is_finite(torch.tensor([1.0, float("inf"), -float("inf")]))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_that_were_cast_are_refused(dtype, copy_of):
    for folder, load in ((copy_of("vit"), load_teacher), (copy_of("vit", "Model", "student"), load_student)):
        change(folder, lambda tensors: tensors | {in_attention(tensors): tensors[in_attention(tensors)].to(dtype)})
        refused(lambda load=load, folder=folder: load(str(folder)), "1 of", "not stored as floating point", "bfloat16")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_all_floating_point_numbers_of_16_bits_and_more_open_as_float32(dtype, copy_of):
    folder = copy_of("dinov2")
    change(folder, lambda tensors: {n: t.to(dtype) for n, t in tensors.items()})
    assert load_teacher(str(folder)).dtype == torch.float32


# --- what config.json says -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"hidden_size": 64}, ("config.json describes", "the weights hold only")),
        ({"intermediate_size": 60}, ("fc1.bias", "another size", "(64,) stored, (60,) expected")),
        ({"hidden_act": "evil"}, ("hidden_act='evil'", "'gelu'")),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, ("quantized",)),
        ({"image_size": 35}, ("'vit.embeddings.position_embeddings'", "another size")),
        ({"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}, ("'classifier.bias'", "(2,) expected")),
        ({"architectures": ["ViTModel"]}, ("weights that ViTModel does not have", "'classifier.bias'")),
        ({"num_channels": 3}, ("patch_embeddings.projection.weight", "another size")),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_that_does_not_fit_the_weights_is_one_line(values, names, folder):
    set_json(folder, **values)
    refused(lambda: load_teacher(str(folder)), repr(str(folder)), *names)


def test_folders_without_weights_say_what_to_do(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    refused(lambda: load_teacher(str(folder)), "has no weights", "model.safetensors")
    (tmp_path / "2-feature-alignment").mkdir()
    line = refused(lambda: load_student(str(tmp_path / "2-feature-alignment")), "no config.json", error=DataError)
    assert "--from-stage 2" in line
    shutil.copy(folder / "config.json", tmp_path / "2-feature-alignment")
    stage = tmp_path / "2-feature-alignment"
    refused(lambda: load_teacher(str(stage)), "has no weights", "--from-stage 2")
    (stage / "model.safetensors").write_bytes(b"")
    refused(lambda: load_teacher(str(stage)), "truncated", "--from-stage 2")


def test_every_way_out_of_a_damaged_stage_folder_names_its_stage(vit, tmp_path):
    folder = Path(shutil.copytree(vit, tmp_path / "1-attention-alignment"))
    change(folder, lambda tensors: {n: t for n, t in tensors.items() if ".1." not in n})
    refused(lambda: load_teacher(str(folder)), "missing weights", "--from-stage 1")
    change(folder, lambda tensors: {n: t * float("nan") for n, t in load_file(vit / "model.safetensors").items()})
    refused(lambda: load_teacher(str(folder)), "non-finite", "--from-stage 1")


EVIL = "org/evil-kernel"


@pytest.mark.parametrize(
    ("model_class", "values"),
    [
        (ViTModel, {"attn_implementation": EVIL}),
        (ViTModel, {"_attn_implementation": EVIL}),
        (ViTModel, {"attn_implementation": {"": EVIL}}),
        (CLIPModel, {"vision_config": {"attn_implementation": EVIL}}),
        (CLIPModel, {"text_config": {"_attn_implementation": EVIL}}),
        (CLIPModel, {"attn_implementation": {"vision_config": EVIL}}),
    ],
)
def test_no_config_chooses_the_code_that_computes_attention(model_class, values, tmp_path, monkeypatch):
    model_class(tiny_config(model_class.config_class)).save_pretrained(tmp_path)
    for part, value in values.items():
        found = json.loads((tmp_path / "config.json").read_text()).get(part)
        set_json(tmp_path, **{part: found | value if isinstance(found, dict) else value})
    monkeypatch.setattr(PreTrainedModel, "__init__", lambda *_, **__: pytest.fail("a model was built"))
    for load in (check_checkpoint, load_config, load_teacher):
        refused(lambda load=load: load(str(tmp_path)), repr(EVIL), "Remove it from config.json")
    if model_class is ViTModel:  # a file alone, or one of the Hub, is not checked as a folder
        refused(lambda: load_config(str(tmp_path / "config.json")), repr(EVIL), "Remove it from config.json")


@pytest.mark.parametrize("name", ["vit", "clip", "siglip2"])
@pytest.mark.parametrize("written", [None, "eager", "flash_attention_2"])
def test_attention_is_chosen_by_us_whatever_a_config_says(name, written, copy_of):
    for folder, load, expected in (
        (copy_of(name), load_teacher, "sdpa"),
        (copy_of(name, "Model", "student"), load_student, "adala"),
    ):
        set_json(folder, attn_implementation=written)
        assert vision_tower(load(str(folder))).config._attn_implementation == expected
    assert "org/kernel" not in ATTENTIONS


def test_code_in_a_folder_is_neither_run_nor_asked_about(folder, monkeypatch):
    (folder / "evil.py").write_text("raise SystemExit('it ran')")
    references = {"AutoConfig": "evil.C", "AutoModel": "evil.M", "AutoImageProcessor": "evil.P"}
    set_json(folder, auto_map=references | {"AutoModelForImageClassification": "evil.M"})
    set_json(folder, "preprocessor_config.json", auto_map=references)
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("asked"))
    load_teacher(str(folder)), load_classifier(str(folder), LABELS), load_image_processor(str(folder))
    set_json(folder, model_type="evil")
    for load in (load_config, load_teacher, load_student):
        refused(lambda load=load: load(str(folder)), "code of its own, which is never run here")
    set_json(folder, "preprocessor_config.json", image_processor_type="EvilProcessor")
    refused(lambda: load_image_processor(str(folder)), "image processor of")


# --- image processors ------------------------------------------------------------------------------------------------

PROCESSORS = {
    "no JSON": ("{", "not a valid JSON"),
    "empty file": ("", "not a valid JSON"),
    "a list": ("[]", "must be a JSON object"),
    "a text": ('"ViT"', "must be a JSON object"),
    "binary": (b"\xff\xfe\x00", "image processor"),
    "nothing in it": ({}, "image_mean=None"),
    "no deviation": ({"image_std": None}, "image_std=None"),
    "mean is nan": ({"image_mean": [float("nan")] * 3}, "image_mean=[nan"),
    "mean is infinite": ({"image_mean": [float("inf")]}, "image_mean=[inf"),
    "mean of texts": ({"image_mean": ["0.5", "0.5", "0.5"]}, "image_mean=['0.5'"),
    "mean of two": ({"image_mean": [0.5, 0.5]}, "image_mean=[0.5, 0.5]"),
    "mean is true": ({"image_mean": True}, "image_mean=True"),
    "deviation is zero": ({"image_std": [0.5, 0, 0.5]}, "image_std=[0.5, 0, 0.5] must be positive"),
    "deviation is negative": ({"image_std": -0.5}, "image_std=-0.5 must be positive"),
    "factor is a text": ({"rescale_factor": "1/255"}, "rescale_factor='1/255'"),
    "factor is zero": ({"rescale_factor": 0}, "rescale_factor=0"),
    "factor is nan": ({"rescale_factor": float("nan")}, "rescale_factor=nan"),
    "flag is a text": ({"do_normalize": "false"}, "do_normalize='false'"),
    "flag is a number": ({"do_rescale": 1}, "do_rescale=1"),
    "filter is a text": ({"resample": "cubic"}, "resample='cubic'"),
    "filter is unknown": ({"resample": 77}, "resample=77"),
}


@pytest.mark.parametrize("case", PROCESSORS)
def test_a_damaged_image_processor_is_one_line_and_never_no_normalization(case, folder, caplog):
    content, names = PROCESSORS[case]
    path = folder / "preprocessor_config.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_text(content)
    elif content:
        set_json(folder, path.name, **content)
    else:
        path.write_text("{}")
    refused(lambda: load_image_processor(str(folder)), repr(str(folder)), names)
    assert "0..1" not in caplog.text


def test_image_processors_that_are_sound_stay_sound(folder, caplog):
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({"do_normalize": True, "image_mean": [0.5] * 3, "image_std": 0.25, "size": 28}))
    assert load_image_processor(str(folder)).image_std == 0.25  # as the first checkpoints of ViT wrote it
    path.write_text(json.dumps({"do_normalize": False}))
    assert load_image_processor(str(folder)).do_normalize is False
    assert not caplog.text
    path.unlink()
    assert load_image_processor(str(folder)) is None
    assert "has no image processor" in caplog.text


def test_an_image_processor_that_the_hub_did_not_deliver_is_no_reason_to_do_without(vit, tmp_path, monkeypatch):
    """A model in the cache without its image processor: the Hub's client knows that there is none, or it does not."""
    repository, revision = tmp_path / "models--org--vit", "0" * 40
    for folder in ("refs", f"snapshots/{revision}", f".no_exist/{revision}"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    for file in ("config.json", "model.safetensors"):
        shutil.copy(vit / file, repository / "snapshots" / revision)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert load_teacher("org/vit").config.num_labels == 10
    refused(lambda: load_image_processor("org/vit"), "'org/vit'", "with a network", error=DataError)
    for file in ("preprocessor_config.json", "processor_config.json"):
        (repository / ".no_exist" / revision / file).touch()
    assert load_image_processor("org/vit") is None
    (repository / "snapshots" / revision / "config.json").write_text('{"model_type": "vit", "hidden_size": "wide"}')
    refused(lambda: load_config("org/vit"), "'org/vit'", "hidden_size")
    shutil.copy(vit / "config.json", repository / "snapshots" / revision)
    change(repository / "snapshots" / revision, lambda t: {n: x.to(torch.int8) for n, x in t.items()})
    refused(lambda: load_teacher("org/vit"), "'org/vit'", "not stored as floating point")


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["weights", "processor"])
def test_a_command_ends_in_one_line_before_anything_is_written(damage, folder, tmp_path, capsys):
    if damage == "weights":
        change(folder, lambda tensors: {f"zzz.{name}": tensor for name, tensor in tensors.items()})
    else:
        (folder / "preprocessor_config.json").write_text("[]")
    argv = ["align", str(folder), "--dataset", "mnist-digits", "--output-dir", str(tmp_path / "out")]
    assert main([*argv, "--max-steps", "1"]) == 1
    captured = capsys.readouterr()
    assert (captured.out, len(captured.err.splitlines())) == ("", 1)
    assert str(folder) in captured.err
    assert not (tmp_path / "out").exists()


def test_an_unsupported_family_is_a_usage_error_for_every_opening(tmp_path):
    CLIPConfig().text_config.save_pretrained(tmp_path)
    for load in (
        load_teacher,
        load_student,
        lambda p: load_classifier(p, LABELS),
        lambda p: load_segmenter(p, LABELS),
    ):
        with pytest.raises(UsageError):
            load(str(tmp_path))
