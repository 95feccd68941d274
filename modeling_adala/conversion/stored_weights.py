"""The safetensors files of a checkpoint: their names, their headers, and whether all numbers are finite."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError

INDEX = "model.safetensors.index.json"
_FLOATS = {"F64", "F32", "F16", "BF16"}
# buffers that count
_COUNTERS = ("position_ids", "num_batches_tracked")


class StoredTensor(NamedTuple):
    """Header of a tensor in a safetensors file; `dtype` by safetensors' name, such as `"F32"`."""

    dtype: str
    shape: list[int]


def weight_files(directory: str | os.PathLike) -> list[Path]:
    """Return the safetensors files of a checkpoint folder, those that `from_pretrained` reads; none if it has none.

    Raises:
        CheckpointError: for an index of shards that is not valid, or names a file that is not in the folder.
    """
    directory = Path(directory)
    if (directory / "model.safetensors").is_file():
        return [directory / "model.safetensors"]
    if not (directory / INDEX).is_file():
        return []
    try:
        names = sorted({str(name) for name in json.loads((directory / INDEX).read_bytes())["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(
            f"{str(directory)!r} is not opened: {INDEX} is not a valid index of weights. {replace_it(directory)}."
        ) from None
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors") or not (directory / name).is_file():
            raise CheckpointError(
                f"{str(directory)!r} is not opened: {INDEX} names {name!r}, which is not a safetensors file in"
                f" this folder. {replace_it(directory)}."
            )
    return [directory / name for name in names]


def hash_files(files: Iterable[Path]) -> str:
    """Return a SHA-256 of the content of some files, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def read_tensors(path: str | os.PathLike) -> dict[str, StoredTensor]:
    """Return dtype and shape of the tensors of a safetensors file, from its header.

    Raises:
        CheckpointError: if the file is not one, or its length does not fit its header.
    """
    with _opened(path) as file:
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, not a dict
        return {name: StoredTensor(part.get_dtype(), part.get_shape()) for name, part in parts.items()}


def check_dtypes(what: str, files: Iterable[Path]) -> None:
    """Refuse weights that were cast to integers or to 8 bits: Transformers would read the rounded numbers as they are.

    Args:
        what (`str`): How the message calls the model.
        files (`Iterable[Path]`): Its safetensors files.

    Raises:
        CheckpointError: naming one of them.
    """
    tensors = {name: tensor for file in files for name, tensor in read_tensors(file).items()}
    cast = [name for name, tensor in tensors.items() if tensor.dtype not in _FLOATS and not name.endswith(_COUNTERS)]
    if cast:
        raise CheckpointError(
            f"{what} is not opened: {len(cast)} of {len(tensors)} weights are not stored as floating point of"
            f" 16 bits or more, such as {cast[0]!r} ({tensors[cast[0]].dtype}). Save the model in float32 or bfloat16."
        )


def nonfinite_tensors(files: Iterable[Path]) -> list[str]:
    """Return the names of the stored tensors that hold NaN or infinity; reads all weights, one tensor at a time.

    Raises:
        CheckpointError: see `read_tensors`.
    """
    bad = []
    for path in files:
        with _opened(path) as file:
            bad += [name for name in file.keys() if not is_finite(file.get_tensor(name))]  # noqa: SIM118, not a dict
    return bad


def is_finite(tensor: Tensor) -> bool:
    """Return whether no element is NaN or infinite, mostly without a mask of the tensor's size."""
    return not tensor.is_floating_point() or bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def nonfinite_names(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors that hold NaN or infinity; those on meta have no values."""
    return [name for name, tensor in tensors.items() if not tensor.is_meta and not is_finite(tensor)]


def stage_remedy(path: str | os.PathLike) -> str | None:
    """Return how to make the folder of a run's stage again, which has its number in front; `None` for any other."""
    folder = os.path.abspath(path if os.path.isdir(path) else os.path.dirname(path))
    stage = re.fullmatch(r"(\d)-[a-z-]+", os.path.basename(folder))
    return stage and f"If `vit-adala run` left it, run that again with --from-stage {stage[1]}"


def replace_it(path: str | os.PathLike) -> str:
    """Return how to replace a damaged checkpoint."""
    return stage_remedy(path) or "Get a fresh copy from its source"


@contextmanager
def _opened(path: str | os.PathLike) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{str(path)!r} is not opened: it is truncated or corrupt ({reason}). {replace_it(path)}."
        ) from error
