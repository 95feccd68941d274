"""Images of the demo: those that come with installed packages, and those that people upload."""

import io
import warnings
from importlib.util import find_spec
from pathlib import Path

import matplotlib
from PIL import Image

from modeling_adala.errors import DataError
from trainers.data.digits import load_digits
from trainers.data.image_files import ImageFiles, Unreadable, blaming, open_image

SMALLEST_SIDE = 8
MAX_PIXELS = 50_000_000
_NAMED_BY_USER = ImageFiles(external=True)
_NOTES = {
    "CMYK": "CMYK, converted to RGB",
    "I;16": "16 bits per pixel, shown as 8",
    "F": "floating point, shown as 8 bits",
    "I": "32 bits per pixel, shown as 8",
}


def example_images(channels: int) -> list[Path | Image.Image]:
    """Return images that are on this machine: digits for a model of one channel, photographs for one of three.

    The photographs are in the wheels of scikit-learn (CC BY 2.0) and matplotlib (public domain).
    """
    if channels == 1:
        rows = load_digits("test")
        return [rows[100 * digit + 7]["image"] for digit in (3, 5, 8, 2, 9, 4)]
    sklearn = find_spec("sklearn")
    assert sklearn is not None and sklearn.origin is not None  # setup.py requires it; importing it takes a second
    photographs = [Path(sklearn.origin).parent / "datasets" / "images" / f"{name}.jpg" for name in ("china", "flower")]
    return [*photographs, Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"]


def read_upload(path: str | Path) -> tuple[Image.Image, str]:
    """Return an image file, decoded, and a note on what is not shown as it is in the file, or `""`.

    Raises:
        DataError: If it is not an image, broken, too small or too large; one line to show.
    """
    path = Path(path)
    try:
        _check_size(path)
        with blaming(str(path), _NAMED_BY_USER):
            image = open_image(str(path), None, _NAMED_BY_USER)
            image.load()
    except Unreadable as error:
        raise DataError(f"{path.name} cannot be shown: {error}. Pass an image such as PNG or JPEG.") from error
    notes = [_NOTES.get(image.mode.partition(";B")[0], "")]
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        notes.append(f"{frames} frames, the first is shown")
    if image.has_transparency_data:
        notes.append("transparency is ignored")
    return image, "; ".join(note for note in notes if note)


def _check_size(path: Path) -> None:
    """Raise `DataError` for an image of a size that cannot be shown, before its pixels are decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # refused below, or small enough
            with Image.open(io.BytesIO(path.read_bytes())) as image:
                width, height = image.size
    except Image.DecompressionBombError:
        raise DataError(f"{path.name} is too large: pass at most {MAX_PIXELS:,} pixels.") from None
    except Exception:
        return  # not an image: `open_image` says why
    if width * height > MAX_PIXELS:
        raise DataError(f"{path.name} has {width:,} x {height:,} pixels; pass at most {MAX_PIXELS:,}.")
    if min(width, height) < SMALLEST_SIDE:
        raise DataError(f"{path.name} has {width} x {height} pixels; pass at least {SMALLEST_SIDE} on each side.")
