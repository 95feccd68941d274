"""What the figures of a run cost: batches that fit large images, and blocks that are compared one after the other."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from family_helpers import stock_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training_helpers import tiny_dinov2, tiny_vit

from modeling_adala import UsageError, convert
from modeling_adala.inspection.towers import forward_tower, token_groups, transformer_blocks
from modeling_adala.modeling_adala import MODELS
from trainers import DataConfig, DataModule, RecipeConfig
from trainers.evaluation.comparison import Comparison, block_errors
from trainers.evaluation.metrics import FeatureRelativeError

DIGITS = {"dataset": "mnist-digits", "train_split": "train[:40]", "eval_split": "test[:30]"}


# --- errors of the blocks --------------------------------------------------------------------------------------------


@torch.no_grad()
def outputs_of_blocks(model, pixels) -> list[torch.Tensor]:
    states = []
    hooks = [
        block.register_forward_hook(
            lambda _, __, output: states.append(output[0] if isinstance(output, tuple) else output)
        )
        for block in transformer_blocks(model)
    ]
    forward_tower(model.eval(), pixels)
    for hook in hooks:
        hook.remove()
    return states


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [(32, 32), (24, 48)])
def test_errors_are_those_of_two_free_runs(name, size):
    teacher = stock_model(name)
    student = convert(teacher, check_parity=False)
    pixels = torch.randn(2, 3, *size)
    patches = token_groups(teacher.config)["patches"]
    expected = [
        FeatureRelativeError().compute(predictions=ours[:, patches], references=theirs[:, patches])["relative_error"]
        for ours, theirs in zip(outputs_of_blocks(student, pixels), outputs_of_blocks(teacher, pixels), strict=True)
    ]
    assert block_errors(teacher, student, pixels) == pytest.approx(expected, rel=1e-5)
    assert len(expected) == 2 and min(expected) > 1e-3
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in transformer_blocks(teacher))
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in transformer_blocks(student))


class LiveBytes(TorchDispatchMode):
    """The most bytes that the results of operations have held at once, besides the weights (and views of them)."""

    def __init__(self, *models):
        super().__init__()
        self.weights = {p.untyped_storage().data_ptr() for model in models for p in model.parameters()}
        self.held: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.weights:
                self.held[id(x)] = x.nbytes if x._base is None else 0
                weakref.finalize(x, self.held.pop, id(x), None)
        self.peak = max(self.peak, sum(self.held.values()))
        return result


def peak_of(function, teacher, student, pixels) -> int:
    gc.collect()
    with LiveBytes(teacher, student) as live:
        function(teacher, student, pixels)
    return live.peak


def test_states_of_all_blocks_are_never_held_together():
    pixels, peaks, naive = torch.randn(4, 1, 28, 28), [], []
    for layers in (2, 12):
        teacher = tiny_vit(layers=layers)
        student = convert(teacher, check_parity=False)
        peaks.append(peak_of(block_errors, teacher, student, pixels))
        naive.append(peak_of(lambda t, s, x: [outputs_of_blocks(m, x) for m in (t, s)], teacher, student, pixels))
    state = 4 * 17 * 32 * 4
    assert naive[1] > naive[0] + 15 * state  # the counter counts
    assert peaks[1] < peaks[0] + state, (peaks, naive)


# --- batches ---------------------------------------------------------------------------------------------------------


def module(image_size: int | str, patch: int = 16, **settings) -> DataModule:
    model = SimpleNamespace(image_size=28, patch_size=patch, num_channels=1)
    return DataModule(DataConfig(**DIGITS, image_size=image_size, **settings), model)


@pytest.mark.parametrize(
    ("size", "patch", "batch"),
    [
        (28, 2, 64),
        (224, 16, 64),
        (224, 14, 64),
        (512, 16, 16),
        (1024, 16, 4),
        (1022, 14, 3),
        ("512x1024", 16, 8),
        (4096, 16, 1),
    ],
)
def test_larger_images_make_smaller_batches(size, patch, batch):
    data = module(size, patch)
    assert data.eval_batch_size == data.loader(data.eval_dataset()).batch_size == batch


def test_size_of_evaluation_batches_is_a_setting_and_changes_no_figure():
    teacher = tiny_dinov2()
    student = convert(teacher, check_parity=False)
    shapes, figures = [], []
    teacher.embeddings.register_forward_hook(lambda _, args, output: shapes.append(len(output)))
    for batch in (None, 7):
        data = DataModule(DataConfig(**DIGITS, eval_batch_size=batch), teacher.config)
        comparison = Comparison(teacher, data, knn_images=20)
        figures.append(comparison(student))
        largest, shapes = max(shapes), []
        teacher.embeddings._forward_hooks.clear()
        teacher.embeddings.register_forward_hook(lambda _, args, output, s=shapes: s.append(len(output)))
        assert largest == (batch or 30)
    for name, value in figures[0].items():
        if isinstance(value, float) and name != "seconds":
            assert figures[1][name] == pytest.approx(value, rel=1e-4), name


@pytest.mark.parametrize("batch", [0, -1])
def test_other_batch_sizes_are_refused(batch):
    with pytest.raises(UsageError, match="eval_batch_size"):
        DataConfig(**DIGITS, eval_batch_size=batch)


def test_recipe_knows_the_size_of_evaluation_batches():
    assert RecipeConfig(teacher="t", dataset="d", eval_batch_size="8").eval_batch_size == 8
