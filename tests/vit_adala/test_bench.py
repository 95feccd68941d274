"""`vit-adala bench`: what it measures is measured, what is wrong gets no speed, and mistakes cost no time."""

import json
import os
import sys
import time
from functools import partial

import pytest
import torch
from family_helpers import stock_config_class, tiny_config
from PIL import Image
from transformers import ViTConfig, ViTModel

from modeling_adala import (
    AdaLAError,
    AdaLAViTModel,
    UsageError,
    attention_interface,
    build_feature_map,
    convert,
    linear_attention,
)
from modeling_adala.inspection.towers import attention_modules, forward_features, vision_tower
from modeling_adala.modeling_adala import MODELS
from trainers.runs.memory import peak_of
from trainers.runs.timing import Timing, time_in_turns
from vit_adala.benchmark import models, operators, runtimes
from vit_adala.benchmark.cases import Row, Settings, Size
from vit_adala.benchmark.floor import Floor, measure_floor, operator_work
from vit_adala.benchmark.operators import prepare_operator
from vit_adala.benchmark.output import find_crossing, sentences
from vit_adala.cli import main
from vit_adala.commands import bench

MIB = 2**20
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
FLOOR = Floor(1e10, 1e11, "float32")
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="no peak of resident memory elsewhere")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> dict[str, str]:
    """A stock folder, its linear student, and a bare configuration."""
    root = tmp_path_factory.mktemp("bench")
    torch.manual_seed(0)
    teacher = ViTModel(ViTConfig(**TINY, image_size=32, patch_size=8))
    teacher.save_pretrained(root / "teacher")
    convert(str(root / "teacher"), feature_map="elu", check_parity=False).save_pretrained(root / "student")
    teacher.config.to_json_file(root / "config.json", use_diff=False)
    places = {name: str(root / name) for name in ("teacher", "student")}
    return places | {"config": str(root / "config.json")}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs `bench` on tiny images with a made-up floor; the exit code, stdout and stderr."""
    monkeypatch.setattr(bench, "measure_floor", lambda dtype, device: Floor(1e10, 1e11, str(dtype)[6:]))

    def run(model: str, *options: str) -> tuple[int, str, str]:
        options = (*options, "--output-dir", str(tmp_path / "out"), "--seconds", "0.01")
        if "--sizes" not in options:
            options = (*options, "--sizes", "16,32")
        code = main(["bench", model, *options])
        return code, *capsys.readouterr()

    return run


# --- time ------------------------------------------------------------------------------------------------------------


def test_runs_take_turns():
    calls: list[str] = []

    def run(name: str):
        def sleep() -> None:
            calls.append(name)
            time.sleep(0.006)  # long enough to be a sample of its own

        return sleep

    timings = time_in_turns({"a": run("a"), "b": run("b")}, seconds=0.03)
    measured = calls[4:]  # two warm-up calls each
    assert measured == ["a", "b"] * (len(measured) // 2)
    assert all(timing.samples == len(measured) // 2 >= 3 for timing in timings.values())
    assert all(0.006 <= timing.lower <= timing.median <= timing.upper < 0.05 for timing in timings.values())


def test_short_runs_are_repeated_until_a_clock_can_measure_them():
    calls = []
    timing = time_in_turns({"short": lambda: calls.append(0)}, seconds=0.01)["short"]
    assert len(calls) > 1000
    assert timing.median < 1e-5


def test_quartiles_of_a_timing():
    timing = Timing.of([4.0, 1.0, 2.0, 3.0, 5.0])
    assert (timing.lower, timing.median, timing.upper, timing.samples) == (2.0, 3.0, 4.0, 5)
    assert timing.overlaps(Timing.of([4.0, 4.0, 9.0]))
    assert not timing.overlaps(Timing.of([5.0, 5.0, 9.0]))


# --- memory ----------------------------------------------------------------------------------------------------------


@LINUX
def test_memory_of_linear_attention_has_no_square():
    # the first of these tests: the server of fresh processes then imports the operators once for all
    phi, tokens = build_feature_map("elu", 2, 16), 4096
    peak = peak_of(prepare_operator, "linear", phi, (1, 2, tokens, 16), Settings(torch.float32))
    assert peak < 16 * MIB < 2 * tokens**2 * 4  # of two heads in float32


def allocate(mebibytes: int, before: int = 0):
    """For the fresh process: what is allocated before the pass, and freed or kept, does not count."""
    torch.ones(before * MIB, dtype=torch.uint8)
    kept = torch.ones(before * MIB, dtype=torch.uint8)
    return lambda: (torch.ones(mebibytes * MIB, dtype=torch.uint8), kept)


def die():
    return lambda: os._exit(9)


@LINUX
@pytest.mark.parametrize(("mebibytes", "before"), [(64, 0), (48, 200)])
def test_peak_memory_is_that_of_the_pass_alone(mebibytes, before):
    peak = peak_of(allocate, mebibytes, before)
    assert mebibytes * MIB * 0.95 < peak < (mebibytes + 8) * MIB


@LINUX
def test_a_killed_process_is_one_line():
    with pytest.raises(AdaLAError, match="killed"):
        peak_of(die)


# --- floor -----------------------------------------------------------------------------------------------------------


def test_floor_is_measured_and_takes_the_slower_of_the_two():
    floor = measure_floor(torch.float32, scale=0.05)
    assert 1e8 < floor.bandwidth < 1e13 and 1e8 < floor.throughput < 1e16
    assert FLOOR.seconds(flops=1e11) == 1.0
    assert FLOOR.seconds(flops=1e11, bytes_moved=3e10) == 3.0


def test_work_of_the_operator():
    query = torch.empty(2, 3, 50, 8, dtype=torch.bfloat16, device="meta")
    flops, bytes_moved = operator_work(query, query, features=16, backward=False)
    assert flops == 2 * (2 * 2 * 3 * 50 * 16 * 8)  # state, and its product with the queries
    assert bytes_moved == 4 * 2 * 3 * 50 * 8 * 2
    assert operator_work(query, query, features=16, backward=True)[0] == 3 * flops


# --- right or refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", operators.BOUNDS)
@pytest.mark.parametrize("name", ["elu", "relu", "hedgehog"])
def test_every_linear_operator_is_right(name, dtype, backward):
    phi = build_feature_map(name, 3, 8)
    inputs = operators.operator_inputs(3, 3, 40, 8, dtype, requires_grad=backward)
    found = operators.operators(phi)
    assert operators.check_operator(found["linear"], inputs, phi, backward) <= operators.BOUNDS[dtype]
    assert operators.check_operator(found["plain PyTorch"], inputs, phi) <= operators.BOUNDS[dtype]


@pytest.mark.parametrize("case", ["value", "nan", "gradient"])
def test_a_wrong_operator_is_refused(case):
    phi = build_feature_map("elu", 2, 8)
    inputs = operators.operator_inputs(2, 2, 20, 8, requires_grad=True)
    wrong = {
        "value": lambda q, k, v: 1.001 * linear_attention(q, k, v, phi),
        "nan": lambda q, k, v: linear_attention(q, k, v, phi) * float("nan"),
        "gradient": lambda q, k, v: linear_attention(q, k.detach() + 0 * k, v, phi),
    }[case]
    with pytest.raises(AdaLAError, match=r"operator on 2x2x20x8 \(float32\).*no speed"):
        operators.check_operator(wrong, inputs, phi, backward=case == "gradient")


def test_a_wrong_model_gets_no_speed(run, checkpoint, monkeypatch, tmp_path):
    def wrong(model):
        return convert(checkpoint["teacher"], feature_map="relu", check_parity=False)

    monkeypatch.setattr(models, "reference_of", wrong)
    code, out, err = run(checkpoint["student"], "--dtype", "float32")
    assert (code, out) == (1, "")
    assert err.startswith("vit-adala bench: linear, 16x16, batch 1 (float32): the features differ")
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_reference_runs_pytorch_operators_in_float32(checkpoint, monkeypatch):
    model = models.open_model(checkpoint["student"], True, Settings(torch.bfloat16))
    reference, asked = models.reference_of(model), []

    def noted(*args, backend=None, **kwargs):
        asked.append(backend)
        return linear_attention(*args, backend=backend, **kwargs)

    monkeypatch.setattr(attention_interface, "linear_attention", noted)
    expected = models.expected_features(reference, torch.randn(1, 3, 32, 32))
    assert asked == ["torch"] * len(attention_modules(reference))
    assert expected.dtype == torch.float32
    assert model.dtype == torch.bfloat16 and model.config.backend is None


# --- break-even ------------------------------------------------------------------------------------------------------


def rows_of(times: dict[int, tuple[float, float]]) -> list[Row]:
    """Rows of linear and softmax for milliseconds by tokens."""
    rows = []
    for tokens, pair in times.items():
        for name, value in zip(("linear", "softmax"), pair, strict=True):
            timing = {"milliseconds": value, "lower_milliseconds": 0.99 * value, "upper_milliseconds": 1.01 * value}
            rows.append(Row(name, f"{tokens}x{tokens}", tokens, 1, 1, 0.1, **timing, speedup=pair[1] / value))
    return rows


def test_break_even_of_power_laws_is_found_between_the_sizes():
    rows = rows_of({tokens: (tokens, tokens**2 / 1000) for tokens in (100, 700, 3000)})
    tokens, side, between = find_crossing(rows, 1)
    assert tokens == pytest.approx(1000) and side == pytest.approx(1000)
    assert between == (700, 3000)
    assert "linear is slower than softmax at 100x100 (100 tokens), batch 1: 100 ms" in sentences(rows, "softmax")[0]
    assert "0.10x" in sentences(rows, "softmax")[0]


def test_break_even_that_was_not_measured_is_said_plainly():
    rows = rows_of({100: (2, 1), 200: (2, 3), 400: (4, 3)})  # faster once, but not in the end
    assert find_crossing(rows, 1) is None
    assert "none measured" in sentences(rows, "softmax")[-1]
    rows = rows_of({100: (1, 2), 200: (1, 4)})
    assert find_crossing(rows, 1) == (100, 100, None)
    assert "below what was measured" in sentences(rows, "softmax")[-1]


@pytest.mark.parametrize(("time", "within"), [(1.01, True), (1.1, False)])
def test_a_difference_within_the_spread_is_called_that(time, within):
    assert ("within the spread" in sentences(rows_of({8: (time, 1.0)}), "softmax")[0]) == within


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_json_and_picture_of_a_run(run, checkpoint, tmp_path):
    code, out, _ = run(checkpoint["config"], "--dtype", "float32", "--batch", "3", "--json")
    assert code == 0
    report = json.loads(out)
    assert [(r["name"], r["image_size"], r["batch"]) for r in report["rows"]] == [
        (name, size, 3) for size in ("16x16", "32x32") for name in ("linear", "softmax")
    ]
    for row in report["rows"]:
        assert row["lower_milliseconds"] <= row["milliseconds"] <= row["upper_milliseconds"]
        assert row["images_per_second"] == pytest.approx(1000 * row["batch"] / row["milliseconds"])
        assert row["floor_milliseconds"] == pytest.approx(1e3 * row["flops"] / 1e11)
        assert row["floor_share"] == pytest.approx(row["floor_milliseconds"] / row["milliseconds"])
        assert row["relative_error"] < 1e-4
        assert (row["peak_bytes"] is not None) == sys.platform.startswith("linux")
    assert report["backend"].keys() == {"name", "reason"} and report["threads"] == torch.get_num_threads()
    assert report["versions"]["torch"] == torch.__version__
    assert json.loads((tmp_path / "out" / "bench.json").read_text()) == report
    assert min(Image.open(tmp_path / "out" / "bench.png").size) > 300


def test_table_and_sentences_for_people(run, checkpoint):
    code, out, _ = run(checkpoint["student"], "--dtype", "bfloat16", "--backward", "--sizes", "16")
    assert code == 0
    for text in ("machine", "backend", "GB/s", "forward and backward pass", "16x16", "break-even with softmax"):
        assert text in out
    assert f"softmax is the teacher, {checkpoint['teacher']}" in out


def test_without_its_teacher_a_model_is_compared_with_itself(run, checkpoint, tmp_path):
    student = AdaLAViTModel.from_pretrained(checkpoint["student"])
    student.config.teacher_name_or_path = "somebody/gone"
    student.save_pretrained(tmp_path / "orphan")
    code, out, _ = run(str(tmp_path / "orphan"), "--json", "--dtype", "float32", "--max-seconds", "1e-9")
    report = json.loads(out)
    assert code == 0 and report["compare"] == str(tmp_path / "orphan")
    assert "its teacher is not on this machine" in " ".join(report["notes"])


def test_operator_alone(run, checkpoint):
    code, out, _ = run(
        checkpoint["student"], "--operator", "--json", "--backward", "--dtype", "float32", "--sizes", "32"
    )
    report = json.loads(out)
    assert code == 0 and report["baseline"] == "SDPA"
    assert {row["name"] for row in report["rows"]} == {*operators.operators(build_feature_map("elu", 1, 1))}
    assert {row["tokens"] for row in report["rows"]} == {17}
    errors = [row["relative_error"] for row in report["rows"] if row["name"] == "linear"]
    assert all(error <= 1e-5 for error in errors)


def test_cases_that_would_take_too_long_are_left_out_and_named(run, checkpoint):
    code, out, _ = run(checkpoint["config"], "--max-seconds", "1e-9", "--json", "--dtype", "float32")
    report = json.loads(out)
    assert code == 0 and all(row["milliseconds"] is None for row in report["rows"])
    assert "linear was not measured at 16x16 (5 tokens), batch 1: a pass would take" in report["sentences"][0]


@pytest.fixture
def exports(monkeypatch):
    """Puts a function of model and pixels in the place of the export of a model."""

    def put(features) -> None:
        monkeypatch.setattr(bench, "check_packages", lambda name: None)
        monkeypatch.setattr(bench, "package_versions", lambda name: {name: "1.0"})
        monkeypatch.setattr(runtimes, "export_features", lambda model, form: partial(features, model))

    return put


@pytest.mark.long
def test_exports_are_timed_beside_pytorch_and_checked_like_it(run, checkpoint, exports):
    exports(torch.no_grad()(forward_features))
    code, out, _ = run(checkpoint["student"], "--runtime", "onnx", "openvino", "--json", "--sizes", "16")
    report = json.loads(out)
    names = ["linear", "softmax", "linear, onnx", "softmax, onnx", "linear, openvino", "softmax, openvino"]
    assert code == 0 and [row["name"] for row in report["rows"]] == names and report["dtype"] == "float32"
    assert all(row["milliseconds"] > 0 and row["relative_error"] < 1e-6 for row in report["rows"])
    assert "ONNX Runtime: graphs of any size and batch, onnx 1.0" in report["notes"]
    exports(lambda model, pixels: forward_features(model, pixels).detach() + 0.01)
    code, out, err = run(checkpoint["student"], "--runtime", "onnx", "--sizes", "16")
    assert code == 1 and "linear, onnx, 16x16, batch 1" in err and "no speed is given" in err


def test_softmax_whose_weights_would_not_fit_is_left_out(checkpoint):
    config = models.check_source(checkpoint["config"])
    assert runtimes.too_large(config, Size(1, (16, 16), 10_000)) is None
    assert "attention weights would take 6 GB" in runtimes.too_large(config, Size(1, (16, 16), 20_000))


def test_backbone_has_no_features_to_time():
    backbone = MODELS["vit"]["Backbone"](tiny_config(MODELS["vit"]["Model"].config_class, num_hidden_layers=1))
    with pytest.raises(UsageError, match="holds a backbone"):
        runtimes.export_features(backbone, "onnx")


def test_default_sizes_are_rounded_to_whole_patches(checkpoint):
    config = models.check_source(checkpoint["config"])
    config.patch_size = 14
    sizes, rounded = bench._image_sizes(config, [])
    assert sizes == [(224, 224), (518, 518), (1022, 1022), (2044, 2044)]
    assert "512x512 -> 518x518" in rounded


REFUSED = {
    "dtype": (["--dtype", "int8"], 2, ("dtype='int8'", "bfloat16")),
    "device": (["--device", "tpu"], 2, ("device='tpu'", "cuda")),
    "size": (["--sizes", "32,45"], 2, ("45", "40 or 48")),
    "no size": (["--sizes", "big"], 2, ("sizes='big'",)),
    "batch": (["--batch", "1,0"], 2, ("batch=[1, 0]",)),
    "seconds": (["--max-seconds", "0"], 2, ("max_seconds=0", "above 0")),
    "teacher": (["--teacher", "@student"], 2, ("student",)),
    "missing": (["--teacher", "nobody/nothing"], 1, ("nobody/nothing",)),
}
REFUSED |= {
    "runtime": (["--runtime", "tensorrt"], 2, ("runtime='tensorrt'", "onnx, openvino")),
    "runtime's dtype": (["--runtime", "onnx", "--dtype", "bfloat16"], 2, ("runtime='onnx'", "drop --dtype")),
    "runtime backward": (["--runtime", "openvino", "--backward"], 2, ("runtime='openvino'", "drop --backward")),
}
if not torch.cuda.is_available():
    REFUSED["no GPU"] = (["--device", "cuda"], 2, ("device='cuda'", "--device cpu"))


@pytest.mark.parametrize("case", REFUSED)
def test_mistakes_are_named_before_any_time_is_spent(run, checkpoint, monkeypatch, case):
    monkeypatch.setattr(models, "open_model", lambda *args: pytest.fail("weights were opened"))
    options, expected, names = REFUSED[case]
    options = [checkpoint[option[1:]] if option.startswith("@") else option for option in options]
    code, out, err = run(checkpoint["teacher"], *options)
    assert (code, out) == (expected, "")
    assert err.startswith("vit-adala bench: ") and err.count("\n") == 1
    assert all(name in err for name in names), err


@pytest.mark.parametrize("family", MODELS)
def test_every_family_opens_from_its_configuration(family, tmp_path):
    config = tiny_config(stock_config_class(MODELS[family]))
    config.to_json_file(tmp_path / "config.json", use_diff=False)
    settings = Settings(torch.bfloat16)
    opened = {linear: models.open_model(str(tmp_path / "config.json"), linear, settings) for linear in (True, False)}
    assert all(hasattr(module, "feature_map") for module in attention_modules(opened[True]))
    assert vision_tower(opened[True]).config._attn_implementation == "adala"
    assert vision_tower(opened[False]).config._attn_implementation == "sdpa"
    pixels = models.images_of(opened[True].config, Size(1, (32, 32), 0), settings)
    for model in opened.values():
        features = forward_features(model, pixels)
        assert features.dtype == torch.bfloat16 and features.isfinite().all()


@pytest.mark.long
@pytest.mark.slow
def test_compiled_passes_stand_beside_eager_ones(run, checkpoint):
    code, out, _ = run(checkpoint["config"], "--compile", "--json", "--dtype", "float32", "--sizes", "32")
    assert code == 0
    names = [row["name"] for row in json.loads(out)["rows"]]
    assert names == ["linear", "softmax", "linear, compiled", "softmax, compiled"]
