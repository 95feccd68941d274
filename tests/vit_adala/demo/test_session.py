"""Behavior of the demo on picks, clicks and moved sliders, without a browser and without Gradio."""

import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from family_helpers import stock_model
from PIL import Image
from training_helpers import tiny_vit
from transformers import CLIPTokenizer

from modeling_adala import convert
from modeling_adala.inspection.towers import vision_tower
from modeling_adala.mixins import image_inputs
from trainers.report.pictures import query_attention
from vit_adala.demo import charts, session
from vit_adala.demo.measure import Cost, measure, tensor_peak
from vit_adala.demo.pair import Pair
from vit_adala.demo.uploads import MAX_PIXELS, example_images, read_upload
from vit_adala.demo.views import PICTURE, prepare

ROLES = ("teacher", "student")
CENTER = session.CENTER
CURVES = charts.curves


def pair_of(teacher, student=None, sides: tuple[int, int, int] = (14, 28, 56), **kwargs) -> Pair:
    models = {"teacher": teacher.eval(), "student": (student or convert(teacher, check_parity=False)).eval()}
    pair = Pair(models, {role: role for role in ROLES}, **kwargs)
    pair.__dict__["sides"] = sides  # instead of what this machine is quick at
    return pair


@pytest.fixture(scope="module")
def pair() -> Pair:
    return pair_of(tiny_vit())


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("images") / "noise.png"
    Image.effect_noise((60, 40), 80).save(path)
    return str(path)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A pass is timed once, and curves are not drawn."""
    monkeypatch.setattr("vit_adala.demo.measure.SLOW_SECONDS", 0.0)
    monkeypatch.setattr(charts, "curves", lambda costs, side, sides: f"{len(costs)} sizes, at {side} of {sides}")


def all_updates(updates) -> dict:
    return {name: value for update in updates for name, value in update.items()}


def show(pair, path, side=28, layer=1, point=CENTER, texts="", costs=None) -> dict:
    return all_updates(session.show(pair, path, side, layer, point, texts, costs or {}))


# --- showing an image ------------------------------------------------------------------------------------------------


def test_an_image_updates_every_part_of_both_columns(pair, picture):
    updates = list(session.show(pair, picture, 28, 1, CENTER, "", {}))
    assert "teacher_features" in updates[0], "pictures come before what takes longer"
    parts = all_updates(updates)
    assert parts["note"] == ""
    for role in ROLES:
        for name in ("features", "attention"):
            array = parts[f"{role}_{name}"]
            assert array.shape == (PICTURE, PICTURE, 3) and array.dtype == np.uint8 and len(np.unique(array)) > 10
        assert parts[f"{role}_scores"].count('class="bar"') == 3
        assert re.search(r"time.*\d ms", parts[f"{role}_costs"])
    assert parts["costs"].keys() == {28} and "28 px, 17 tokens" in parts["summary"]
    assert parts["costs"][28]["student"].milliseconds > 0
    assert parts["curves"] == "1 sizes, at 28 of (14, 56)"


def test_both_models_have_the_same_basis_of_colors(picture):
    teacher = tiny_vit()
    twins = show(pair_of(teacher, teacher), picture)
    assert np.array_equal(twins["teacher_features"], twins["student_features"])
    assert "cosine of 1.000" in twins["summary"]
    others = show(pair_of(teacher, tiny_vit(seed=1)), picture)
    assert np.array_equal(others["teacher_features"], twins["teacher_features"])
    assert not np.array_equal(others["student_features"], twins["student_features"])
    assert "cosine of 1.000" not in others["summary"]


def test_scores_are_the_probabilities_of_each_model(pair, picture):
    pixels, _ = prepare(pair, Image.open(picture), 28)
    parts = show(pair, picture)
    for role, model in pair.models.items():
        with torch.no_grad():
            scores = model(pixels).logits[0].softmax(dim=-1)
        best = scores.argmax().item()
        first = re.search(r"<span>(\d)</span>.*?<em>([\d.]+) %</em>", parts[f"{role}_scores"])
        assert (first[1], float(first[2])) == (str(best), pytest.approx(100 * scores[best].item(), abs=0.06))


def test_a_model_without_a_head_has_no_scores(picture):
    parts = show(pair_of(tiny_vit(head=False)), picture)
    assert all('class="bar"' not in parts[f"{role}_scores"] for role in ROLES)


def test_sides_are_whole_patches_within_the_slider(pair):
    asked = {None: 28, 0: 14, 17: 14, 18: 21, 28: 28, 31.6: 35, 1e9: 56}
    assert {side: session.check_side(pair, side) for side in asked} == asked


# --- clicking --------------------------------------------------------------------------------------------------------


def framed_patch(array: np.ndarray, patches: int) -> tuple[int, int]:
    """Row and column of the patch with a cyan frame."""
    red, green, blue = array.astype(int).transpose(2, 0, 1)
    rows, columns = np.nonzero((green > 150) & (blue > 150) & (red < 100))
    assert len(rows) > 50
    return tuple(int(values.mean() * patches / PICTURE) for values in (rows, columns))


@pytest.mark.parametrize("place", [(0, 0), (1, 3), (3, 3)])
def test_the_clicked_patch_is_the_one_that_attends_in_both_columns(pair, picture, place, monkeypatch):
    asked = []

    def spy(model, pixels, layer, query):
        asked.append((layer, query))
        return query_attention(model, pixels, layer, query)

    monkeypatch.setattr("vit_adala.demo.views.query_attention", spy)
    point = tuple((index + 0.6) / 4 for index in place)
    parts = all_updates(session.attend(pair, picture, 28, 0, point))
    assert asked == [(0, place)] * 2 and parts["point"] == point
    for role in ROLES:
        assert framed_patch(parts[f"{role}_attention"], 4) == place


def test_layers_are_those_of_the_model(pair):
    asked = {-3: 0, 0: 0, 0.6: 1, 999: 1, None: 1}
    assert {layer: session.check_layer(pair, layer) for layer in asked} == asked


# --- what it costs ---------------------------------------------------------------------------------------------------


def test_a_sweep_adds_the_sizes_that_are_missing_and_keeps_the_others(pair, monkeypatch):
    monkeypatch.setattr(session, "SWEEP", 4)
    known = {"teacher": Cost(5.0, 1.0), "student": Cost(4.0, 2.0)}
    updates = list(session.sweep(pair, None, 28, {14: known}))
    counts = [len(update["costs"]) for update in updates]
    assert counts == list(range(2, 2 + len(updates)))
    costs = updates[-1]["costs"]
    assert costs[14] is known and set(costs) == {14, 28, 42, 56}
    assert [update["curves"] for update in updates] == [f"{count} sizes, at 28 of (14, 56)" for count in counts]
    assert list(session.sweep(pair, None, 28, costs)) == []


def test_memory_is_that_of_the_tensors_that_live_at_the_same_time():
    mega, weight = 2**18, torch.zeros(2**18)  # floats in a megabyte

    def two_at_most() -> torch.Tensor:
        x = torch.zeros(mega)
        for _ in range(5):
            x = (x + weight)[:].view(2, -1).flatten()
        return x

    assert tensor_peak(two_at_most) == 2 * 2**20
    assert tensor_peak(lambda: weight.view(2, -1).t().add_(1)) == 0
    assert tensor_peak(lambda: [torch.zeros(mega) for _ in range(3)]) == 3 * 2**20


def test_memory_does_not_depend_on_what_ran_before():
    models = pair_of(tiny_vit()).models
    small, large, again = (measure(models, torch.randn(1, 1, side, side)) for side in (70, 280, 70))
    for role in ROLES:
        assert small[role].megabytes == again[role].megabytes
        assert large[role].megabytes / small[role].megabytes == pytest.approx(16, rel=0.1), "as many tokens"


def test_curves_have_a_point_per_size_and_bars_are_relative_to_the_longer():
    rows = {side: {"teacher": Cost(side, 2.0), "student": Cost(side / 4, 1.0)} for side in (10, 20, 30)}
    markers = [CURVES(dict(list(rows.items())[:count]), 10, (10, 30)).count("<use ") for count in (1, 3)]
    assert markers[1] - markers[0] == 2 * 2 * 2  # points more, models, figures
    assert "width:25.0%" in charts.cost_bars("student", rows[20]) and "5.0 ms" in charts.cost_bars("student", rows[20])
    assert charts.verdict(rows[20]) == "4.0x as fast as the teacher"
    assert charts.verdict({"teacher": Cost(5, 1), "student": Cost(10, 1)}) == "2.0x slower than the teacher"


def test_labels_cannot_bring_markup():
    assert "<script" not in charts.score_bars("teacher", [("<script>alert(1)</script>", 0.5)])


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")], ids=repr
)
def test_too_large_for_the_memory_is_a_note(pair, picture, monkeypatch, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(session, "feature_pictures", fail)
    (update,) = session.show(pair, picture, 28, 0, CENTER, "", {})
    assert "choose a lower one" in update["note"]
    monkeypatch.setattr(session, "feature_pictures", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(session.show(pair, picture, 28, 0, CENTER, "", {}))


# --- captions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_captions_get_the_scores_that_the_model_gives(name, picture):
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[])
    pair = pair_of(stock_model(name), sides=(8, 32, 64), tokenizer=tokenizer)
    parts = show(pair, picture, 32, texts=" cat, dog ,\nred bus,,")
    pixels, _ = prepare(pair, Image.open(picture), 32)
    length = pair.config.text_config.max_position_embeddings
    tokens = tokenizer(["cat", "dog", "red bus"], padding="max_length", max_length=length, return_tensors="pt")
    for role, model in pair.models.items():
        with torch.no_grad():
            logits = model(**tokens, **image_inputs(vision_tower(model).config, pixels)).logits_per_image[0]
        expected = logits.sigmoid() if name == "siglip" else logits.softmax(dim=-1)
        found = re.findall(r"<span>(.*?)</span>.*?<em>([\d.]+) %</em>", parts[f"{role}_scores"])
        assert {caption: float(score) for caption, score in found} == {
            caption: pytest.approx(100 * score, abs=0.06)
            for caption, score in zip(["cat", "dog", "red bus"], expected.tolist())
        }
    later = all_updates(session.score(pair, picture, 32, "cat"))
    assert later.keys() == {"teacher_scores", "student_scores"} and later["student_scores"].count('"bar"') == 1


# --- images ----------------------------------------------------------------------------------------------------------


def write(folder: Path) -> None:
    """Odd images by the message or the note that they should get."""
    noise = Image.effect_noise((30, 20), 80)
    color = Image.merge("RGB", [noise] * 3)
    (folder / "text.png").write_text("no image")
    (folder / "empty.png").touch()
    (folder / "page.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    color.save(folder / "whole.jpg")
    (folder / "half.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:-100])
    Image.new("L", (1, 1)).save(folder / "one.png")
    for name, side in (("large", 8000), ("bomb", 20000)):  # one pixel that claims to be many
        content = bytearray((folder / "one.png").read_bytes())
        content[16:24] = 2 * side.to_bytes(4)
        content[29:33] = zlib.crc32(content[12:29]).to_bytes(4)
        (folder / f"{name}.png").write_bytes(content)
    Image.fromarray(np.full((20, 20), np.nan, np.float32)).save(folder / "nan.tif")
    color.save(folder / "moving.gif", save_all=True, append_images=[color.rotate(180)])
    Image.merge("RGBA", [noise] * 4).save(folder / "clear.png")
    Image.fromarray(257 * np.asarray(noise).astype(np.uint16)).save(folder / "deep.png")
    color.convert("CMYK").save(folder / "print.jpg")
    Image.new("RGB", (20, 20)).save(folder / "black.png")
    Image.new("RGB", (900, 8)).save(folder / "wide.png")


REFUSED = {
    "text.png": "Pillow does not know its format",
    "page.svg": "Pillow does not know its format",
    "empty.png": "the file is empty",
    "half.jpg": "truncated",
    "nan.tif": "NaN",
    "one.png": "1 x 1 pixels; pass at least 8",
    "large.png": f"8,000 x 8,000 pixels; pass at most {MAX_PIXELS:,}",
    "bomb.png": "too large",
}
SHOWN = {
    "whole.jpg": "",
    "moving.gif": "2 frames, the first is shown",
    "clear.png": "transparency is ignored",
    "deep.png": "16 bits per pixel, shown as 8",
    "print.jpg": "CMYK, converted to RGB",
    "black.png": "",
    "wide.png": "",
}


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("odd")
    write(folder)
    return folder


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_shown_is_told_in_one_line_that_names_the_file(pair, odd, name, recwarn):
    (update,) = session.show(pair, str(odd / name), 28, 0, CENTER, "", {})
    assert update.keys() == {"note"} and "problem" in update["note"]
    assert name in update["note"] and REFUSED[name] in update["note"] and str(odd) not in update["note"]
    assert not recwarn.list


@pytest.mark.parametrize("name", SHOWN)
def test_what_is_shown_otherwise_than_it_is_says_so(pair, odd, name):
    assert read_upload(odd / name)[1] == SHOWN[name]
    parts = next(session.show(pair, str(odd / name), 28, 0, CENTER, "", {}))
    assert SHOWN[name] in parts["note"] and "problem" not in parts["note"]
    assert parts["student_features"].shape == (PICTURE, PICTURE, 3)


def test_nothing_picked_is_a_hint(pair):
    (update,) = session.show(pair, None, 28, 0, CENTER, "", {})
    assert "Pick an example" in update["note"]
    assert [*session.attend(pair, None, 28, 0, CENTER), *session.score(pair, None, 28, "cat")] == []


@pytest.mark.parametrize("channels", [1, 3])
def test_examples_are_on_this_machine_and_can_be_shown(channels, tmp_path):
    examples = example_images(channels)
    assert len(examples) >= 3
    for example in examples:
        if isinstance(example, Image.Image):
            example.save(tmp_path / "example.png")
            example = tmp_path / "example.png"
        assert read_upload(example)[1] == ""
