"""`evaluate.Metric` classes that need no network, around the functions of `metric_functions`.

They are instantiated directly (no `evaluate.load`) and take part in `evaluate.combine([Accuracy(), ...])`. They keep
running sums instead of the Arrow cache of `evaluate`, which turns every pixel and every feature into a Python object:
memory stays constant, nothing is written to disk, and maps of different sizes can be mixed.
"""

from typing import Any, ClassVar

import evaluate
import numpy as np
from datasets import Features, Sequence, Value

from modeling_adala.errors import DataError, UsageError

from .metric_functions import (
    accuracy,
    as_pair,
    as_tensor,
    confusion_matrix,
    cosine_similarity_mean,
    iou_from_confusion,
    knn_predict,
    root_ratio,
)


class _StreamingMetric(evaluate.Metric):
    """An `evaluate.Metric` with running sums: `_update` takes a batch, `_result` ends it, `_reset` starts anew."""

    _description: ClassVar[str]
    _features: ClassVar[tuple[Any, Any]]

    def __init__(self, **kwargs: Any) -> None:
        if kwargs.get("num_process", 1) != 1:
            raise UsageError(
                f"num_process={kwargs['num_process']}: running sums live in one process; pass it the batches of all"
                " processes, from accelerator.gather_for_metrics"
            )
        super().__init__(**kwargs)
        self._count = 0
        self._reset()

    def _info(self) -> evaluate.EvaluationModuleInfo:
        return evaluate.EvaluationModuleInfo(
            description=self._description,
            citation="",
            inputs_description=self._description,
            features=Features(dict(zip(("predictions", "references"), self._features, strict=True))),
        )

    def _build_data_dir(self) -> str:
        # The base class creates a cache folder here, which fails on a read-only home and would stay empty.
        return self._data_dir_root

    def __len__(self) -> int:
        return self._count

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Add one prediction and its reference."""
        self.add_batch(predictions=[prediction], references=[reference], **kwargs)

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Add predictions and references, equally many of both."""
        if kwargs:
            raise UsageError(
                f"{sorted(kwargs)}: unknown to {type(self).__name__}, which takes predictions, references"
            )
        if predictions is None or references is None or len(predictions) != len(references):
            sizes = [None if x is None else len(x) for x in (predictions, references)]
            raise UsageError(f"{sizes[0]} predictions and {sizes[1]} references: pass equally many of both")
        if len(predictions) > 0:
            self._update(predictions, references)
            self._count += len(predictions)

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, Any]:
        """Result over all that was added, and over the arguments if given; the next `compute` starts anew."""
        if predictions is not None or references is not None or kwargs:
            self.add_batch(predictions=predictions, references=references, **kwargs)
        if self._count == 0:
            raise DataError(f"{type(self).__name__} has 0 predictions: call add_batch, or pass them to compute")
        result = self._result()
        self._count = 0
        self._reset()
        return result

    def _reset(self) -> None:
        raise NotImplementedError

    def _update(self, predictions: Any, references: Any) -> None:
        raise NotImplementedError

    def _result(self) -> dict[str, Any]:
        raise NotImplementedError


class _MeanMetric(_StreamingMetric):
    """A streaming metric that is a mean over examples."""

    _key: ClassVar[str]

    def _reset(self) -> None:
        self._sum = 0.0

    def _result(self) -> dict[str, float]:
        return {self._key: self._sum / self._count}


class Accuracy(_MeanMetric):
    """Share of correct labels; see [`accuracy`]. `compute` returns `{"accuracy": float}`."""

    _description = "Predictions (n,), or logits (n, classes), against integer labels (n,)."
    _features = (Value("int64"), Value("int64"))
    _key = "accuracy"

    def _update(self, predictions: Any, references: Any) -> None:
        self._sum += accuracy(predictions, references) * len(references)


class KNNAccuracy(_MeanMetric):
    """Accuracy of weighted k-NN with the features given as predictions; see [`knn_predict`].

    `compute(predictions=features (m, dim), references=labels (m,))` returns `{"knn_accuracy": float}`.

    Args:
        train_features: Known features `(n, dim)`.
        train_labels: Their labels `(n,)`.
        k: Number of neighbors.
        temperature: Of the votes.
        kwargs: Passed to `evaluate.Metric`.
    """

    _description = "Features (m, dim) as predictions against integer labels (m,) as references."
    _features = (Sequence(Value("float32")), Value("int64"))
    _key = "knn_accuracy"

    def __init__(
        self, train_features: Any, train_labels: Any, k: int = 20, temperature: float = 0.07, **kwargs: Any
    ) -> None:
        self._bank = {"train_features": as_tensor(train_features), "train_labels": train_labels}
        self._k, self._temperature = k, temperature
        super().__init__(**kwargs)

    def _update(self, predictions: Any, references: Any) -> None:
        predicted = knn_predict(**self._bank, features=predictions, k=self._k, temperature=self._temperature)
        self._sum += accuracy(predicted, references) * len(references)


class FeatureCosine(_MeanMetric):
    """Mean cosine of student rows (predictions) with teacher rows (references): `{"feature_cosine": float}`."""

    _description = "Student features (n, dim) as predictions against teacher features (n, dim) as references."
    _features = (Sequence(Value("float32")), Sequence(Value("float32")))
    _key = "feature_cosine"

    def _update(self, predictions: Any, references: Any) -> None:
        self._sum += cosine_similarity_mean(predictions, references) * len(references)


class FeatureRelativeError(_StreamingMetric):
    """[`relative_error`] of student rows (predictions) to teacher rows (references): `{"relative_error": float}`."""

    _description = FeatureCosine._description
    _features = FeatureCosine._features

    def _reset(self) -> None:
        self._squares = [0.0, 0.0]

    def _update(self, predictions: Any, references: Any) -> None:
        student, teacher = as_pair(predictions, references)
        self._squares[0] += (student - teacher).square().sum().item()
        self._squares[1] += teacher.square().sum().item()

    def _result(self) -> dict[str, float]:
        return {"relative_error": root_ratio(*self._squares)}


class MeanIoU(_StreamingMetric):
    """Mean intersection over union of label maps; see [`iou_from_confusion`] for what `compute` returns.

    Predictions and references are sequences of 2-D integer maps; sizes may differ between images.

    Args:
        num_labels: Number of classes.
        ignore_index: Reference label whose pixels do not count. `None` counts all.
        kwargs: Passed to `evaluate.Metric`.
    """

    _description = "Predicted label maps (height, width) against true ones; sizes may differ between images."
    _features = (Sequence(Sequence(Value("int64"))), Sequence(Sequence(Value("int64"))))

    def __init__(self, num_labels: int, ignore_index: int | None = 255, **kwargs: Any) -> None:
        if num_labels < 1:
            raise UsageError(f"num_labels={num_labels}: must be the number of classes, 1 or more")
        self.num_labels, self.ignore_index = num_labels, ignore_index
        super().__init__(**kwargs)

    def _reset(self) -> None:
        self._confusion = np.zeros((self.num_labels, self.num_labels), dtype=np.int64)

    def _update(self, predictions: Any, references: Any) -> None:
        # Summed first, so that an image that is refused does not leave half a batch behind.
        pairs = zip(predictions, references, strict=True)
        self._confusion += sum(confusion_matrix(p, r, self.num_labels, self.ignore_index) for p, r in pairs)

    def _result(self) -> dict[str, Any]:
        return iou_from_confusion(self._confusion)
