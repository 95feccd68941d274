"""Boundary of the public operator: valid and invalid arguments, and backends that honor each of them."""

from itertools import pairwise
from pathlib import Path

import peft
import pytest
import torch
from torch.autograd import forward_ad

from modeling_adala import (
    FEATURE_MAPS,
    UsageError,
    attention_weights,
    build_feature_map,
    linear_attention,
    linear_attention_reference,
)
from modeling_adala.configuration_adala import BACKENDS
from modeling_adala.feature_maps import FeatureMap

ROOT = Path(__file__).parents[2]
HERE = [name for name in BACKENDS if name != "triton"]  # its own are in triton_suite.py
every_backend = pytest.mark.parametrize("backend", HERE)


def inputs(batch=2, heads=3, tokens=40, dim=16, value_dim=24, dtype=torch.float32) -> list[torch.Tensor]:
    """Query, key and value as attention modules hand them over."""
    torch.manual_seed(0)
    return [torch.randn(batch, tokens, heads, d).to(dtype).transpose(1, 2) for d in (dim, dim, value_dim)]


def values_and_gradients(operator, *tensors: torch.Tensor) -> list[torch.Tensor]:
    leaves = [x.detach().requires_grad_() for x in tensors]
    output = operator(*leaves)
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)
    return [output.detach(), *torch.autograd.grad((output * weight).sum(), leaves)]


def assert_close(actual: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float = 1e-5) -> None:
    for ours, truth in zip(actual, expected, strict=True):
        assert (ours.double() - truth).norm() <= tolerance * truth.norm()


# --- what is refused, and how ----------------------------------------------------------------------------------------

query, key, value = inputs()
mask = torch.ones(2, 40, dtype=torch.bool)
learned = build_feature_map("hedgehog", 3, 16)
REFUSED = {
    "three axes": ({"query": query[0]}, r"query of shape \(3, 40, 16\) is not \(batch, heads, tokens, head_dim\)"),
    "no width": ({"value": value[..., :0]}, r"value of shape \(2, 3, 40, 0\)"),
    "a list": ({"key": [1.0]}, "key is a list; pass a tensor"),
    "integers": ({"query": query.long()}, "query is torch.strided in torch.int64; .*float32"),
    "complex": ({"value": value.to(torch.complex64)}, "value is torch.strided in torch.complex64"),
    "sparse": ({"key": key.to_sparse()}, "key is torch.sparse_coo in torch.float32"),
    "meta": ({"key": key.to("meta")}, "key is on meta and query on cpu; move them"),
    "batch": ({"key": key[:1]}, r"key of shape \(1, 3, 40, 16\) has another batch .* \(2, 3, 40, 16\); expand"),
    "shared queries": ({"query": query[:1]}, "another batch or number of heads"),
    "heads": ({"value": value[:, :2]}, r"value of shape \(2, 2, 40, 24\) has another batch or number of heads"),
    "head_dim": ({"key": key[..., :8]}, "key of shape .* has another head_dim than query"),
    "tokens": ({"value": value[:, :, :39]}, "value of shape .* has another number of tokens than key"),
    "mask of a batch of one": ({"key_mask": mask[:1]}, r"key_mask of shape \(1, 40\) must be \(2, 40\).*expand"),
    "mask of pairs": ({"key_mask": mask[:, None, None]}, r"key_mask of shape \(2, 1, 1, 40\) must be \(2, 40\)"),
    "mask of 0 and 2": ({"key_mask": 2 * mask.long()}, "key_mask in torch.int64 has other values than 1"),
    "additive mask": ({"key_mask": torch.zeros(2, 40) - torch.inf}, "key_mask in torch.float32.*`bias == 0`"),
    "NaN in the mask": ({"key_mask": mask / mask.logical_not()}, "key_mask in torch.float32 has other values"),
    "mask elsewhere": ({"key_mask": mask.to("meta")}, "key_mask is on meta and key on cpu"),
    "mask as a list": ({"key_mask": [1, 1]}, "key_mask is a list; pass a strided tensor"),
    "negative eps": ({"eps": -1.0}, "eps=-1.0 must be a number from 0 on"),
    "NaN as eps": ({"eps": float("nan")}, "eps=nan"),
    "other heads": (
        {"feature_map": build_feature_map("t2r", 2, 16)},
        r"feature_map is for 2 heads of 16 .*has 3 of 16",
    ),
    "learned by name": (
        {"feature_map": "hedgehog"},
        r"'hedgehog' has weights.*build_feature_map\('hedgehog', 3, 16\)",
    ),
    "unknown name": ({"feature_map": "gelu"}, "feature_map='gelu' is unknown; choose one of elu"),
    "no feature map": ({"feature_map": torch.nn.Linear(16, 16)}, "feature_map is a Linear; pass a FeatureMap"),
    "weights on meta": ({"feature_map": build_feature_map("t2r", 3, 16).to("meta")}, "weights on meta.*on cpu; load"),
}


@pytest.mark.parametrize("case", REFUSED)
@every_backend
def test_wrong_arguments_are_refused_before_any_backend(backend, case):
    changes, message = REFUSED[case]
    arguments = {"query": query, "key": key, "value": value, "feature_map": "elu"} | changes
    with pytest.raises(UsageError, match=message) as refusal:
        linear_attention(**arguments, backend=backend)
    assert "\n" not in str(refusal.value)
    if "value" not in changes and case != "tokens":
        arguments.pop("value")
        with pytest.raises(UsageError, match=message):
            attention_weights(**arguments)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        (torch.tensor([0, 39]), r"cu_seqlens=\[0, 39\] must rise from 0 to the number of tokens, 40"),
        (torch.tensor([0, 30, 20, 40]), "must rise"),
        (torch.tensor([-1, 40]), "must rise"),
        (torch.tensor([], dtype=torch.int32), r"cu_seqlens=\[\] must rise"),
        (torch.tensor([[0, 40]]), r"of shape \(1, 2\) must be int32 or int64"),
        (torch.tensor([0.0, 40.0]), "cu_seqlens in torch.float32"),
        (torch.tensor([0, 40], device="meta"), "cu_seqlens is on meta"),
        ([0, 40], "cu_seqlens is a list"),
    ],
    ids=str,
)
@every_backend
def test_bounds_that_do_not_fit_are_refused(backend, bounds, message):
    with pytest.raises(UsageError, match=message):
        linear_attention(*inputs(batch=1), "elu", cu_seqlens=bounds, backend=backend)
    with pytest.raises(UsageError, match="batch of one"):
        linear_attention(query, key, value, "elu", cu_seqlens=torch.tensor([0, 40]), backend=backend)


# --- every argument, on every backend --------------------------------------------------------------------------------

DTYPES = [torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_backend
def test_a_mask_of_any_dtype_counts(backend, dtype):
    """int64 is what a processor returns."""
    real = torch.arange(40) < torch.tensor([[40], [17]])
    expected = linear_attention_reference(*(x.double() for x in (query, key, value)), learned.double(), real)
    actual = linear_attention(query, key, value, learned.float(), real.to(dtype), backend=backend)
    assert_close([actual], [expected])
    assert_close([attention_weights(query, key, learned, real.to(dtype)) @ value], [expected])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_a_mask_of_any_dtype_compiles_and_exports(dtype):
    class Operator(torch.nn.Module):
        def forward(self, query, key, value, mask):
            return linear_attention(query, key, value, "elu", mask)

    arguments = query, key, value, (torch.rand(2, 40) < 0.5).to(dtype)
    expected = linear_attention(*arguments[:3], "elu", arguments[3])
    torch._dynamo.reset()
    programs = [torch.compile(Operator(), fullgraph=True, backend="eager")]
    programs += [torch.export.export(Operator(), arguments, strict=strict).module() for strict in (True, False)]
    for program in programs:
        torch.testing.assert_close(program(*arguments), expected, rtol=0, atol=1e-5)


PACKS = {
    "plain": {},
    "masked": {"masked": True},
    "centered": {"center_keys": True},
    "centered and masked": {"center_keys": True, "masked": True},
    "hooks": {"hooks": True},
    "float64": {"dtype": torch.float64},
    "wide heads": {"dim": 300},
    "more features than are compiled": {"dim": 1040, "tokens": 20},
}


@pytest.mark.parametrize("name", ["elu", "relu", "hedgehog"])
@pytest.mark.parametrize("case", PACKS)
@every_backend
def test_packed_images_attend_within_themselves(backend, case, name):
    options = {"tokens": 60, "dim": 16, "dtype": torch.float32, "center_keys": False} | PACKS[case]
    tokens = options["tokens"]
    feature_map = build_feature_map(name, 2, options["dim"], center_keys=options["center_keys"]).to(options["dtype"])
    tensors = inputs(1, 2, tokens, options["dim"], 8, options["dtype"])
    tensors[1] = tensors[1] + torch.arange(tokens)[:, None] / 10  # images differ in their mean
    bounds = torch.tensor([0, 5, 5, 6, tokens])
    real = torch.rand(1, tokens) < 0.7 if "masked" in options else None
    if "hooks" in options:
        feature_map.register_forward_hook(lambda *args: None)

    def one_by_one(*leaves):
        parts = []
        for first, last in pairwise(bounds.tolist()):
            part = None if real is None else real[:, first:last]
            parts.append(linear_attention_reference(*(x[:, :, first:last] for x in leaves), double, part))
        return torch.cat(parts, dim=2)

    def packed(*leaves):
        return linear_attention(*leaves, feature_map, real, cu_seqlens=bounds, backend=backend)

    actual = values_and_gradients(packed, *tensors)
    double = feature_map.double()
    expected = values_and_gradients(one_by_one, *(x.double() for x in tensors))
    assert_close(actual, expected, 1e-10 if options["dtype"] == torch.float64 else 2e-5)
    together = linear_attention_reference(*(x.double() for x in tensors), double, real)
    assert (together - expected[0]).norm() > 1e-2 * expected[0].norm()  # the bounds do something


@every_backend
def test_nothing_packed_and_no_tokens(backend):
    empty = inputs(1, tokens=0)
    for bounds in ([0], [0, 0, 0]):
        output = linear_attention(*empty, "elu", cu_seqlens=torch.tensor(bounds), backend=backend)
        assert output.shape == (1, 3, 0, 24)
    output = linear_attention(inputs(1)[0], *empty[1:], "elu", backend=backend)
    assert torch.equal(output, torch.zeros(1, 3, 40, 24))


@pytest.mark.parametrize("name", [name for name, cls in FEATURE_MAPS.items() if not cls.learned])
@every_backend
def test_a_map_without_weights_may_come_by_name(backend, name):
    built = build_feature_map(name, 3, 16)
    expected = linear_attention(query, key, value, built, backend=backend)
    assert torch.equal(linear_attention(query, key, value, name, backend=backend), expected)
    assert torch.equal(attention_weights(query, key, name), attention_weights(query, key, built))


def test_learned_weights_are_scaled_in_the_precision_of_the_input():
    feature_map = build_feature_map("t2r", 3, 16, scale=0.7)  # its weights in float32
    tensors = [x.double() for x in (query, key, value)]
    by_hand = linear_attention(tensors[0] * 0.7, tensors[1] * 0.7, tensors[2], "relu")
    assert_close([linear_attention(*tensors, feature_map)], [by_hand], 1e-13)


@every_backend
def test_the_reference_is_a_backend(backend):
    """It forms the weights, which no other does."""
    shapes = []

    class Shapes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            output = func(*args, **(kwargs or {}))
            shapes.append(tuple(output.shape) if isinstance(output, torch.Tensor) else ())
            return output

    with Shapes():
        linear_attention(query, key, value, "elu", backend=backend)
    assert ((2, 3, 40, 40) in shapes) == (backend == "reference")


# --- numbers that are not what lies in memory ------------------------------------------------------------------------


@every_backend
def test_a_sign_that_pytorch_has_not_applied_yet_counts(backend):
    """As in the imaginary part of a conjugate."""
    lazy = [torch._neg_view(x) for x in (query, key, value)]
    expected = linear_attention(-query, -key, -value, "elu", backend=backend)
    torch.testing.assert_close(linear_attention(*lazy, "elu", backend=backend), expected)


@every_backend
def test_forward_mode_derivatives_are_not_lost(backend):
    tangents = [torch.randn_like(x) for x in (query, key, value)]

    def operator(*leaves):
        return linear_attention(*leaves, "elu", backend=backend)

    _, expected = torch.func.jvp(
        lambda *x: linear_attention_reference(*x, "elu"), (query, key, value), tuple(tangents)
    )
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip((query, key, value), tangents)]
        tangent = forward_ad.unpack_dual(operator(*duals)).tangent
    torch.testing.assert_close(tangent, expected, rtol=1e-4, atol=1e-4)


# --- feature maps whose forward has to run ---------------------------------------------------------------------------


def watch(feature_map: FeatureMap, how: str) -> list:
    """Makes something count how often a feature map ran."""
    seen: list = []
    if how == "forward replaced":  # as accelerate does
        forward = feature_map.forward
        feature_map.forward = lambda *args, **kwargs: seen.append(1) or forward(*args, **kwargs)
    else:
        getattr(feature_map, f"register_{how}")(lambda *args: seen.append(1))
    return seen


@pytest.mark.parametrize(
    "how", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook", "forward replaced"]
)
@every_backend
def test_what_waits_for_a_feature_map_sees_it_run(backend, how):
    feature_map = build_feature_map("t2r", 3, 16)
    plain = values_and_gradients(lambda *x: linear_attention(*x, feature_map, backend=backend), query, key, value)
    seen = watch(feature_map, how)
    watched = values_and_gradients(lambda *x: linear_attention(*x, feature_map, backend=backend), query, key, value)
    assert len(seen) == 1
    assert_close(watched, [x.double() for x in plain])


class Shifted(FeatureMap):
    """Says what it does in `forward` alone."""

    nonlinearity = "relu"

    def forward(self, query, key, key_mask=None):
        return 2 + query.relu(), 2 + key.relu()


@every_backend
def test_a_forward_of_its_own_is_what_runs(backend):
    feature_map = Shifted(3, 16)
    expected = linear_attention_reference(query, key, value, feature_map)
    assert (expected - linear_attention_reference(query, key, value, "relu")).abs().max() > 1e-2
    torch.testing.assert_close(linear_attention(query, key, value, feature_map, backend=backend), expected)


@every_backend
def test_feature_maps_that_peft_trains_run_as_peft_says(backend):
    module = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(16, 16), "feature_map": build_feature_map("t2r", 3, 16)})
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["feature_map"])
    model = peft.PeftModel(module, config)
    wrapper = model.base_model.model["feature_map"]
    before = linear_attention(query, key, value, wrapper, backend=backend)
    with torch.no_grad():
        trained = wrapper.modules_to_save["default"]
        trained.weight_q.mul_(torch.linspace(0, 2, 16))
    expected = linear_attention_reference(query, key, value, trained)
    assert (expected - before).abs().max() > 1e-2
    torch.testing.assert_close(linear_attention(query, key, value, wrapper, backend=backend), expected)
    with model.disable_adapter():
        torch.testing.assert_close(linear_attention(query, key, value, wrapper, backend=backend), before)


class FirstImage(FeatureMap):
    nonlinearity = "relu"

    def affine(self, query, key, key_mask):
        return query[:1], key, 1.0


def test_an_affine_part_that_changes_the_batch_does_not_reach_a_kernel():
    with pytest.raises(UsageError, match=r"FirstImage turns query and key .* the last size alone"):
        linear_attention(query, key, value, FirstImage(3, 16))
