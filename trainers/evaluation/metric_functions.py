"""The mathematics of the metrics as pure functions: tensors or arrays in, numbers out."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction

from modeling_adala.errors import DataError, UsageError


def accuracy(logits_or_predictions: Any, labels: Any) -> float:
    """Share of correct predictions.

    Args:
        logits_or_predictions: Predicted labels in the shape of `labels`, or logits with one more axis (the classes) at
            the end.
        labels: True labels, integers `(n,)` (any other shape counts every element).

    Returns:
        `float` between 0 and 1; nan when there are no labels.

    Raises:
        UsageError: The shapes do not fit together.
    """
    labels = as_labels(labels, "labels")
    predictions = as_tensor(logits_or_predictions)
    if predictions.ndim == labels.ndim + 1:
        predictions = predictions.argmax(dim=-1)
    predictions = as_labels(predictions, "predictions")
    if predictions.shape != labels.shape:
        raise UsageError(
            f"predictions has shape {tuple(predictions.shape)} but labels {tuple(labels.shape)}: pass one prediction,"
            " or one row of logits, per label"
        )
    return (predictions == labels).double().mean().item()


def compute_accuracy(eval_prediction: EvalPrediction) -> dict[str, float]:
    """`Trainer(compute_metrics=compute_accuracy)` for classification.

    Args:
        eval_prediction: Logits `(n, classes)` and labels `(n,)`. Of a tuple of outputs, the logits come first.

    Returns:
        `{"accuracy": float}`.
    """
    logits, labels = eval_prediction.predictions, eval_prediction.label_ids
    logits = logits[0] if isinstance(logits, tuple) else logits
    labels = labels[0] if isinstance(labels, tuple) else labels
    return {"accuracy": accuracy(logits, labels)}


def confusion_matrix(predictions: Any, references: Any, num_labels: int, ignore_index: int | None = 255) -> np.ndarray:
    """Count pixels by true and predicted label.

    Args:
        predictions: Integer label map of any shape.
        references: Integer label map of the same shape.
        num_labels: Number of classes; labels are 0 to `num_labels - 1`.
        ignore_index: Reference label whose pixels do not count. `None` counts all.

    Returns:
        int64 array `(num_labels, num_labels)`, one row per true label, one column per predicted label.

    Raises:
        UsageError: The shapes differ, the predictions are not integers, or a label that counts is out of range.
    """
    predicted, true = as_labels(predictions, "predictions").numpy(), as_labels(references, "references").numpy()
    if predicted.shape != true.shape:
        raise UsageError(
            f"predictions has shape {predicted.shape} but references {true.shape}: resize the logits to the label map"
            " before taking their argmax"
        )
    if ignore_index is not None:
        counted = true != ignore_index
        predicted, true = predicted[counted], true[counted]
    for name, values in (("predictions", predicted), ("references", true)):
        if values.size and (values.min() < 0 or values.max() >= num_labels):
            raise UsageError(
                f"{name} holds labels {values.min()} to {values.max()} but num_labels={num_labels}: raise num_labels"
                f" or set ignore_index (now {ignore_index}) to the label that means 'none'"
            )
    counts = np.bincount((true * num_labels + predicted).ravel(), minlength=num_labels**2)
    return counts.reshape(num_labels, num_labels).astype(np.int64)


def iou_from_confusion(confusion: np.ndarray) -> dict[str, Any]:
    """Intersection over union and accuracies from a confusion matrix.

    Args:
        confusion: Counts `(num_labels, num_labels)`, rows true, columns predicted.

    Returns:
        `mean_iou`, `mean_accuracy`, `overall_accuracy` as floats and `per_category_iou` as a list. A class that is
        neither in the references nor predicted is nan and left out of the means; if nothing counts, all are nan.
    """
    hits = np.diag(confusion).astype(np.float64)
    true, predicted = confusion.sum(axis=1), confusion.sum(axis=0)
    iou = ratio(hits, true + predicted - hits)
    return {
        "mean_iou": mean_of_numbers(iou),
        "mean_accuracy": mean_of_numbers(ratio(hits, true)),
        "overall_accuracy": float(ratio(hits.sum(), confusion.sum())),
        "per_category_iou": iou.tolist(),
    }


def knn_predict(
    train_features: Any,
    train_labels: Any,
    features: Any,
    k: int = 20,
    temperature: float = 0.07,
    chunk_size: int | None = None,
) -> Tensor:
    """Label features by DINO's weighted k nearest neighbors: each votes with exp(cosine / temperature).

    Args:
        train_features: Known features `(n, dim)`; L2-normalized here, zero rows stay zero.
        train_labels: Their labels `(n,)`, any integers.
        features: Features to label `(m, dim)`.
        k: Number of neighbors; all `n` when `k` is larger.
        temperature: The smaller, the more the nearest neighbor decides.
        chunk_size: Rows of `features` at a time. Default: as many as keep the similarities below 256 MiB.

    Returns:
        int64 tensor `(m,)` on the device of `train_features`.

    Raises:
        UsageError: `k` or `temperature` is not positive, or the shapes do not fit together.
        DataError: There are no known features.
    """
    if k < 1 or temperature <= 0:
        raise UsageError(f"k={k}, temperature={temperature}: both must be positive, such as k=20, temperature=0.07")
    bank, queries = as_tensor(train_features).float(), as_tensor(features).float()
    labels = as_labels(train_labels, "train_labels").to(bank.device)
    if bank.ndim != 2 or queries.ndim != 2 or bank.shape[1] != queries.shape[1] or len(bank) != len(labels):
        raise UsageError(
            f"train_features {tuple(bank.shape)}, train_labels {tuple(labels.shape)}, features {tuple(queries.shape)}:"
            " expected (n, dim), (n,) and (m, dim)"
        )
    if len(bank) == 0:
        raise DataError("train_features is empty: k-NN needs at least one labeled image")
    bank = torch.nn.functional.normalize(bank, dim=1)
    queries = torch.nn.functional.normalize(queries.to(bank.device), dim=1)
    classes, class_ids = labels.unique(return_inverse=True)
    chunk_size = chunk_size or max(1, min(1024, 2**26 // len(bank)))
    predicted = [labels.new_empty(0)]
    for chunk in queries.split(chunk_size):
        cosines, neighbors = (chunk @ bank.T).topk(min(k, len(bank)), dim=1)
        # Relative to the nearest neighbor, which leaves the vote as it is and cannot overflow at small temperatures.
        weights = ((cosines - cosines[:, :1]) / temperature).exp()
        votes = weights.new_zeros(len(chunk), len(classes)).scatter_add_(1, class_ids[neighbors], weights)
        predicted.append(classes[votes.argmax(dim=1)])
    return torch.cat(predicted)


def cosine_similarities(student: Any, teacher: Any) -> Tensor:
    """Cosine of each student row with its teacher row, 0 where either is a zero vector.

    Args:
        student: Features `(..., dim)`.
        teacher: Features of the same shape.

    Returns:
        float64 tensor `(...)`.

    Raises:
        UsageError: The shapes differ.
    """
    student, teacher = as_pair(student, teacher)
    norms = student.norm(dim=-1) * teacher.norm(dim=-1)
    # A product of norms below the smallest float would divide by zero; 0 / 1 is the answer for zero vectors.
    return (student * teacher).sum(dim=-1) / torch.where(norms == 0, 1.0, norms)


def cosine_similarity_mean(student: Any, teacher: Any) -> float:
    """Mean over rows of [`cosine_similarities`]; nan when there are no rows."""
    return cosine_similarities(student, teacher).mean().item()


def relative_error(student: Any, teacher: Any) -> float:
    """Frobenius norm of the difference over that of the teacher.

    Args:
        student: Features of any shape.
        teacher: Features of the same shape.

    Returns:
        `float`: 0 is equal, 1 is as bad as a student that returns zeros. Against an all-zero teacher, 0 if the student
        is zero too and infinity otherwise.

    Raises:
        UsageError: The shapes differ.
    """
    student, teacher = as_pair(student, teacher)
    return root_ratio((student - teacher).square().sum().item(), teacher.square().sum().item())


def root_ratio(squared_difference: float, squared_teacher: float) -> float:
    """Relative error from its two sums of squares, which may have been added up over many batches."""
    if squared_teacher == 0:
        return float("inf") if squared_difference > 0 else 0.0
    return (squared_difference / squared_teacher) ** 0.5


def as_tensor(values: Any) -> Tensor:
    if isinstance(values, Tensor):
        return values.detach()
    if isinstance(values, list | tuple) and values and isinstance(values[0], Tensor):
        return torch.stack([value.detach() for value in values])
    return torch.from_numpy(np.array(values))


def as_labels(values: Any, name: str) -> Tensor:
    if not isinstance(values, Tensor | list | tuple):
        # torch has no arithmetic on some of numpy's unsigned types, in which label maps are often stored.
        values = np.asarray(values)
        values = values.astype(np.int64) if values.dtype.kind in "ui" else values
    values = as_tensor(values)
    if values.is_floating_point() and values.numel() > 0:
        raise UsageError(f"{name} has dtype {values.dtype}: pass integer labels, such as logits.argmax(-1)")
    return values.cpu().long()


def as_pair(student: Any, teacher: Any) -> tuple[Tensor, Tensor]:
    # On the CPU because float64 does not exist on every accelerator, and features to compare are small.
    student, teacher = as_tensor(student).cpu().double(), as_tensor(teacher).cpu().double()
    if student.shape != teacher.shape:
        raise UsageError(
            f"student features have shape {tuple(student.shape)} but teacher features {tuple(teacher.shape)}:"
            " compare a student with the teacher that it was converted from, on the same images"
        )
    return student, teacher


def ratio(numerator: Any, denominator: Any) -> np.ndarray:
    numerator, denominator = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    return np.divide(numerator, denominator, out=np.full_like(numerator, np.nan), where=denominator > 0)


def mean_of_numbers(values: np.ndarray) -> float:
    numbers = values[~np.isnan(values)]
    return float(numbers.mean()) if numbers.size else float("nan")
