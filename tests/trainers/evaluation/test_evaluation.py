"""Teacher beside student on tiny random models: values against plain formulas over all tokens kept in memory."""

import copy
import json

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch.nn.functional import cosine_similarity
from torch.utils.data import DataLoader
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTForImageClassification, ViTModel

import trainers.evaluation.probes as evaluation
from modeling_adala.errors import AdaLAError, DataError, UsageError
from modeling_adala.inspection.towers import forward_features
from trainers.evaluation.probes import (
    FeatureBank,
    compare_features,
    evaluate_pair,
    extract_features,
    linear_probe,
    unwrap,
)

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 4,
    "initializer_range": 0.2,
}


def make_vit(cls=ViTModel, **kwargs):
    torch.manual_seed(0)
    return cls(ViTConfig(**SIZES, **kwargs))


def perturbed(model, scale=0.05):
    student = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return student


def make_loader(count=24, size=16, batch_size=10, labels=True, seed=0):
    """Images of three classes, each class a pattern with noise."""
    patterns = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(7))
    noise = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))
    rows = []
    for i in range(count):
        rows.append({"pixel_values": patterns[i % 3] + 2.5 * noise[i]} | ({"labels": i % 3} if labels else {}))
    return DataLoader(rows, batch_size=batch_size)


@torch.no_grad()
def all_features(model, loader, **kwargs):
    return torch.cat([model.eval()(batch["pixel_values"], **kwargs).last_hidden_state for batch in loader])


class TestForwardFeatures:
    @pytest.mark.parametrize("size", [(16, 16), (24, 32)])
    def test_vit_at_any_size(self, size):
        model, images = make_vit().eval(), torch.randn(2, 3, *size)
        expected = model(images, interpolate_pos_encoding=size != (16, 16)).last_hidden_state
        torch.testing.assert_close(forward_features(model, images), expected, rtol=0, atol=0)

    @pytest.mark.parametrize("size", [16, 24])
    def test_dinov2_at_any_size(self, size):
        model, images = Dinov2Model(Dinov2Config(**SIZES)).eval(), torch.randn(2, 3, size, size)
        features = forward_features(model, images)
        assert features.shape == (2, 1 + (size // 4) ** 2, 32)
        torch.testing.assert_close(features, model(images).last_hidden_state, rtol=0, atol=0)

    def test_head_is_left_out_and_gradients_flow(self):
        model, images = make_vit(ViTForImageClassification), torch.randn(2, 3, 24, 24)
        features = forward_features(model, images)
        assert features.shape == (2, 37, 32)
        features.sum().backward()
        assert model.vit.embeddings.cls_token.grad is not None
        assert model.classifier.weight.grad is None

    def test_peft_adapters_are_active(self):
        peft = pytest.importorskip("peft")
        base, images = make_vit().eval(), torch.randn(2, 3, 24, 24)
        expected = forward_features(base, images)
        lora = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
        adapted = peft.get_peft_model(base, lora).eval()
        assert not torch.allclose(forward_features(unwrap(adapted), images), expected)
        with adapted.disable_adapter():
            torch.testing.assert_close(forward_features(unwrap(adapted), images), expected)


class TestExtractFeatures:
    def test_values(self):
        model, loader = make_vit(), make_loader(size=24)
        bank = extract_features(model, loader)
        features = all_features(model, loader, interpolate_pos_encoding=True)
        torch.testing.assert_close(bank.cls, features[:, 0])
        torch.testing.assert_close(bank.patch_mean, features[:, 1:].mean(1))
        assert bank.labels.tolist() == [0, 1, 2] * 8
        assert len(bank) == 24 and not bank.cls.requires_grad

    def test_modes_are_restored_also_after_an_error(self):
        model = make_vit().train()
        model.layernorm.eval()
        modes = {name: module.training for name, module in model.named_modules()}
        extract_features(model, make_loader())
        assert {name: module.training for name, module in model.named_modules()} == modes
        with pytest.raises(DataError, match="pixel_values"):
            extract_features(model, [{"images": torch.zeros(1)}])
        assert {name: module.training for name, module in model.named_modules()} == modes

    def test_dropout_is_off_while_training(self):
        model = make_vit(hidden_dropout_prob=0.5).train()
        torch.testing.assert_close(*(extract_features(model, make_loader()).cls for _ in range(2)), rtol=0, atol=0)

    def test_labels_other_than_one_per_image_are_left_out(self):
        assert extract_features(make_vit(), make_loader(labels=False)).labels is None
        batch = {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.zeros(2, 16, 16, dtype=torch.long)}
        assert extract_features(make_vit(), [batch]).labels is None

    def test_autocast_and_other_dtypes(self):
        loader, expected = make_loader(4), extract_features(make_vit(), make_loader(4)).cls
        half = extract_features(make_vit(), loader, autocast_dtype=torch.bfloat16).cls
        assert half.dtype == torch.float32
        assert 0 < (half - expected).norm() / expected.norm() < 0.05
        assert extract_features(make_vit().double(), loader).cls.dtype == torch.float32
        assert extract_features(make_vit().bfloat16(), loader).cls.dtype == torch.float32

    def test_no_batches_and_no_numbers(self):
        with pytest.raises(DataError, match="0 batches"):
            extract_features(make_vit(), [])
        model = make_vit()
        torch.nn.init.constant_(model.layernorm.weight, float("nan"))
        with pytest.raises(AdaLAError, match="diverged"):
            extract_features(model, make_loader(4))


class TestCompareFeatures:
    @pytest.mark.parametrize("registers", [0, 3])
    def test_against_all_tokens_in_memory(self, registers, monkeypatch):
        groups = {"cls": slice(0, 1), "patches": slice(1 + registers, None)}
        if registers:
            groups["registers"] = slice(1, 1 + registers)
            # ViT has no registers, so some patches stand in for them.
            monkeypatch.setattr(evaluation, "token_groups", lambda config: groups)
        teacher, loader = make_vit(), make_loader(size=24)
        student = perturbed(teacher)
        metrics, teacher_bank, student_bank = compare_features(teacher, student, loader)
        t, s = (all_features(m, loader, interpolate_pos_encoding=True).double() for m in (teacher, student))
        expected = {"relative_error": (s - t).norm() / t.norm()}
        for name, where in groups.items():
            expected[f"{name}_cosine"] = cosine_similarity(s[:, where], t[:, where], dim=-1).mean()
            expected[f"{name}_relative_error"] = (s - t)[:, where].norm() / t[:, where].norm()
        means = [x[:, groups["patches"]].mean(1) for x in (s, t)]
        expected["patch_mean_cosine"] = cosine_similarity(*means, dim=-1).mean()
        assert metrics == {key: pytest.approx(value.item(), rel=1e-5) for key, value in expected.items()}
        torch.testing.assert_close(teacher_bank.cls, extract_features(teacher, loader).cls)
        torch.testing.assert_close(student_bank.patch_mean, extract_features(student, loader).patch_mean)

    def test_result_does_not_depend_on_the_batch_size(self):
        teacher, student = make_vit(), perturbed(make_vit())
        one, other = (compare_features(teacher, student, make_loader(batch_size=size))[0] for size in (1, 24))
        assert one == pytest.approx(other, rel=1e-5)

    def test_another_width_is_refused(self):
        student = ViTModel(ViTConfig(**SIZES | {"hidden_size": 16}))
        with pytest.raises(UsageError, match="converted from"):
            compare_features(make_vit(), student, make_loader(4))


class TestLinearProbe:
    def test_against_sklearn(self):
        rng = np.random.default_rng(0)
        banks = []
        for count in (90, 60):
            labels = torch.tensor(rng.integers(0, 3, count))
            cls, mean = (torch.tensor(rng.normal(size=(count, 6)) + labels.numpy()[:, None] / 2).float() for _ in "ab")
            banks.append(FeatureBank(cls, 50 * mean, labels))
        inputs = [torch.cat([bank.cls, bank.patch_mean], 1).double().numpy() for bank in banks]
        scaler = StandardScaler().fit(inputs[0])
        reference = LogisticRegression(max_iter=5000, tol=1e-8).fit(scaler.transform(inputs[0]), banks[0].labels)
        expected = reference.score(scaler.transform(inputs[1]), banks[1].labels)
        assert 0.4 < expected < 1
        assert linear_probe(*banks) == pytest.approx(expected, abs=1.01 / 60)
        assert linear_probe(*banks) == linear_probe(*banks)

    def test_one_class(self):
        train = FeatureBank(torch.randn(4, 2), torch.randn(4, 2), torch.full((4,), 7))
        test = FeatureBank(torch.randn(4, 2), torch.randn(4, 2), torch.tensor([7, 7, 7, 1]))
        assert linear_probe(train, test) == 0.75

    @pytest.mark.filterwarnings("error")
    def test_bounded_iterations_without_warnings(self):
        bank = FeatureBank(torch.randn(40, 8), torch.randn(40, 8), torch.randint(0, 3, (40,)))
        assert 0 <= linear_probe(bank, bank, max_iter=1) <= 1

    def test_labels_are_required(self):
        bank = FeatureBank(torch.randn(4, 2), torch.randn(4, 2))
        with pytest.raises(UsageError, match="labels"):
            linear_probe(bank, bank)


class TestEvaluatePair:
    def test_same_model_twice(self):
        teacher = make_vit()
        result = evaluate_pair(teacher, copy.deepcopy(teacher), make_loader(60), make_loader(30, seed=1), k=5)
        cosines = [value for key, value in result.items() if key.endswith("_cosine")]
        errors = [value for key, value in result.items() if key.endswith("relative_error")]
        assert cosines == pytest.approx([1, 1, 1]) and errors == [0, 0, 0]
        assert result["student_knn_accuracy"] == result["teacher_knn_accuracy"] > 1 / 3
        assert result["student_linear_probe_accuracy"] == result["teacher_linear_probe_accuracy"] > 1 / 3
        assert result["knn_retention"] == 1
        assert (result["num_train_images"], result["num_eval_images"]) == (60, 30)
        assert result["seconds"] > 0
        assert json.loads(json.dumps(result)) == result

    @pytest.mark.parametrize("make", [make_vit, lambda: Dinov2Model(Dinov2Config(**SIZES, layerscale_value=0.5))])
    def test_a_perturbed_student_is_further_away(self, make):
        teacher = make()
        results = []
        for scale in (0.01, 0.1):
            results.append(evaluate_pair(teacher, perturbed(teacher, scale), None, make_loader(size=24)))
        near, far = results
        for key in ("cls_cosine", "patches_cosine", "patch_mean_cosine"):
            assert 1 > near[key] > far[key]
        for key in ("cls_relative_error", "patches_relative_error", "relative_error"):
            assert 0 < near[key] < far[key]

    def test_without_training_images_or_labels(self):
        teacher = make_vit()
        for train, test in (
            (None, make_loader()),
            (make_loader(), make_loader(labels=False)),
            (make_loader(labels=False), make_loader()),
        ):
            result = evaluate_pair(teacher, teacher, train, test)
            assert not [key for key in result if "knn" in key or "probe" in key]
            assert result["num_train_images"] == 0 and result["num_eval_images"] == 24

    def test_teacher_bank_saves_a_pass(self, monkeypatch):
        teacher, student, train, test = make_vit(), perturbed(make_vit()), make_loader(60), make_loader(30, seed=1)
        expected = evaluate_pair(teacher, student, train, test, probe=False)
        bank, ran = extract_features(teacher, train), []
        teacher.register_forward_hook(lambda *_: ran.append(1))
        result = evaluate_pair(teacher, student, train, test, probe=False, teacher_train_bank=bank)
        assert len(ran) == len(test)
        assert {**result, "seconds": 0} == {**expected, "seconds": 0}
        with pytest.raises(UsageError, match="teacher_train_bank"):
            unlabeled = FeatureBank(bank.cls, bank.patch_mean)
            evaluate_pair(teacher, student, train, test, teacher_train_bank=unlabeled)
