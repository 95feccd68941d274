"""Opening the image of a row: which files are allowed, and why one cannot be read."""

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

_EXIF_ORIENTATION = 0x0112
# protocols of fsspec that open an archive; only they may stand before the place of the archive itself
_ARCHIVES = ("zip", "tar", "gzip", "bz2", "lz4", "xz", "zstd")


class Unreadable(Exception):
    """Raised for an image that does not decode or may not be opened; the message says why."""


@dataclass(frozen=True)
class ImageFiles:
    """Files that rows may name. A table from the Hub can name any path or URL.

    Args:
        roots (`tuple[str, ...]`, *optional*): Folders whose files may be opened. Default: any local file.
        hub_id (`str`, *optional*): Dataset on the Hub whose files may be read.
        external (`bool`, *optional*, defaults to `False`): Open whatever is named, URLs too.
    """

    roots: tuple[str, ...] | None = None
    hub_id: str | None = None
    external: bool = False

    def check(self, path: str) -> None:
        """Raise `Unreadable` for a path or URL that may not be opened."""
        if self.external:
            return
        *archives, place = path.split("::")
        if "://" in place:
            prefix = f"hf://datasets/{self.hub_id}"
            is_inside = self.hub_id is not None and place.startswith((f"{prefix}@", f"{prefix}/"))
            reason = "URLs in rows are not fetched"
        else:
            absolute = os.path.abspath(place)
            is_inside = self.roots is None or any(Path(absolute).is_relative_to(root) for root in self.roots)
            reason = "it is not inside the folder of the dataset"
        if not is_inside or any(archive.partition("://")[0] not in _ARCHIVES for archive in archives):
            raise Unreadable(f"{reason}; allow_external_images=True opens it, if you trust the data")


LOCAL_FILES = ImageFiles()


def encoded_bytes(value: Any, files: ImageFiles = LOCAL_FILES) -> bytes | None:
    """Return the bytes of an image file, or `None` for a missing file or a path inside an archive.

    Raises:
        Unreadable: For a path that `files` does not allow.
    """
    if isinstance(value, bytes):
        return value
    if isinstance(value, dict) and value.get("bytes") is not None:
        return value["bytes"]
    path = value.get("path") if isinstance(value, dict) else value
    if isinstance(path, str):
        files.check(path)
        if "://" not in path and Path(path).is_file():
            return Path(path).read_bytes()
    return None


def open_image(
    value: Any,
    draft_size: Callable[[tuple[int, int]], tuple[int, int] | None] | None = None,
    files: ImageFiles = LOCAL_FILES,
) -> Image.Image:
    """Open the image of a row.

    Args:
        value (`PIL.Image.Image`, `bytes`, `str` or `dict`): An image, or its file as bytes, path or both.
        draft_size (`Callable`, *optional*): See `ImageTransform.draft_size`.
        files (`ImageFiles`, *optional*): Paths that may be opened. Default: those of local files.

    Raises:
        Unreadable: If there is no image, its path may not be opened, or it has pixels that are not finite. Errors of
            Pillow for a broken file pass through, see `blaming`.
    """
    if isinstance(value, Image.Image):
        return _checked(value)
    encoded = encoded_bytes(value, files)
    if encoded == b"":
        raise Unreadable("the file is empty")
    if encoded is None:
        path = value.get("path") if isinstance(value, dict) else value
        if not isinstance(path, str):
            raise Unreadable("the row has no image")
        if "://" not in path:
            raise Unreadable("the file does not exist")
        return _checked(datasets.Image().decode_example({"bytes": None, "path": path}))
    image: Image.Image = Image.open(io.BytesIO(encoded))
    if draft_size is not None and (size := draft_size(image.size)) is not None:
        # A JPEG decodes several times faster at 1/2, 1/4 or 1/8 of its size; other formats ignore this.
        image.draft(None, size)
    if image.getexif().get(_EXIF_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    return _checked(image)


@contextmanager
def blaming(value: Any, files: ImageFiles = LOCAL_FILES) -> Iterator[None]:
    """Raise `Unreadable` for an error inside if the image does not decode; any other error passes through."""
    try:
        yield
    except Exception as error:
        reason = _why_unreadable(value, files)
        if reason is None:
            raise
        raise Unreadable(reason) from error


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _checked(image: Image.Image) -> Image.Image:
    # Float images only (TIFF): as 8 bits, NaN would be black, or any number.
    if image.mode == "F" and not np.isfinite(np.asarray(image)).all():
        raise Unreadable("it has pixels that are NaN or infinite")
    return image


def _why_unreadable(value: Any, files: ImageFiles) -> str | None:
    """Return why an image does not decode; `None` if it does, and the error is that of a transform."""
    try:
        open_image(value, None, files).convert("RGB")
    except Unreadable as error:
        return str(error)
    except UnidentifiedImageError:
        return "Pillow does not know its format"
    except Exception as error:
        return first_line(error)
    return None
