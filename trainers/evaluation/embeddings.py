"""Features of a dataset in a parquet file, image by image: written in parts, so that a killed run goes on.

Beside `features.parquet`, a folder `features.parquet.parts` holds what is done, one file per part and `settings.json`;
it goes once all parts are in the file. Batches do not depend on where a run was killed, nor does the file.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import torch
from filelock import FileLock, Timeout
from pyarrow import parquet
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm
from transformers import PreTrainedModel

from hub_cards.records import write_json
from modeling_adala.configuration_adala import pair, vision_config
from modeling_adala.errors import AdaLAError, UsageError
from modeling_adala.inspection.towers import token_groups

from ..data.image_dataset import ImageDataset
from ..data.image_files import Unreadable
from ..runs.checkpoints import writing
from .probes import evaluating, features_of

SETTINGS, LOCK = "settings.json", ".lock"
DTYPES = ("float32", "float16")
# metadata of the file, where its settings are
_KEY = b"vit_adala"
_JOINED = "part-all.writing"
_ROWS_PER_PART, _BYTES_PER_PART = 1024, 2**27


class EmbeddingFile:
    """Parquet file of features that belongs to one group of settings.

    Args:
        path (`Path`): File to write; it may be missing, or left by an earlier call with these settings.
        settings (`dict`): All that decides the content, as plain JSON values.

    Raises:
        UsageError: If the file, or the folder of its parts, is of other settings or was not written here.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]):
        self.path, self.parts = path, path.with_name(f"{path.name}.parts")
        self.settings = json.loads(json.dumps(settings))
        self._check()

    @property
    def finished(self) -> bool:
        """Return whether the file is complete."""
        return self.path.exists()

    def _check(self) -> None:
        self._check_settings(self.path, self._of_file())
        if not self.parts.is_dir():
            return
        names = {entry.name for entry in self.parts.iterdir()}
        foreign = sorted(name for name in names if name not in (SETTINGS, LOCK) and not _is_part(name))
        if foreign or (names - {LOCK} and SETTINGS not in names):
            raise UsageError(
                f"output={str(self.path)!r}: {str(self.parts)!r} holds {(foreign or sorted(names))[0]!r}, which this"
                " command has not written; pass another file."
            )
        if SETTINGS in names:
            self._check_settings(self.parts, json.loads((self.parts / SETTINGS).read_text()))

    def _of_file(self) -> dict[str, Any] | None:
        if not self.path.exists():
            return None
        try:
            metadata = parquet.read_schema(self.path).metadata or {}
        except (OSError, pa.ArrowException):
            metadata = {}
        if _KEY not in metadata:
            raise UsageError(
                f"output={str(self.path)!r} exists and was not written by this command; pass another file."
            )
        return json.loads(metadata[_KEY])

    def _check_settings(self, place: Path, found: dict[str, Any] | None) -> None:
        changed = [name for name, value in self.settings.items() if found is not None and found.get(name) != value]
        if changed and found is not None:
            name = changed[0]
            raise UsageError(
                f"output={str(self.path)!r}: {str(place)!r} holds features of {name}={found.get(name)!r}, not"
                f" {self.settings[name]!r}; pass another file, or remove that one to start again."
            )

    @contextmanager
    def claim(self) -> Iterator[None]:
        """Take the file for this process.

        Raises:
            UsageError: If another process writes it, or the folder cannot be written.
            CheckpointError: If the file cannot be written, such as on a full disk.
        """
        with writing(self.path, cleanup=self.parts / _JOINED):
            try:
                self.parts.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UsageError(
                    f"output={str(self.path)!r} cannot be written ({error.strerror}); pass another file."
                ) from error
            lock = FileLock(self.parts / LOCK, blocking=False)
            try:
                lock.acquire()
            except Timeout as error:
                raise UsageError(f"output={str(self.path)!r} is being written by another process.") from error
            try:
                self._check()
                write_json(self.parts / SETTINGS, self.settings)
                yield
            finally:
                (self.parts / LOCK).unlink(missing_ok=True)
                lock.release()
                if not any(_is_part(entry.name) for entry in self.parts.iterdir()):  # nothing to go on from
                    (self.parts / SETTINGS).unlink(missing_ok=True)
                    with suppress(OSError):
                        self.parts.rmdir()

    def tidy(self) -> None:
        """Remove parts that a kill has left beside the complete file."""
        if self.parts.is_dir():
            for entry in [entry for entry in self.parts.iterdir() if _is_part(entry.name) or entry.name == SETTINGS]:
                entry.unlink()
            with suppress(OSError):
                self.parts.rmdir()

    def part(self, index: int) -> Path:
        return self.parts / f"part-{index:06d}.parquet"

    def write_part(self, index: int, table: pa.Table) -> None:
        staging = self.part(index).with_suffix(".writing")
        parquet.write_table(table, staging)
        os.replace(staging, self.part(index))

    def join(self, count: int, schema: pa.Schema) -> int:
        """Write the file, one row group per part, remove the parts, and return the number of rows."""
        staging, rows = self.parts / _JOINED, 0
        schema = schema.with_metadata({**(schema.metadata or {}), _KEY: json.dumps(self.settings).encode()})
        with parquet.ParquetWriter(staging, schema) as writer:
            for index in range(count):
                table = parquet.read_table(self.part(index)).cast(schema)
                writer.write_table(table, row_group_size=max(len(table), 1))
                rows += len(table)
        os.replace(staging, self.path)
        for index in range(count):
            self.part(index).unlink()
        return rows


class RowsWithNumbers(ImageDataset):
    """`ImageDataset` whose examples say their row, and that gives `None` for a row whose image is broken."""

    def __getitem__(self, index: int) -> Any:
        row = self.dataset[index]
        name = self._name(row, f"row {index}")
        try:
            return self._example(row, index, name) | {"row": index}
        except Unreadable as error:
            self._add_broken(index, name, str(error))
            return None


def embed(
    file: EmbeddingFile,
    model: PreTrainedModel,
    images: RowsWithNumbers,
    label: datasets.Dataset | None,
    *,
    batch_size: int,
    patches: bool = False,
    dtype: str = "float32",
    autocast_dtype: torch.dtype | None = None,
) -> int:
    """Write the features of all images, from where an earlier call was killed.

    Columns: `row` (in the dataset), that of the labels if there is one, `cls` (where the model has class tokens, their
    mean), `patch_mean`, and with `patches` `patches`, a list of vectors, row by row from the top left.

    Args:
        file (`EmbeddingFile`): Where to; see there.
        model (`PreTrainedModel`): Runs in eval mode without gradients.
        images (`RowsWithNumbers`): Images of one size.
        label (`datasets.Dataset`, *optional*): Their labels, a dataset of one column; it keeps its name and type.
        batch_size (`int`): Images at a time.
        patches (`bool`, *optional*, defaults to `False`): Also write every patch.
        dtype (`str`, *optional*, defaults to `"float32"`): One of `DTYPES`, of the numbers in the file.
        autocast_dtype (`torch.dtype`, *optional*): Default: no autocast.

    Returns:
        `int`: Number of rows, those of broken images left out.

    Raises:
        AdaLAError: For features that are not finite, in `dtype`.
        BrokenImagesError: If too many images are broken.
    """
    groups = {name: where for name, where in token_groups(model.config).items() if name != "registers"}
    width = features_width(model, images)
    columns: dict[str, Any] = {"row": datasets.Value("int64")}
    columns |= {} if label is None else dict(label.features)
    vector = datasets.List(datasets.Value(dtype), length=width[1])
    columns |= {"cls": vector} if "cls" in groups else {}
    columns |= {"patch_mean": vector}
    columns |= {"patches": datasets.List(vector, length=width[0])} if patches else {}
    schema = datasets.Features(columns).arrow_schema
    size = _rows_per_part(batch_size, width, patches)
    count = -(-len(images) // size)
    progress = tqdm(total=len(images), desc="features", unit="image", disable=None)
    with evaluating(model), progress:
        for index in range(count):
            rows = range(index * size, min((index + 1) * size, len(images)))
            if not file.part(index).exists():
                batches = DataLoader(Subset(images, list(rows)), batch_size=batch_size, collate_fn=_collate)
                tables = []
                for batch in batches:
                    if batch is not None:
                        features = features_of(model, batch, autocast_dtype).cpu()
                        tables.append(_table(features, batch["row"], groups, label, schema, patches, dtype))
                    progress.update(min(batch_size, len(images) - progress.n))
                file.write_part(index, pa.concat_tables(tables) if tables else schema.empty_table())
            progress.update(rows.stop - progress.n)
    return file.join(count, schema)


def features_width(model: PreTrainedModel, images: RowsWithNumbers) -> tuple[int, int]:
    """Return the number of patches of an image and the width of a feature."""
    config: Any = vision_config(model.config)
    height, width = images.transform.image_size  # type: ignore[attr-defined]
    rows, columns = (side // patch for side, patch in zip((height, width), pair(config.patch_size), strict=True))
    return rows * columns, config.hidden_size


def _rows_per_part(batch_size: int, width: tuple[int, int], patches: bool) -> int:
    """Return how many images a part holds, whole batches."""
    numbers = width[1] * (2 + (width[0] if patches else 0))
    return max(min(_ROWS_PER_PART, _BYTES_PER_PART // (4 * numbers)) // batch_size, 1) * batch_size


def _collate(examples: list[dict[str, Any] | None]) -> dict[str, Any] | None:
    found = [example for example in examples if example is not None]
    if not found:
        return None
    return {
        "pixel_values": torch.stack([example["pixel_values"] for example in found]),
        "row": [example["row"] for example in found],
    }


def _table(
    features: Tensor,
    rows: list[int],
    groups: dict[str, slice],
    label: datasets.Dataset | None,
    schema: pa.Schema,
    patches: bool,
    dtype: str,
) -> pa.Table:
    values = {"patch_mean": features[:, groups["patches"]].mean(dim=1)}
    if "cls" in groups:
        values["cls"] = features[:, groups["cls"]].mean(dim=1)
    if patches:
        values["patches"] = features[:, groups["patches"]]
    arrays: dict[str, Any] = {"row": pa.array(rows, pa.int64())}
    for name, value in values.items():
        value = value.to(getattr(torch, dtype))
        if not value.isfinite().all():
            reason = "exceed 65,504, pass --dtype float32" if dtype == "float16" else "are nan or infinite"
            raise AdaLAError(f"features of rows {rows[0]} to {rows[-1]} {reason}.")
        array = pa.array(value.flatten().numpy())
        for length in reversed(value.shape[1:]):
            array = pa.FixedSizeListArray.from_arrays(array, length)
        arrays[name] = array
    if label is not None:
        chosen = label.select(rows).with_format("arrow")[:]
        arrays |= {name: chosen[name] for name in chosen.column_names}
    return pa.table({name: arrays[name] for name in schema.names}).cast(schema)


def _is_part(name: str) -> bool:
    return name.startswith("part-") and name.endswith((".parquet", ".writing"))
