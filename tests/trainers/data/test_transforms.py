"""Image transforms: sizes, pixel values against independent formulas, and where randomness comes from."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_adala.errors import UsageError
from trainers.data.transforms import ImageTransform, check_image_size

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def plain(size: int | tuple[int, int], **options) -> ImageTransform:
    return ImageTransform(size, 0.0, 1.0, **options)


@pytest.mark.parametrize(
    ("image_size", "patch_size", "expected"),
    [(224, 14, (224, 224)), ((28, 56), 14, (28, 56)), ((32, 48), (16, 12), (32, 48)), (7, 7, (7, 7))],
)
def test_valid_image_sizes(image_size, patch_size, expected):
    assert check_image_size(image_size, patch_size) == expected


@pytest.mark.parametrize(
    ("image_size", "patch_size", "words"),
    [
        (225, 14, ["225", "height", "224 or 238"]),
        ((224, 230), 14, ["width 230", "224 or 238"]),
        (5, 14, ["use 14"]),
        (0, 16, ["use 16"]),
        (-3, 16, ["image_size=-3"]),
        (2.5, 14, ["image_size=2.5"]),
        ((1, 2, 3), 1, ["image_size=(1, 2, 3)"]),
        (True, 1, ["image_size=True"]),
        (14, 0, ["patch_size=0"]),
    ],
)
def test_invalid_image_sizes_name_the_way_out(image_size, patch_size, words):
    with pytest.raises(UsageError) as error:
        check_image_size(image_size, patch_size)
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


def test_image_of_the_output_size_is_only_normalized():
    image = noise(12, 8)
    output = ImageTransform((8, 12), MEAN, STD)(image)
    expected = (np.asarray(image, dtype=np.float64) / 255 - MEAN) / STD
    assert output.dtype == torch.float32 and output.is_contiguous()
    np.testing.assert_allclose(output.numpy(), expected.transpose(2, 0, 1), atol=1e-5)


@pytest.mark.parametrize(
    ("width", "height", "size", "box"),
    [
        (60, 40, (20, 20), (10, 0, 50, 40)),
        (40, 60, (20, 20), (0, 10, 40, 50)),
        (60, 40, (10, 30), (0, 10, 60, 30)),
        (9, 6, (24, 24), (1.5, 0, 7.5, 6)),
    ],
)
def test_eval_resizes_the_largest_center_crop(width, height, size, box):
    image = noise(width, height)
    output = plain(size, rescale_factor=1.0)(image, np.random.default_rng(0))
    expected = np.asarray(image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box))
    np.testing.assert_array_equal(output.numpy(), expected.transpose(2, 0, 1))


def test_eval_equals_the_image_processor_of_transformers():
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    processor = BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    # A size whose shortest edge and crop fall on whole pixels, so that rounding in two steps changes nothing.
    image = noise(128, 64)
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    output = ImageTransform.from_processor(processor, 32)(image)
    np.testing.assert_allclose(output.numpy(), expected.numpy(), atol=1e-4)


def test_from_processor_reads_every_setting():
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    image = noise(16, 16)
    pixels = np.asarray(image, dtype=np.float64).transpose(2, 0, 1)
    raw = ViTImageProcessorPil(do_rescale=False, do_normalize=False)
    np.testing.assert_allclose(ImageTransform.from_processor(raw, 16)(image), pixels, atol=1e-3)
    scaled = ViTImageProcessorPil(rescale_factor=1 / 127.5, image_mean=MEAN, image_std=STD, resample=2)
    transform = ImageTransform.from_processor(scaled, 16)
    expected = (pixels / 127.5 - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
    np.testing.assert_allclose(transform(image), expected, atol=1e-4)
    assert transform.resample == 2
    assert ImageTransform.from_processor(scaled, 16, resample=0).resample == 0
    np.testing.assert_allclose(ImageTransform.from_processor(None, 16)(image), pixels / 255, atol=1e-6)


def test_from_processor_averages_channels_for_grayscale():
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    processor = ViTImageProcessorPil(image_mean=MEAN, image_std=STD)
    output = ImageTransform.from_processor(processor, 4, num_channels=1)(Image.new("L", (4, 4), 51))
    assert output.shape == (1, 4, 4)
    np.testing.assert_allclose(output, (0.2 - 0.4) / 0.3, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I;16", "I", "F"])
def test_every_mode_is_converted(mode, channels, train):
    white = {"CMYK": (0, 0, 0, 0), "YCbCr": (255, 128, 128), "HSV": (0, 0, 255), "I;16": 65535, "I": 65535, "F": 1.0}
    default = {1: 255, 2: (255, 255), 3: (255, 255, 255), 4: (255, 255, 255, 255)}[
        len(Image.new(mode, (1, 1)).getbands())
    ]
    if mode in ("P", "PA"):
        image = Image.new("RGB", (9, 7), "white").convert("P").convert(mode)
    else:
        image = Image.new(mode, (9, 7), white.get(mode, default))
    output = plain(4, num_channels=channels, train=train)(image, np.random.default_rng(0))
    assert output.shape == (channels, 4, 4)
    assert float(output.min()) == pytest.approx(1.0) and float(output.max()) == pytest.approx(1.0)


def test_sixteen_bits_are_scaled_instead_of_clipped():
    image = Image.fromarray(np.array([[0, 257 * 100], [257 * 200, 65535]], dtype=np.uint16))
    output = plain(2, rescale_factor=1.0, num_channels=1)(image)
    assert output.tolist() == [[[0.0, 100.0], [200.0, 255.0]]]


def test_palette_is_looked_up_before_resizing():
    image = Image.new("P", (2, 2))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1, 0, 1])
    output = plain(1, rescale_factor=1.0)(image)
    np.testing.assert_allclose(output.flatten(), [127.5, 0, 127.5], atol=1)


def test_train_depends_on_the_generator_only():
    transform, image = plain(16, train=True), noise(50, 40)
    np.random.seed(1)
    first = transform(image, np.random.default_rng([0, 1, 2]))
    np.random.seed(2)
    assert torch.equal(first, transform(image, np.random.default_rng([0, 1, 2])))
    assert not torch.equal(first, transform(image, np.random.default_rng([0, 1, 3])))
    assert torch.equal(first, pickle.loads(pickle.dumps(transform))(image, np.random.default_rng([0, 1, 2])))
    with pytest.raises(UsageError, match="rng=None"):
        transform(image)


def test_crops_follow_their_ranges():
    transform = plain(16, train=True, crop_scale=(0.3, 0.6), crop_ratio=(0.8, 1.25))
    boxes = [transform._random_box((200, 160), np.random.default_rng(seed)) for seed in range(300)]
    left, top, right, bottom = np.array(boxes).T
    assert left.min() >= 0 and top.min() >= 0 and right.max() <= 200 and bottom.max() <= 160
    area, ratio = (right - left) * (bottom - top) / (200 * 160), (right - left) / (bottom - top)
    assert 0.29 < area.min() < 0.33 and 0.57 < area.max() < 0.61
    assert 0.78 < ratio.min() < 0.83 and 1.2 < ratio.max() < 1.27
    # Log-uniform: as many wide crops as tall ones.
    assert 0.4 < (ratio > 1).mean() < 0.6
    assert left.min() < 10 and right.max() > 190


def test_panorama_falls_back_to_the_center():
    transform = plain(16, train=True)
    assert transform._random_box((1000, 10), np.random.default_rng(0)) == (493, 0, 506, 10)
    assert transform._random_box((10, 1000), np.random.default_rng(0)) == (0, 493, 10, 506)
    assert transform._random_box((1, 1), np.random.default_rng(0)) == (0, 0, 1, 1)


def test_flip_mirrors_columns():
    image = noise(8, 8)
    whole = {"train": True, "crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0)}
    never = plain(8, horizontal_flip=0.0, **whole)(image, np.random.default_rng(0))
    always = plain(8, horizontal_flip=1.0, **whole)(image, np.random.default_rng(0))
    np.testing.assert_array_equal(never, plain(8)(image))
    assert torch.equal(always, never.flip(-1)) and not torch.equal(always, never)
    flips = [torch.equal(plain(8, **whole)(image, np.random.default_rng(seed)), always) for seed in range(100)]
    assert 30 < sum(flips) < 70


def test_draft_keeps_every_crop_at_least_as_large_as_the_output():
    transform = plain(32, train=True)
    for size in [(4000, 3000), (300, 400), (3000, 30), (33, 33)]:
        drafted = transform.draft_size(size)
        boxes = np.array([transform._random_box(size, np.random.default_rng(seed)) for seed in range(200)])
        assert ((boxes[:, 2] - boxes[:, 0]) / size[0] * drafted[0]).min() >= 63
        assert ((boxes[:, 3] - boxes[:, 1]) / size[1] * drafted[1]).min() >= 63
    assert transform.draft_size((4000, 3000))[0] < 200
    assert plain(32).draft_size((4000, 3000)) is None


@pytest.mark.parametrize(
    "options",
    [
        {"num_channels": 4},
        {"resample": 99},
        {"crop_scale": (0.0, 1.0)},
        {"crop_scale": (0.9, 0.5)},
        {"crop_ratio": (0.0, 1.0)},
        {"horizontal_flip": 1.5},
        {"image_size": 0},
        {"image_mean": (0.5, 0.5)},
        {"image_std": 0.0},
    ],
)
def test_wrong_options_are_named(options):
    arguments = {"image_size": 8, "image_mean": 0.0, "image_std": 1.0, **options}
    with pytest.raises(UsageError, match=next(iter(options))):
        ImageTransform(**arguments)
