"""`evaluate.Metric` classes that need no network: accuracy, k-NN, distances between features, mean IoU.

They are instantiated directly (no `evaluate.load`) and take part in `evaluate.combine([FeatureCosine(), ...])`. They
keep running sums instead of the Arrow cache of `evaluate`, which turns every pixel and every feature into a Python
object: memory stays constant, nothing is written to disk, and maps of different sizes can be mixed.
"""

from typing import Any

import evaluate
import numpy as np
import torch
from datasets import Features, Sequence, Value
from torch import Tensor
from torch.nn.functional import normalize
from transformers import EvalPrediction

from modeling_adala.errors import DataError, UsageError

_LABEL, _ROW = Value("int64"), Sequence(Value("float32"))
_CHUNK = 4096  # rows whose votes for all classes are held at a time


class StreamingMetric(evaluate.Metric):
    """Base of metrics that are a function of sums over the examples: `sums` of a batch, `result` of all of them."""

    inputs = _LABEL, _LABEL

    def __init__(self, **kwargs: Any) -> None:
        if kwargs.get("num_process", 1) != 1:
            raise UsageError(
                f"num_process={kwargs['num_process']}: running sums live in one process; pass the batches of all"
                " processes, from accelerator.gather_for_metrics."
            )
        super().__init__(**kwargs)
        self._count, self._total = 0, 0.0

    def sums(self, predictions: Any, references: Any) -> Any:
        """Return the sums over a batch, an array or a tensor."""
        raise NotImplementedError

    def result(self, total: Any) -> dict[str, Any]:
        """Return the figures that follow from the sums over all batches."""
        raise NotImplementedError

    def add_sums(self, sums: Any, count: int) -> None:
        """Add `sums` of `count` examples, such as those of other processes."""
        self._total, self._count = self._total + sums, self._count + count

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Add one prediction and its reference."""
        self.add_batch(predictions=[prediction], references=[reference], **kwargs)

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Add predictions and references, equally many of both."""
        if kwargs:
            raise UsageError(f"{sorted(kwargs)}: {type(self).__name__} takes predictions and references only.")
        sizes = [None if values is None else len(values) for values in (predictions, references)]
        if None in sizes or sizes[0] != sizes[1]:
            raise UsageError(f"{sizes[0]} predictions and {sizes[1]} references; pass equally many of both.")
        if sizes[0]:
            self.add_sums(self.sums(predictions, references), sizes[0])

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, Any]:
        """Return the result over all that was added, and over the arguments if given, and start anew."""
        if predictions is not None or references is not None or kwargs:
            self.add_batch(predictions=predictions, references=references, **kwargs)
        if self._count == 0:
            raise DataError(f"{type(self).__name__} has 0 predictions; call add_batch, or pass them to compute.")
        total, self._count, self._total = self._total, 0, 0.0
        return self.result(total)

    def __len__(self) -> int:
        return self._count

    def _info(self) -> evaluate.EvaluationModuleInfo:
        description = (type(self).__doc__ or "").splitlines()[0]
        features = Features(dict(zip(("predictions", "references"), self.inputs, strict=True)))
        return evaluate.EvaluationModuleInfo(description, "", features, inputs_description=description)

    def _build_data_dir(self) -> str:
        # the base class creates a cache folder here, which fails on a read-only home and would stay empty
        return self._data_dir_root


class Accuracy(StreamingMetric):
    """Share of correct labels: `{"accuracy": float}` of predictions `(n,)` or logits `(n, classes)`, and labels.

    Example:

    ```python
    accuracy = Accuracy()
    accuracy.add_batch(predictions=[1, 2, 2], references=[1, 2, 0])
    print(accuracy.compute())  # {"accuracy": 0.666...}
    ```
    """

    def sums(self, predictions: Any, references: Any) -> np.ndarray:
        from sklearn.metrics import accuracy_score  # here, because it takes two seconds

        true, given = _integers(references, "references"), _tensor(predictions)
        predicted = _integers(given.argmax(dim=-1) if given.ndim == true.ndim + 1 else given, "predictions")
        if predicted.shape != true.shape:
            raise UsageError(
                f"predictions has shape {predicted.shape} but references {true.shape}; pass one prediction, or one row"
                " of logits, per label."
            )
        return np.array([accuracy_score(true.ravel(), predicted.ravel(), normalize=False), true.size])

    def result(self, total: np.ndarray) -> dict[str, float]:
        return {"accuracy": float(total[0] / total[1])}


class KNNAccuracy(Accuracy):
    """Accuracy of DINO's weighted k nearest neighbors: `{"knn_accuracy": float}` of features `(n, dim)` and labels.

    Each neighbor votes with exp(cosine / temperature).

    Args:
        train_features (`Tensor` or array): Known features `(m, dim)`.
        train_labels (`Tensor` or array): Their labels `(m,)`, any integers.
        k (`int`, *optional*, defaults to 20): Number of neighbors; all `m` when `k` is larger.
        temperature (`float`, *optional*, defaults to 0.07): The smaller, the more the nearest neighbor decides.
        kwargs: As for `evaluate.Metric`.

    Example:

    ```python
    train_features, train_labels = torch.randn(100, 8), torch.randint(0, 3, (100,))
    knn = KNNAccuracy(train_features, train_labels)
    print(knn.compute(predictions=torch.randn(10, 8), references=torch.randint(0, 3, (10,))))
    ```
    """

    inputs = _ROW, _LABEL

    def __init__(
        self, train_features: Any, train_labels: Any, k: int = 20, temperature: float = 0.07, **kwargs: Any
    ) -> None:
        from sklearn.neighbors import KNeighborsClassifier

        if k < 1 or temperature <= 0:
            raise UsageError(f"k={k}, temperature={temperature}: both must be positive, such as k=20 and 0.07.")
        features, labels = _rows(train_features), _integers(train_labels, "train_labels")
        if features.ndim != 2 or labels.shape != features.shape[:1]:
            raise UsageError(
                f"train_features {features.shape} and train_labels {labels.shape}; pass (m, dim) and (m,)."
            )
        if not len(features):
            raise DataError("train_features is empty; k-NN needs at least one labeled image.")

        def votes(distances: np.ndarray) -> np.ndarray:
            # relative to the nearest neighbor, which leaves the vote as it is and cannot overflow
            return np.exp((distances[:, :1] - distances) / temperature)

        neighbors = min(k, len(features))
        self._knn = KNeighborsClassifier(neighbors, weights=votes, algorithm="brute", metric="cosine")
        self._knn.fit(features, labels)
        super().__init__(**kwargs)

    def sums(self, predictions: Any, references: Any) -> np.ndarray:
        features, dim = _rows(predictions), self._knn.n_features_in_
        if features.ndim != 2 or features.shape[1] != dim:
            raise UsageError(f"predictions has shape {features.shape}; pass features (n, {dim}).")
        # `predict` gives the same, and takes seven times as long with 100 classes
        parts = (features[start : start + _CHUNK] for start in range(0, len(features), _CHUNK))
        winners = [self._knn.predict_proba(part).argmax(axis=1) for part in parts]
        return super().sums(self._knn.classes_[np.concatenate(winners)], references)

    def result(self, total: np.ndarray) -> dict[str, float]:
        return {"knn_accuracy": super().result(total)["accuracy"]}


class FeatureCosine(StreamingMetric):
    """Mean cosine of the student's rows (predictions) with the teacher's (references): `{"cosine": float}`.

    Features are `(n, ..., dim)`. A zero vector has the cosine 0.

    Example:

    ```python
    print(FeatureCosine().compute(predictions=torch.randn(10, 8), references=torch.randn(10, 8)))
    ```
    """

    inputs = _ROW, _ROW

    def sums(self, predictions: Any, references: Any) -> np.ndarray:
        # norms of float64 instead of the default 1e-12: features may be tiny
        student, teacher = (normalize(x, dim=-1, eps=1e-300) for x in _pair(predictions, references))
        cosines = (student * teacher).sum(dim=-1)
        return np.array([cosines.sum().item(), cosines.numel()])

    def result(self, total: np.ndarray) -> dict[str, float]:
        return {"cosine": float(total[0] / total[1])}


class FeatureRelativeError(StreamingMetric):
    """Norm of the student's error over that of the teacher's features: `{"relative_error": float}`.

    0 is equal, 1 is as bad as a student that returns zeros. Against an all-zero teacher, 0 if the student is zero too
    and infinity otherwise.

    Example:

    ```python
    metrics = evaluate.combine([FeatureCosine(), FeatureRelativeError()])
    metrics.add_batch(predictions=torch.randn(10, 8), references=torch.randn(10, 8))
    print(metrics.compute())
    ```
    """

    inputs = _ROW, _ROW

    def sums(self, predictions: Any, references: Any) -> np.ndarray:
        student, teacher = _pair(predictions, references)
        return np.array([(student - teacher).square().sum().item(), teacher.square().sum().item()])

    def result(self, total: np.ndarray) -> dict[str, float]:
        difference, teacher = total.tolist()
        if teacher == 0:
            return {"relative_error": float("inf") if difference > 0 else 0.0}
        return {"relative_error": (difference / teacher) ** 0.5}


class MeanIoU(StreamingMetric):
    """Mean intersection over union of label maps, under the names of `evaluate.load("mean_iou")`.

    Predictions and references are sequences of 2-D integer maps; sizes may differ between images. `compute` returns
    `mean_iou`, `mean_accuracy` and `overall_accuracy`, and a list `per_category_iou`. A class that is neither in the
    references nor predicted is nan and left out of the means; if nothing counts, all are nan.

    Args:
        num_labels (`int`): Number of classes; labels are 0 to `num_labels - 1`.
        ignore_index (`int`, *optional*, defaults to 255): Reference label that does not count. `None` counts all.
        kwargs: As for `evaluate.Metric`.

    Example:

    ```python
    metric = MeanIoU(num_labels=3)
    maps = torch.randint(0, 3, (2, 32, 48))
    print(metric.compute(predictions=maps, references=maps)["mean_iou"])  # 1.0
    ```
    """

    inputs = Sequence(Sequence(_LABEL)), Sequence(Sequence(_LABEL))

    def __init__(self, num_labels: int, ignore_index: int | None = 255, **kwargs: Any) -> None:
        if num_labels < 1:
            raise UsageError(f"num_labels={num_labels}; pass the number of classes, 1 or more.")
        self.num_labels, self.ignore_index = num_labels, ignore_index
        super().__init__(**kwargs)

    def sums(self, predictions: Any, references: Any) -> np.ndarray:
        """Return the counts `(num_labels, num_labels)` of pixels by true label (rows) and predicted one (columns)."""
        pairs = zip(predictions, references, strict=True)
        return np.sum([self._confusion(prediction, reference) for prediction, reference in pairs], axis=0)

    def result(self, total: np.ndarray) -> dict[str, Any]:
        hits, true, predicted = total.diagonal(), total.sum(axis=1), total.sum(axis=0)
        with np.errstate(invalid="ignore"):  # 0 / 0 is nan, as it should be
            iou, recall = hits / (true + predicted - hits), hits / true
            overall = float(hits.sum() / total.sum())
        mean_iou, mean_accuracy = (
            float(x[~np.isnan(x)].mean()) if x[~np.isnan(x)].size else np.nan for x in (iou, recall)
        )
        return {
            "mean_iou": mean_iou,
            "mean_accuracy": mean_accuracy,
            "overall_accuracy": overall,
            "per_category_iou": iou.tolist(),
        }

    def _confusion(self, prediction: Any, reference: Any) -> np.ndarray:
        predicted, true = _integers(prediction, "predictions"), _integers(reference, "references")
        if predicted.shape != true.shape:
            raise UsageError(
                f"predictions has shape {predicted.shape} but references {true.shape}; resize the logits to the label"
                " map before taking their argmax."
            )
        counted = true != self.ignore_index
        predicted, true = predicted[counted], true[counted]
        for name, values in (("predictions", predicted), ("references", true)):
            if values.size and (values.min() < 0 or values.max() >= self.num_labels):
                raise UsageError(
                    f"{name} holds labels {values.min()} to {values.max()} but num_labels={self.num_labels}; raise"
                    f" num_labels, or set ignore_index (now {self.ignore_index}) to the label that means 'none'."
                )
        # sklearn's confusion_matrix sorts the pixels: 77 ms instead of 0.7 for a map of 512 x 512, on a CPU
        counts = np.bincount(true * self.num_labels + predicted, minlength=self.num_labels**2)
        return counts.reshape(self.num_labels, self.num_labels)


def compute_accuracy(eval_prediction: EvalPrediction) -> dict[str, float]:
    """Return the `Accuracy` of logits `(n, classes)`, for `Trainer(compute_metrics=compute_accuracy)`.

    Of a tuple of outputs, the logits come first.
    """
    logits, labels = (
        values[0] if isinstance(values, tuple) else values
        for values in (eval_prediction.predictions, eval_prediction.label_ids)
    )
    return Accuracy().compute(predictions=logits, references=labels)


def _tensor(values: Any) -> Tensor:
    if isinstance(values, list | tuple) and values and isinstance(values[0], Tensor):
        values = torch.stack(list(values))
    return values.detach() if isinstance(values, Tensor) else torch.from_numpy(np.array(values))


def _rows(values: Any) -> np.ndarray:
    values = _tensor(values).cpu()
    return (values if values.dtype == torch.float64 else values.float()).numpy()


def _integers(values: Any, name: str) -> np.ndarray:
    values = _tensor(values).cpu()
    if values.is_floating_point() and values.numel():
        raise UsageError(f"{name} has dtype {values.dtype}; pass integer labels, such as logits.argmax(-1).")
    return values.long().numpy()


def _pair(student: Any, teacher: Any) -> tuple[Tensor, Tensor]:
    student, teacher = _tensor(student), _tensor(teacher)
    if student.shape != teacher.shape:
        raise UsageError(
            f"student features have shape {tuple(student.shape)} but teacher features {tuple(teacher.shape)};"
            " compare a student with the teacher that it was converted from, on the same images."
        )
    device = "cpu" if teacher.device.type == "mps" else teacher.device  # which has no float64
    return student.to(device).double(), teacher.to(device).double()
