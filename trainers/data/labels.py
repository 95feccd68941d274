"""Labels: the rows that have one, the classes, and how two lists of classes correspond."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np

from modeling_adala.errors import DataError, UsageError

from .sources import HFDataset, check_labels, columns_of

logger = logging.getLogger(__name__)

MAX_CLASSES = 100_000
# so many classes are nothing to stumble over, however few the rows
_FEW_CLASSES = 1000
_NAMED = 5


def has_class_numbers(dataset: HFDataset, column: str) -> bool:
    """Return whether a dataset has this column and it holds class numbers (not, say, strings)."""
    if column not in columns_of(dataset):
        return False
    try:
        check_labels(dataset, column)
    except UsageError:
        return False
    return True


def class_names(dataset: Any) -> list[str] | None:
    """Return the class names of a dataset of `datasets` or an `ImageDataset`; `None` where it does not name them."""
    rows = getattr(dataset, "dataset", dataset)
    features = getattr(rows, "features", None) or {}
    for column in (getattr(dataset, "label_column", None), "labels", "label"):
        if isinstance(features.get(column), datasets.ClassLabel):
            return list(features[column].names)
    return None


@dataclass(frozen=True)
class SplitLabels:
    """Content of the label column of one split.

    Args:
        place (`str`): Column and split, for messages.
        names (`list[str]`, *optional*): Class names of a `ClassLabel` column.
        numbers (`np.ndarray`, *optional*): The class numbers that occur, ascending. `None` for a stream, whose
            first row alone is read ahead.
        rows (`int`): Number of rows; 0 for a stream.
        missing (`int`): Rows without a label: empty, or negative, as in the test splits of many competitions.
        first_missing (`int`, *optional*): The first of them.
    """

    place: str
    names: list[str] | None
    numbers: np.ndarray | None = None
    rows: int = 0
    missing: int = 0
    first_missing: int | None = None

    @classmethod
    def read(cls, dataset: HFDataset, column: str) -> "SplitLabels":
        """Read the label column, and nothing else, in one pass; of a stream, only the class names.

        Raises:
            UsageError: If the column does not exist, or does not hold class numbers.
        """
        columns = columns_of(dataset)
        if column not in columns:
            raise UsageError(f"label_column={column!r} does not exist; use one of {', '.join(columns)}.")
        check_labels(dataset, column)
        feature = dataset.features[column] if dataset.features is not None else None
        names = list(feature.names) if isinstance(feature, datasets.ClassLabel) else None
        place = f"label_column={column!r}" + (f" of split {str(dataset.split)!r}" if dataset.split else "")
        if not isinstance(dataset, datasets.Dataset):
            first_label = next(iter(dataset))[column]
            if first_label is None or first_label < 0:
                return cls(place, names, np.array([], int), rows=1, missing=1, first_missing=0)
            return cls(place, names)
        values = dataset.select_columns(column).with_format("arrow")[:][column]
        missing = values.is_null().to_numpy()
        numbers = values.drop_null().to_numpy()
        missing[np.flatnonzero(~missing)[numbers < 0]] = True
        first = int(missing.argmax()) if missing.any() else None
        return cls(place, names, np.unique(numbers[numbers >= 0]), len(values), int(missing.sum()), first)

    @property
    def is_labeled(self) -> bool:
        """Return whether any row has a label, as far as this is known."""
        return self.numbers is None or self.numbers.size > 0

    def classes(self) -> list[str]:
        """Return the classes to train on: the column's names, or else the numbers from 0 to the largest.

        Raises:
            UsageError: If the classes of a stream have no names.
            DataError: If a row has no label, there are more classes than make sense, or a number has no name.
        """
        self._check_complete()
        if self.numbers is None:
            if self.names is None:
                raise UsageError(
                    f"streaming=True: {self.place} has no class names, and a stream is not read ahead to count the"
                    " classes; leave streaming out, or store the labels as datasets.ClassLabel."
                )
            return self.names
        largest = int(self.numbers[-1])
        if self.names is not None:
            if largest >= len(self.names):
                raise DataError(f"{self.place} holds class {largest:,}, but has {len(self.names):,} names; repair it.")
            return self.names
        if largest >= min(MAX_CLASSES, max(self.rows, _FEW_CLASSES)):
            raise DataError(
                f"{self.place} holds class number {largest:,}, but {self.numbers.size:,} different ones in"
                f" {self.rows:,} rows; repair the stray labels, or number the classes from 0, as datasets'"
                " class_encode_column does."
            )
        holes = np.setdiff1d(np.arange(largest), self.numbers)
        if holes.size:
            named = ", ".join(map(str, holes[:_NAMED])) + (", ..." if holes.size > _NAMED else "")
            logger.warning("%s: no row has class %s of 0 to %d", self.place, named, largest)
        return [str(number) for number in range(largest + 1)]

    def ids(self, classes: Sequence[str]) -> list[int]:
        """Return the index in `classes` of each class number of this split, by name where there are names.

        Raises:
            DataError: If a row has no label, or one that `classes` does not have.
        """
        self._check_complete()
        if self.names is None:
            largest = -1 if self.numbers is None else int(self.numbers[-1])
            if largest >= len(classes):
                raise DataError(
                    f"{self.place} holds class {largest:,}, but the training split has {len(classes):,} classes, from"
                    " 0; add training images of it, or remove these rows."
                )
            return list(range(len(classes)))
        if self.names == list(classes):
            return list(range(len(classes)))
        numbers = {name: number for number, name in enumerate(classes)}
        used = range(len(self.names)) if self.numbers is None else self.numbers
        unknown = [self.names[number] for number in used if self.names[number] not in numbers]
        if unknown:
            raise DataError(
                f"{self.place} has class {unknown[0]!r}, which the training split does not have; give both the same"
                " classes, or name another split with --eval-split."
            )
        return [numbers.get(name, -1) for name in self.names]

    def _check_complete(self) -> None:
        if self.missing and not self.is_labeled:
            raise DataError(
                f"{self.place} has no labels, only empty or negative ones; name another split or label it."
            )
        if self.missing:
            raise DataError(
                f"{self.place} has no label (none, or a negative number) in {self.missing:,} of {self.rows:,} rows,"
                f" the first in row {self.first_missing}; remove these rows or label them."
            )


def head_ids(id2label: Mapping[int, str], classes: Sequence[str]) -> list[int] | None:
    """Return the classifier output of each class of the data, by name; the head may have more classes.

    A head without names of its own (`"LABEL_0"`, as Transformers fills in) has numbers, as data without names have.

    Returns:
        `list[int]` or `None`: `None` if the head lacks a class of the data, or has two outputs of that name.
    """
    outputs = [_plain(id2label[number]) for number in sorted(id2label)]
    wanted = [_plain(name) for name in classes]
    if outputs == wanted:
        return list(range(len(wanted)))
    counts = Counter(outputs)
    if any(counts[name] != 1 for name in wanted):
        return None
    return [outputs.index(name) for name in wanted]


def _plain(name: str) -> str:
    return str(name).removeprefix("LABEL_").strip().casefold()
