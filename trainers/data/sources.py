"""Opening image datasets: folders, files, Hub ids and objects become `datasets` objects with undecoded images."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias, cast

import datasets
import numpy as np
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from PIL import Image

from modeling_adala.errors import DataError, UsageError

from .digits import DIGITS_NAME, DIGITS_SPLITS, load_digits
from .image_files import ImageFiles, Unreadable, encoded_bytes, first_line

HFDataset: TypeAlias = datasets.Dataset | datasets.IterableDataset

_MIN_SHARDS = 8
_MAX_SHARDS = 64
_HASHED_ROWS = 4
# file systems of the kernel: without end, and reading some of their files never returns
_NO_DATA = ("/proc", "/sys")
_ENTRIES = 50_000
_TABLES = (".parquet", ".csv", ".tsv", ".json", ".jsonl", ".arrow", ".txt", ".zip", ".tar", ".gz", ".h5", ".lance")


def columns_of(dataset: HFDataset) -> list[str]:
    if dataset.column_names is not None:
        return list(dataset.column_names)
    return list(next(iter(dataset), {}))


def undecoded(dataset: HFDataset, column: str) -> HFDataset:
    # Decoding inside `datasets` would raise on a broken file before its row is known.
    if dataset.features is None:
        return dataset
    feature = dataset.features[column]
    kind = getattr(feature, "dtype", None)
    is_struct = isinstance(feature, dict) and set(feature) <= {"bytes", "path"}
    if not (
        isinstance(feature, datasets.Image)
        or is_struct
        or kind in ("string", "large_string", "binary", "large_binary")
    ):
        raise UsageError(
            f"image_column={column!r} holds {feature}, not images; name another of {', '.join(dataset.features)}."
        )
    return dataset.cast_column(column, datasets.Image(decode=False))


def check_labels(dataset: HFDataset, column: str) -> None:
    feature = dataset.features[column] if dataset.features is not None else None
    if feature is None or isinstance(feature, datasets.ClassLabel):
        return
    if not str(getattr(feature, "dtype", "")).startswith(("int", "uint")):
        raise UsageError(
            f"label_column={column!r} holds {feature}, not class numbers; name another of "
            f"{', '.join(dataset.features)}, or convert it with datasets' class_encode_column."
        )


def _open_local(path: Path, streaming: bool) -> Any:
    if path.is_file():
        if path.suffix != ".parquet":
            raise UsageError(f"source={str(path)!r} is one file; give its folder, or a .parquet file.")
        return datasets.load_dataset("parquet", data_files=str(path), streaming=streaming)
    _check_folder(path)
    if (path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists():
        return datasets.load_from_disk(str(path))
    opened = datasets.load_dataset(str(path), streaming=streaming)
    if streaming and _is_table_of_files(next(iter(opened.values()))):
        # One shard, read in the order of the folders. As a table, of paths only, it can be shuffled and shared out.
        opened = datasets.load_dataset(str(path))
    return opened


def _check_folder(path: Path) -> None:
    """Raise `DataError` for a folder without data, without walking through a whole file system."""
    real, reason = os.path.realpath(path), ""
    if not path.is_dir() or real == "/" or any(Path(real).is_relative_to(place) for place in _NO_DATA):
        reason = "it is not a folder of files"
    elif not any(name.lower().endswith(_data_extensions()) for name in _file_names(path)):
        reason = "no image and no table in it"
    if reason:
        raise DataError(
            f"source={str(path)!r} holds no dataset that can be read ({reason}); "
            "give a folder of images, of one subfolder per class, or of parquet files."
        )


def _file_names(path: Path) -> Iterator[str]:
    """Yield the names of the first files under a folder."""
    count = 0
    for _, folders, files in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]  # as `datasets` does
        yield from files
        count += len(folders) + len(files)
        if count > _ENTRIES:
            return


def _data_extensions() -> tuple[str, ...]:
    Image.init()
    return (*Image.registered_extensions(), *_TABLES)


def _is_table_of_files(stream: datasets.IterableDataset) -> bool:
    """Return whether a stream gives the paths of existing files, as that of a local folder of images does."""
    for name, feature in (stream.features or {}).items():
        if isinstance(feature, datasets.Image):
            value = next(iter(stream.cast_column(name, datasets.Image(decode=False))), {}).get(name) or {}
            return value.get("bytes") is None and "://" not in (value.get("path") or "://")
    return False


def open_splits(source: Any, streaming: bool = False) -> dict[str, HFDataset]:
    """Open a dataset with all its splits. `load_images` takes the same sources, and the result.

    Raises:
        UsageError: If the source is of a wrong type.
        DataError: If the source cannot be opened.
    """
    if isinstance(source, dict):
        return dict(source)
    if isinstance(source, datasets.Dataset | datasets.IterableDataset):
        name = str(source.split)
        return {name if name.isidentifier() and name != "None" else "train": source}
    if source == DIGITS_NAME:
        return {name: load_digits(name) for name in DIGITS_SPLITS}
    if not isinstance(source, str | Path):
        raise UsageError(f"source={source!r} is not a dataset; use a path, a Hub id or a datasets.Dataset.")
    path = Path(source).expanduser()
    try:
        exists = path.exists()
    except OSError as error:  # such as a name that is too long
        raise DataError(f"source={str(source)!r} cannot be opened: {error.strerror}.") from error
    try:
        if exists:
            opened = _open_local(path, streaming)
        elif str(source).startswith(("/", ".", "~")) or str(source).count("/") > 1 or path.suffix == ".parquet":
            raise DataError(f"source={str(source)!r} does not exist; check the path.")
        else:
            validate_repo_id(str(source))
            opened = datasets.load_dataset(str(source), streaming=streaming)
    except (DataError, UsageError):
        raise
    except HFValidationError as error:
        raise DataError(
            f"source={str(source)!r} is neither a local path nor the id of a dataset on the Hub, such as"
            " uoft-cs/cifar10; check the name."
        ) from error
    except Exception as error:
        if exists:
            raise DataError(
                f"source={str(source)!r} holds no dataset that can be read ({first_line(error)}); "
                "give a folder of images, of one subfolder per class, or of parquet files."
            ) from error
        raise DataError(
            f"source={str(source)!r} is neither a local path nor a dataset that the Hub gives out now "
            f"({first_line(error)}); check the name and the network, or give a folder of images."
        ) from error
    return open_splits(opened, streaming)


def _pick_split(splits: dict[str, HFDataset], split: str | None) -> HFDataset:
    available = ", ".join(splits)
    if split is None:
        if len(splits) > 1 and "train" not in splits:
            raise UsageError(f"split=None: the dataset has no split 'train'; name one of {available}.")
        return splits["train"] if "train" in splits else next(iter(splits.values()))
    if split in splits:
        return splits[split]
    if any(isinstance(dataset, datasets.IterableDataset) for dataset in splits.values()):
        hint = " (a stream cannot be sliced: use streaming=False)" if "[" in split else ""
        raise UsageError(f"split={split!r} does not exist{hint}; use one of {available}.")
    try:
        lengths = {name: len(dataset) for name, dataset in splits.items()}
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    except (ValueError, AssertionError) as error:
        raise UsageError(f"split={split!r} does not exist ({first_line(error)}); use one of {available}.") from error
    return datasets.concatenate_datasets([splits[p.splitname].select(range(p.from_, p.to)) for p in parts])


def load_images(
    source: Any,
    split: str | None = None,
    *,
    image_column: str = "image",
    label_column: str = "label",
    streaming: bool = False,
    require_labels: bool = False,
) -> datasets.Dataset | datasets.IterableDataset:
    """Open a dataset of images.

    Args:
        source (`str`, `Path` or a `datasets` object): An object, also one with splits; a folder of images (subfolders
            are classes), a folder of parquet files (splits come from their names), one parquet file, or a folder of
            `save_to_disk`; `"mnist-digits"`; or else the id of a dataset on the Hub.
        split (`str`, *optional*): Such as `"train"`, or `"train[:500]"` where the dataset is not streamed. Default:
            the only split, or `"train"`.
        image_column (`str`, *optional*, defaults to `"image"`): Column of the images: their files' bytes, paths, or
            both.
        label_column (`str`, *optional*, defaults to `"label"`): Column of the class numbers.
        streaming (`bool`, *optional*, defaults to `False`): Read while iterating instead of first preparing the whole
            dataset. An object of `datasets` and a local folder of images are put into a fixed random order, as many
            are sorted by class.
        require_labels (`bool`, *optional*, defaults to `False`): Whether a missing label column is an error.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset`: Its image column is undecoded.

    Raises:
        UsageError: If the split or a column does not exist or is of the wrong type.
        DataError: If the source cannot be opened, or is empty.

    Example:

    ```python
    rows = load_images("mnist-digits", "test")
    ```
    """
    dataset = _pick_split(open_splits(source, streaming), split).with_format(None)
    is_empty = len(dataset) == 0 if isinstance(dataset, datasets.Dataset) else next(iter(dataset), None) is None
    if is_empty:
        name = f"source={str(source)!r}" if isinstance(source, str | Path) else "the dataset"
        raise DataError(f"{name} with split={split!r} has no images; choose another split or source.")
    if streaming and isinstance(dataset, datasets.Dataset):
        order = np.random.default_rng(0).permutation(len(dataset))
        dataset = dataset.select(order).to_iterable_dataset(num_shards=min(_MAX_SHARDS, len(dataset)))
    elif streaming and dataset.num_shards < _MIN_SHARDS:
        # DataLoader workers share a stream by shards; a parquet file can give one for each row group.
        dataset = dataset.reshard()
    columns = columns_of(dataset)
    if image_column not in columns:
        raise UsageError(f"image_column={image_column!r} does not exist; use one of {', '.join(columns)}.")
    if require_labels:
        if label_column not in columns:
            raise UsageError(
                f"label_column={label_column!r} does not exist; use one of {', '.join(columns)} "
                "(a folder of images has labels when it has one subfolder per class)."
            )
        check_labels(dataset, label_column)
    return undecoded(dataset, image_column)


def read_to_cache(stream: HFDataset, source: Any) -> datasets.Dataset:
    """Return all rows of a split as a map-style dataset; those of a stream are kept in the cache of `datasets`.

    Opening the source map-style would prepare all of its splits, and download them from the Hub.

    Args:
        stream (`datasets.IterableDataset` or `datasets.Dataset`): A split of the source.
        source: As for `load_images`. A local one is read again when one of its files has changed.
    """
    if isinstance(stream, datasets.Dataset):
        return stream
    files = []
    if isinstance(source, str | Path) and (path := Path(source).expanduser()).exists():
        found = [path] if path.is_file() else sorted(path.rglob("*"))
        files = [(str(file), (facts := file.stat()).st_mtime_ns, facts.st_size) for file in found]
    # Both make up the key in the cache; files on the Hub are known by their commit. A list would be taken for shards.
    arguments = {"stream": stream, "files": tuple(files)}
    rows = datasets.Dataset.from_generator(_rows_of, stream.features, gen_kwargs=arguments, split=stream.split)
    return cast(datasets.Dataset, rows)


def _rows_of(stream: datasets.IterableDataset, files: Any) -> Iterator[dict[str, Any]]:
    yield from stream


def fingerprint(dataset: datasets.Dataset | datasets.IterableDataset) -> str:
    """Return a short id of a dataset's content: the same in every process and on every machine.

    It covers the number of rows, the columns and their types, and the bytes of the first, middle and last row (of a
    stream, of the first four). `datasets`' own fingerprint also covers paths and times.

    Returns:
        `str`: 16 hexadecimal digits.
    """
    for name, feature in (dataset.features or {}).items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
    size = len(dataset) if isinstance(dataset, datasets.Dataset) else None
    features = dataset.features.to_dict() if dataset.features is not None else None
    digest = hashlib.sha256(json.dumps([size, features], sort_keys=True, default=str).encode())
    rows = (
        dataset.take(_HASHED_ROWS) if size is None else (dataset[i] for i in sorted({0, size // 2, size - 1}) if size)
    )
    for row in rows:
        for name in sorted(row):
            value = row[name]
            digest.update(name.encode())
            if isinstance(value, dict) and set(value) == {"bytes", "path"}:
                digest.update(_content(value))
            else:
                digest.update(value.tobytes() if isinstance(value, Image.Image) else repr(value).encode())
    return digest.hexdigest()[:16]


def describe(source: Any) -> str:
    """Return a source as short text for a manifest or YAML: a path or id as it is, an object by its content."""
    if isinstance(source, str | Path):
        return str(source)
    if isinstance(source, dict):
        return f"{type(source).__name__}({', '.join(f'{name}={describe(part)}' for name, part in source.items())})"
    return f"{type(source).__name__}({fingerprint(source)})"


def image_files(source: Any, external: bool = False) -> ImageFiles:
    """Return the files that the rows of a source may name: those of its own folder or repository.

    An object of `datasets` was opened by the caller, who may have listed files from anywhere: all local ones.

    Args:
        source: As for `load_images`.
        external (`bool`, *optional*, defaults to `False`): Any file and URL.
    """
    if external or not isinstance(source, str | Path):
        return ImageFiles(external=external)
    path = Path(source).expanduser()
    if path.exists():
        folder = path if path.is_dir() else path.parent
        own = os.path.abspath(folder), os.path.realpath(folder)
        return ImageFiles(roots=(*own, _unpacked()))
    return ImageFiles(roots=(os.path.abspath(HF_HUB_CACHE), _unpacked()), hub_id=str(source))


def _unpacked() -> str:
    """Return the folder into which `datasets` unpacks archives."""
    return os.path.abspath(datasets.config.DOWNLOADED_DATASETS_PATH)


def _content(value: dict[str, Any]) -> bytes:
    try:
        content = encoded_bytes(value)
    except Unreadable:
        content = None
    return content or Path(value["path"] or "").name.encode()
