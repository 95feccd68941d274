"""Metrics against formulas written out independently, in numpy or by hand."""

import math

import evaluate
import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix as sklearn_confusion_matrix
from sklearn.metrics import jaccard_score
from transformers import EvalPrediction

from modeling_adala.errors import DataError, UsageError
from trainers.evaluation.metrics import (
    Accuracy,
    FeatureCosine,
    FeatureRelativeError,
    KNNAccuracy,
    MeanIoU,
    compute_accuracy,
)

RNG = np.random.default_rng(0)


def accuracy(predictions, references):
    return Accuracy().compute(predictions=predictions, references=references)["accuracy"]


def cosine(student, teacher):
    return FeatureCosine().compute(predictions=student, references=teacher)["cosine"]


def relative_error(student, teacher):
    return FeatureRelativeError().compute(predictions=student, references=teacher)["relative_error"]


def mean_iou(predictions, references, num_labels, **options):
    return MeanIoU(num_labels, **options).compute(predictions=predictions, references=references)


def dino_knn(train, train_labels, queries, k, temperature):
    """DINO's k-NN in loops."""
    train = train / np.linalg.norm(train, axis=1, keepdims=True)
    queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    predictions = []
    for query in queries:
        cosines = train @ query
        votes = {}
        for i in np.argsort(-cosines)[:k]:
            votes[train_labels[i]] = votes.get(train_labels[i], 0) + math.exp(cosines[i] / temperature)
        predictions.append(max(votes, key=votes.get))
    return np.array(predictions)


class TestAccuracy:
    def test_predictions_and_logits(self):
        logits = torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0], [0.0, 1.0]])
        labels = [0, 1, 1, 1]
        assert accuracy([0, 1, 0, 1], labels) == 0.75
        assert accuracy(logits, labels) == 0.75
        assert accuracy(logits.bfloat16(), torch.tensor(labels)) == 0.75
        assert accuracy(logits.numpy(), np.array(labels, dtype=np.uint16)) == 0.75

    def test_mistakes(self):
        with pytest.raises(UsageError, match="shape"):
            accuracy(np.zeros((3, 2, 2), int), [0, 1, 2])
        with pytest.raises(UsageError, match="integer labels"):
            accuracy(torch.rand(3), [0, 1, 2])

    def test_compute_accuracy(self):
        logits, labels = np.eye(3), np.array([0, 1, 0])
        assert compute_accuracy(EvalPrediction(logits, labels)) == {"accuracy": pytest.approx(2 / 3)}
        assert compute_accuracy(EvalPrediction((logits, np.zeros(3)), labels)) == {"accuracy": pytest.approx(2 / 3)}

    def test_batches_and_single_examples_agree(self):
        metric = Accuracy()
        metric.add_batch(predictions=[1, 0], references=torch.tensor([1, 1]))
        metric.add(prediction=2, reference=2)
        assert len(metric) == 3
        assert metric.compute() == {"accuracy": pytest.approx(2 / 3)}
        assert metric.compute(predictions=[5], references=[5]) == {"accuracy": 1.0}, "compute must start anew"

    def test_mistakes_of_the_metric(self):
        with pytest.raises(DataError, match="add_batch"):
            Accuracy().compute()
        with pytest.raises(UsageError, match="2 predictions and 1 references"):
            Accuracy().compute(predictions=[1, 2], references=[1])
        with pytest.raises(UsageError, match="normalize"):
            Accuracy().compute(predictions=[1], references=[1], normalize=False)
        with pytest.raises(UsageError, match="num_process=2"):
            Accuracy(num_process=2)


class TestMeanIoU:
    def test_by_hand(self):
        references = np.array([[0, 0, 1], [1, 255, 1]])
        predictions = np.array([[0, 1, 1], [1, 3, 0]])
        result = MeanIoU(num_labels=4).compute(predictions=[predictions], references=[references])
        assert result["per_category_iou"][:2] == pytest.approx([1 / 3, 2 / 4])
        assert all(math.isnan(value) for value in result["per_category_iou"][2:])
        assert result["mean_iou"] == pytest.approx((1 / 3 + 1 / 2) / 2)
        assert result["mean_accuracy"] == pytest.approx((1 / 2 + 2 / 3) / 2)
        assert result["overall_accuracy"] == pytest.approx(3 / 5)

    def test_against_sklearn_with_sizes_that_differ(self):
        sizes = [(5, 7), (1, 9), (6, 6)]
        references = [RNG.integers(0, 4, size) for size in sizes]
        predictions = [RNG.integers(0, 4, size) for size in sizes]
        metric = MeanIoU(num_labels=4)
        metric.add_batch(predictions=predictions[:2], references=references[:2])
        metric.add(prediction=torch.tensor(predictions[2]), reference=references[2].astype(np.uint8))
        result = metric.compute()
        true, predicted = (np.concatenate([m.ravel() for m in maps]) for maps in (references, predictions))
        assert result["per_category_iou"] == pytest.approx(jaccard_score(true, predicted, average=None))
        assert result["mean_iou"] == pytest.approx(jaccard_score(true, predicted, average="macro"))
        assert np.array_equal(MeanIoU(4).sums(predictions, references), sklearn_confusion_matrix(true, predicted))

    def test_stacked_tensors(self):
        maps = torch.randint(0, 3, (2, 4, 4))
        assert MeanIoU(num_labels=3).compute(predictions=maps, references=maps)["mean_iou"] == 1.0

    @pytest.mark.filterwarnings("error")
    def test_all_ignored_is_nan_without_warnings(self):
        ignored = np.full((3, 3), 255)
        result = MeanIoU(num_labels=2).compute(predictions=[np.zeros((3, 3), int)], references=[ignored])
        numbers = [*result.pop("per_category_iou"), *result.values()]
        assert len(numbers) == 5 and all(math.isnan(number) for number in numbers)

    def test_a_class_only_predicted_counts_as_zero(self):
        result = mean_iou([[0, 1]], [[0, 0]], num_labels=2)
        assert result["per_category_iou"] == [0.5, 0.0]
        assert result["mean_accuracy"] == 0.5

    def test_no_ignore_index(self):
        assert MeanIoU(2, ignore_index=None).sums([[1, 0]], [[1, 1]]).tolist() == [[0, 0], [1, 1]]

    def test_sums_of_several_processes(self):
        maps = [RNG.integers(0, 3, (4, 5)) for _ in range(4)]
        metric = MeanIoU(3)
        for part in (slice(0, 1), slice(1, 2)):
            metric.add_sums(metric.sums(maps[part], maps[2:][part]), 1)
        assert metric.compute() == mean_iou(maps[:2], maps[2:], 3)

    def test_mistakes(self):
        with pytest.raises(UsageError, match=r"num_labels=2"):
            mean_iou([[0, 2]], [[0, 1]], num_labels=2)
        with pytest.raises(UsageError, match="ignore_index"):
            mean_iou([[0, 0]], [[0, 255]], num_labels=2, ignore_index=None)
        with pytest.raises(UsageError, match="resize"):
            MeanIoU(num_labels=2).compute(predictions=[np.zeros((2, 2), int)], references=[np.zeros((4, 4), int)])
        with pytest.raises(UsageError, match="argmax"):
            mean_iou([np.random.rand(2, 2)], [np.zeros((2, 2), int)], num_labels=2)
        with pytest.raises(UsageError, match="num_labels=0"):
            MeanIoU(num_labels=0)

    def test_a_refused_batch_leaves_nothing_behind(self):
        metric, good, bad = MeanIoU(num_labels=2), np.zeros((2, 2), int), np.full((2, 2), 7)
        with pytest.raises(UsageError):
            metric.add_batch(predictions=[1 - good, bad], references=[good, good])
        assert metric.compute(predictions=[good], references=[good])["overall_accuracy"] == 1.0


class TestKNN:
    def test_against_loops_and_batch_by_batch(self):
        train, queries = RNG.normal(size=(60, 8)), RNG.normal(size=(33, 8))
        labels, true = RNG.choice([-3, 4, 900], 60), RNG.choice([-3, 4, 900], 33)
        for k, temperature in ((1, 0.07), (5, 0.07), (20, 1.0), (200, 0.07)):
            expected = (dino_knn(train, labels, queries, k, temperature) == true).mean()
            metric = KNNAccuracy(train, labels, k, temperature)
            whole = metric.compute(predictions=torch.tensor(queries), references=true)
            assert whole == {"knn_accuracy": pytest.approx(expected)}
            metric.add_batch(predictions=queries[:4], references=true[:4])
            metric.add_batch(predictions=queries[4:].tolist(), references=true[4:])
            assert metric.compute() == whole

    def test_zero_vectors_and_small_temperatures_stay_finite(self):
        train, labels = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]), [0, 1, 1]
        near = KNNAccuracy(train, labels, k=3, temperature=1e-4)
        assert near.compute(predictions=torch.tensor([[2.0, 0.1]]), references=[0])["knn_accuracy"] == 1
        zero = KNNAccuracy(train, labels, k=3).compute(predictions=torch.zeros(1, 2), references=[1])
        assert zero["knn_accuracy"] == 1, "equal cosines: the majority"

    def test_mistakes(self):
        with pytest.raises(UsageError, match="k=0"):
            KNNAccuracy(np.ones((2, 3)), [0, 1], k=0)
        with pytest.raises(UsageError, match=r"\(m,\)"):
            KNNAccuracy(np.ones((2, 3)), [0])
        with pytest.raises(UsageError, match=r"\(n, 3\)"):
            KNNAccuracy(np.ones((2, 3)), [0, 1]).compute(predictions=np.ones((1, 4)), references=[0])
        with pytest.raises(DataError, match="empty"):
            KNNAccuracy(np.ones((0, 3)), np.ones(0, int))


class TestFeatureDistances:
    def test_against_numpy(self):
        student, teacher = RNG.normal(size=(30, 5)), RNG.normal(size=(30, 5))
        norms = np.linalg.norm(student, axis=1) * np.linalg.norm(teacher, axis=1)
        expected = ((student * teacher).sum(1) / norms).mean()
        error = np.linalg.norm(student - teacher) / np.linalg.norm(teacher)
        assert cosine(student, teacher) == pytest.approx(expected, rel=1e-12)
        assert relative_error(torch.tensor(student), torch.tensor(teacher)) == pytest.approx(error, rel=1e-12)

        both = evaluate.combine([FeatureCosine(), FeatureRelativeError()])
        both.add_batch(predictions=student[:11], references=teacher[:11])
        both.add_batch(predictions=student[11:].tolist(), references=teacher[11:].tolist())
        assert both.compute() == {"cosine": pytest.approx(expected), "relative_error": pytest.approx(error)}

    def test_equal_features(self):
        features = torch.randn(2, 7, 5)
        assert cosine(features, features) == pytest.approx(1)
        assert relative_error(features.bfloat16(), features.bfloat16()) == 0

    def test_zero_vectors(self):
        zeros, ones = np.zeros((2, 3)), np.ones((2, 3))
        assert cosine(zeros, ones) == 0
        assert cosine(zeros, zeros) == 0
        assert relative_error(zeros, ones) == 1
        assert relative_error(ones, zeros) == math.inf
        assert relative_error(zeros, zeros) == 0

    def test_tiny_values_do_not_underflow(self):
        tiny = np.full((2, 3), 1e-25, dtype=np.float32)
        assert cosine(tiny, tiny) == pytest.approx(1)

    def test_shapes_that_differ(self):
        with pytest.raises(UsageError, match="converted from"):
            relative_error(np.ones((2, 3)), np.ones((2, 4)))


class TestEvaluateModules:
    def test_combine_of_classification_metrics(self):
        combined = evaluate.combine([Accuracy(), MeanIoU(num_labels=3)])
        maps = np.array([[[0, 1], [2, 2]]]), np.array([[[0, 1], [2, 1]]])
        result = combined.compute(predictions=maps[0], references=maps[1])
        assert result["overall_accuracy"] == result["accuracy"] == 0.75

    def test_nothing_is_written(self, tmp_path):
        metric = Accuracy(cache_dir=str(tmp_path / "cache"))
        metric.compute(predictions=[1], references=[1])
        assert not (tmp_path / "cache").exists()

    def test_names_and_description(self):
        metric = FeatureCosine()
        assert isinstance(metric, evaluate.Metric)
        assert set(metric.features) == {"predictions", "references"}
        assert '{"cosine": float}' in repr(metric)
