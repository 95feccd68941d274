"""The alignment losses against formulas written by hand in NumPy."""

import numpy as np
import pytest
import torch

from trainers.losses import (
    TeacherVariance,
    alignment_loss_before_projection,
    attention_alignment_loss,
    feature_alignment_loss,
)

GROUPS = {"cls": slice(0, 1), "registers": slice(1, 3), "patches": slice(3, None)}
EQUAL = dict.fromkeys(GROUPS, 1.0)


def tokens(seed: int, scale: float = 1.0, shape: tuple[int, ...] = (3, 9, 5)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator) + torch.arange(shape[-1]) * scale


def teacher_variance(*batches: torch.Tensor) -> torch.Tensor:
    variance = TeacherVariance()
    for batch in batches:
        variance.add(batch)
    return variance.value()


def group_variances(teacher: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: teacher_variance(teacher[:, group]) for name, group in GROUPS.items()}


def smooth_l1(difference: np.ndarray) -> float:
    size = np.abs(difference)
    return float(np.where(size < 1, 0.5 * size**2, size - 0.5).mean())


def test_teacher_variance_is_that_around_each_channels_own_mean():
    target = tokens(0, scale=3.0)
    rows = target.double().numpy().reshape(-1, 5)
    expected = ((rows - rows.mean(axis=0)) ** 2).mean()
    assert teacher_variance(target).item() == pytest.approx(expected, rel=1e-5)


def test_teacher_variance_ignores_offsets_of_channels_and_grows_with_the_square_of_the_scale():
    target = torch.randn(4, 7, 6)
    offset = 50 * torch.arange(6.0)
    assert teacher_variance(target + offset).item() == pytest.approx(teacher_variance(target).item(), rel=1e-3)
    assert teacher_variance(3 * target).item() == pytest.approx(9 * teacher_variance(target).item(), rel=1e-5)


def test_teacher_variance_of_a_constant_target_can_be_divided_by():
    variance = teacher_variance(torch.full((2, 3, 4), 7.0))
    assert 0 < variance.item() < 1e-6


def test_teacher_variance_is_computed_in_float32_whatever_comes_in():
    target = 300 * torch.randn(4, 8, 8)  # the squares overflow float16
    half = teacher_variance(target.half())
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(teacher_variance(target).item(), rel=1e-2)


def test_teacher_variance_of_batches_is_that_of_all_of_them_together():
    # means far apart and batches of different sizes, so that averaging the batches' variances would be far off
    batches = [tokens(seed, shape=(size, 9, 5)) + 10 * seed for seed, size in enumerate((1, 4, 2))]
    together = teacher_variance(torch.cat(batches))
    assert teacher_variance(*batches).item() == pytest.approx(together.item(), rel=1e-5)
    assert together.item() > 2 * teacher_variance(batches[0]).item()


def test_attention_loss_is_the_relative_squared_error():
    student, teacher = tokens(1, scale=10.0), tokens(3, scale=10.0)
    variance = teacher_variance(teacher)
    expected = ((student.double().numpy() - teacher.double().numpy()) ** 2).mean() / variance.item()
    assert attention_alignment_loss(student, teacher, variance).item() == pytest.approx(expected, rel=1e-5)


def test_attention_loss_weighs_blocks_alike_whatever_their_scale():
    student, teacher = tokens(1), tokens(2)
    losses = [
        attention_alignment_loss(scale * student, scale * teacher, teacher_variance(scale * teacher)).item()
        for scale in (1, 100)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_equal_inputs_have_no_error():
    teacher = tokens(0)
    assert attention_alignment_loss(teacher.clone(), teacher, teacher_variance(teacher)).item() == 0
    for kind in ("mse", "cosine"):
        losses = feature_alignment_loss(teacher.clone(), teacher, GROUPS, group_variances(teacher), EQUAL, kind)
        assert {name: value.item() for name, value in losses.items()} == pytest.approx(
            {"loss": 0, "cls": 0, "registers": 0, "patches": 0}, abs=1e-6
        )


def test_constant_vector_at_the_teachers_mean_has_error_one():
    teacher = tokens(0, scale=4.0)
    constant = teacher.mean(dim=(0, 1)).expand_as(teacher)
    error = attention_alignment_loss(constant, teacher, teacher_variance(teacher))
    assert error.item() == pytest.approx(1.0, rel=1e-5)
    parts = [teacher[:, group] for group in GROUPS.values()]
    means = torch.cat([part.mean(dim=(0, 1), keepdim=True).expand_as(part) for part in parts], dim=1)
    features = feature_alignment_loss(means, teacher, GROUPS, group_variances(teacher), EQUAL)
    assert [value.item() for value in features.values()] == pytest.approx([1.0] * 4, rel=1e-5)


def test_feature_mse_is_the_mean_over_the_groups_of_their_relative_errors():
    student, teacher = tokens(1), tokens(2)
    variances = group_variances(teacher)
    losses = feature_alignment_loss(student, teacher, GROUPS, variances, EQUAL)
    error = (student.double().numpy() - teacher.double().numpy()) ** 2
    expected = {name: error[:, group].mean() / variances[name].item() for name, group in GROUPS.items()}
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value, rel=1e-5)
    assert losses["loss"].item() == pytest.approx(np.mean(list(expected.values())), rel=1e-5)


def test_feature_cosine_is_angle_plus_a_tenth_of_smooth_l1_at_unit_variance():
    student, teacher = tokens(1, scale=2.0), tokens(2, scale=2.0)
    variances = group_variances(teacher)
    losses = feature_alignment_loss(student, teacher, GROUPS, variances, EQUAL, "cosine")
    expected = {}
    for name, group in GROUPS.items():
        ours, theirs = student[:, group].double().numpy(), teacher[:, group].double().numpy()
        cosine = (ours * theirs).sum(-1) / np.linalg.norm(ours, axis=-1) / np.linalg.norm(theirs, axis=-1)
        deviation = np.sqrt(variances[name].item())
        expected[name] = 1 - cosine.mean() + 0.1 * smooth_l1((ours - theirs) / deviation)
        assert losses[name].item() == pytest.approx(expected[name], rel=1e-5)
    assert losses["loss"].item() == pytest.approx(np.mean(list(expected.values())), rel=1e-5)


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_weights_are_relative_to_their_sum_and_leave_the_components_as_they_are(kind):
    student, teacher = tokens(1), tokens(2)
    variances = group_variances(teacher)
    even = feature_alignment_loss(student, teacher, GROUPS, variances, EQUAL, kind)
    weights = {"cls": 3.0, "registers": 0.0, "patches": 1.0}
    losses = feature_alignment_loss(student, teacher, GROUPS, variances, weights, kind)
    assert losses["loss"].item() == pytest.approx(0.75 * even["cls"].item() + 0.25 * even["patches"].item(), rel=1e-5)
    assert all(losses[name].item() == even[name].item() for name in GROUPS)
    doubled = feature_alignment_loss(student, teacher, GROUPS, variances, {n: 2.0 for n in GROUPS}, kind)
    assert doubled["loss"].item() == pytest.approx(even["loss"].item(), rel=1e-6)


def test_weight_of_a_group_that_the_model_lacks_counts_for_nothing():
    student, teacher = tokens(1), tokens(2)
    groups = {name: GROUPS[name] for name in ("cls", "patches")}
    variances = group_variances(teacher)
    losses = feature_alignment_loss(student, teacher, groups, variances, EQUAL | {"registers": 9.0})
    assert set(losses) == {"loss", "cls", "patches"}
    assert losses["loss"].item() == pytest.approx((losses["cls"] + losses["patches"]).item() / 2, rel=1e-5)


def test_only_the_loss_carries_gradients():
    student, teacher = tokens(1).requires_grad_(), tokens(2)
    variances = group_variances(teacher)
    assert not teacher_variance(student).requires_grad
    for losses in (
        feature_alignment_loss(student, teacher, GROUPS, variances, EQUAL),
        feature_alignment_loss(student, teacher, GROUPS, variances, EQUAL, "cosine"),
    ):
        assert [name for name, value in losses.items() if value.requires_grad] == ["loss"]


def test_gradient_of_the_attention_loss_is_that_of_the_formula():
    student, teacher = tokens(1).requires_grad_(), tokens(3)
    attention_alignment_loss(student, teacher, 5.0).backward()
    expected = 2 * (student.detach() - teacher) / student.numel() / 5
    torch.testing.assert_close(student.grad, expected, rtol=1e-5, atol=1e-8)


def test_loss_before_the_projection_is_that_after_it_with_its_gradient():
    """In float64, with as many outputs as inputs and with more: the mean is over the outputs."""
    for outputs in (5, 8):
        projection = torch.nn.Linear(5, outputs, dtype=torch.float64).requires_grad_(False)
        gram = projection.weight.T @ projection.weight / outputs
        student, teacher = (tokens(seed).double() for seed in (1, 2))
        student.requires_grad_()
        expected = (projection(student) - projection(teacher)).square().mean() / 3
        (gradient,) = torch.autograd.grad(expected, student)
        loss = alignment_loss_before_projection(student, teacher, gram, 3.0)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
        torch.testing.assert_close(torch.autograd.grad(2 * loss, student)[0], 2 * gradient, rtol=1e-10, atol=1e-14)
        assert gradient.abs().max() > 1e-3


def test_reduced_precision_inputs_give_float32_losses():
    student, teacher = tokens(1), tokens(2)
    exact = feature_alignment_loss(student.bfloat16().float(), teacher.bfloat16().float(), GROUPS, EQUAL, EQUAL)
    losses = feature_alignment_loss(student.bfloat16(), teacher.bfloat16(), GROUPS, EQUAL, EQUAL)
    assert losses["loss"].dtype == torch.float32
    assert losses["loss"].item() == pytest.approx(exact["loss"].item(), rel=1e-6)
