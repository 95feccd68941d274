"""The Triton kernels against the quadratic reference: on a GPU, or in Triton's interpreter, which needs none.

    TRITON_INTERPRET=1 .venv/bin/python -m pytest -n 0 tests/modeling_adala/kernels/triton_suite.py

The interpreter is chosen when triton is imported, for the whole process, hence no `test_` in the name of this file:
`test_triton_backend.py` runs it in a process of its own. The interpreter truncates where a GPU rounds to bfloat16, so
that errors in 16 bits are about twice as large in it. Each program (images x heads x parts) takes it
about 30 ms, however little it does: hence one image and one head where more of them would show nothing new.
"""

import warnings
from collections import Counter
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_adala import build_feature_map, linear_attention, linear_attention_reference
from modeling_adala.feature_maps import FeatureMap
from modeling_adala.kernels import triton_backend as backend
from modeling_adala.kernels.triton_backend import PHI, linear_attention_triton

DEVICE = "cpu" if backend.interpreted() else "cuda"
BOUNDS = {torch.float16: 2e-2, torch.bfloat16: 2e-2, torch.float32: 1e-5}

pytestmark = [
    pytest.mark.skipif(backend.unavailable(DEVICE) is not None, reason=str(backend.unavailable(DEVICE))),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),  # numpy's, about padding
]


class IdentityFeatureMap(FeatureMap):
    nonlinearity = "identity"


def feature_map_of(phi: str, heads: int, dim: int, scale: float = 1.0) -> FeatureMap:
    if phi == "identity":
        return IdentityFeatureMap(heads, dim, scale=scale)
    if phi.startswith("relu"):
        return build_feature_map("relu", heads, dim, scale=scale, power=int(phi[4:] or 1))
    return build_feature_map(phi, heads, dim, scale=scale)


def heads_view(batch, heads, tokens, dim, dtype=torch.float32, shift=0.0) -> torch.Tensor:
    """`(batch, heads, tokens, dim)` as attention modules hand it over: a view of `(batch, tokens, heads, dim)`."""
    return (torch.randn(batch, tokens, heads, dim, device=DEVICE) + shift).to(dtype).transpose(1, 2)


def inputs_of(phi, batch, heads, query_tokens, tokens, dim, value_dim, dtype=torch.float32) -> list[torch.Tensor]:
    query, key = heads_view(batch, heads, query_tokens, dim), heads_view(batch, heads, tokens, dim, shift=0.5)
    if phi == "identity":  # features are not negative
        query, key = query.abs(), key.abs()
    return [x.to(dtype) for x in (query, key, heads_view(batch, heads, tokens, value_dim))]


def values_and_gradients(operator, *inputs) -> list[torch.Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    output = operator(*leaves)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(output.shape, generator=generator).to(output.device, output.dtype)
    return [output.detach(), *torch.autograd.grad((output * weight).sum(), leaves)]


def reference(feature_map, mask=None, eps=None):
    return lambda q, k, v: linear_attention_reference(q, k, v, feature_map, mask, eps)


def triton(feature_map, mask=None, eps=None, cu_seqlens=None):
    phi, scale = feature_map.nonlinearity, feature_map.scale
    eps = feature_map.eps if eps is None else eps
    return lambda q, k, v: linear_attention_triton(q, k, v, phi, scale, mask, eps, cu_seqlens)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Gradients that only eps keeps from vanishing, as with a single token, count as zero."""
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-6)).item()


def assert_close(actual: list, expected: list, tolerance: float, gradient_tolerance: float) -> None:
    errors = [relative_error(a, e) for a, e in zip(actual, expected, strict=True)]
    assert errors[0] < tolerance, errors
    assert all(error < gradient_tolerance for error in errors[1:]), errors


def random_mask(batch: int, tokens: int) -> torch.Tensor:
    mask = torch.rand(batch, tokens, device=DEVICE) < 0.6
    mask[:, 0] = True
    return mask


# --- against the oracle ----------------------------------------------------------------------------------------------

# batch, heads, query tokens, tokens, head dim, value dim, masked. 72 and up in several chunks, 140 tokens in parts.
SHAPES = [
    ("elu", (1, 1, 1, 1, 64, 64, False)),
    ("relu", (2, 2, 17, 140, 16, 24, True)),
    ("elu", (1, 1, 33, 17, 64, 64, False)),
    ("relu", (1, 1, 17, 33, 72, 80, False)),
    ("identity", (1, 1, 17, 17, 128, 128, True)),
    ("elu", (1, 1, 17, 33, 80, 80, False)),
    ("identity", (1, 1, 9, 20, 256, 80, False)),
    ("elu", (1, 1, 17, 33, 17, 30, True)),
]
CASES = [*((phi, (1, 1, 40, 70, 16, 16, True)) for phi in PHI), *SHAPES]


@pytest.mark.parametrize(("phi", "shape"), CASES, ids=str)
def test_values_and_gradients_equal_the_reference(phi, shape):
    *sizes, masked = shape
    inputs = inputs_of(phi, *sizes)
    mask = random_mask(shape[0], shape[3]) if masked else None
    feature_map = feature_map_of(phi, shape[1], shape[4], scale=0.7)
    expected = values_and_gradients(reference(feature_map, mask), *(x.double() for x in inputs))
    actual = values_and_gradients(triton(feature_map, mask), *inputs)
    assert [x.shape for x in actual] == [x.shape for x in expected]
    assert all(x.transpose(1, 2).is_contiguous() for x in actual)  # as projections read them
    assert_close(actual, expected, 1e-6, 2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("phi", "dim"), [*((phi, 80) for phi in PHI), ("elu", 64), ("relu", 256)])
def test_gradients_in_sixteen_bits(phi, dtype, dim):
    inputs = inputs_of(phi, 1, 1, 20, 70, dim, min(dim, 80), dtype)
    feature_map = feature_map_of(phi, 1, dim)
    expected = values_and_gradients(reference(feature_map), *(x.double() for x in inputs))
    actual = values_and_gradients(triton(feature_map), *inputs)
    assert [x.dtype for x in actual] == [dtype] * 4
    assert_close(actual, expected, 1e-2, 3e-2)


@pytest.mark.parametrize(("phi", "factor"), [("elu", 1), *((phi, 100) for phi in PHI)])
def test_errors_stay_in_bounds_with_an_offset_of_the_keys_and_large_inputs(phi, factor):
    exact = [heads_view(1, 1, tokens, 64) * factor for tokens in (16, 128, 128)]
    exact[1] += 5 * factor
    if phi == "identity":
        exact = [x.abs() for x in exact]
    feature_map, errors = feature_map_of(phi, 1, 64), {}
    for dtype in BOUNDS:
        leaves = [x.to(dtype).requires_grad_() for x in exact]
        truth = reference(feature_map)(*(x.detach().double() for x in leaves))
        output = triton(feature_map)(*leaves)
        errors[dtype] = relative_error(output, truth)
        gradients = torch.autograd.grad(output.float().sum(), leaves)
        assert all(gradient.isfinite().all() for gradient in gradients)
    assert all(errors[dtype] < bound for dtype, bound in BOUNDS.items()), errors


def test_values_with_a_large_mean_lose_no_precision():
    """In 16 bits, for only what deviates from the mean value is rounded."""
    query, key, value = inputs_of("elu", 1, 1, 40, 100, 64, 64, torch.bfloat16)
    feature_map = feature_map_of("elu", 1, 64)
    shifted = (value + 8).to(torch.bfloat16)
    value = shifted - 8  # exact: neighbors of 8 are further apart than those of 0
    plain, moved = (values_and_gradients(triton(feature_map), query, key, v) for v in (value, shifted))
    torch.testing.assert_close(moved[0] - 8, plain[0], rtol=0, atol=2**-4)  # the distance of neighbors at 8
    for a, b in zip(plain[1:], moved[1:]):
        assert relative_error(a, b.double()) < 2e-2


@pytest.mark.parametrize("phi", PHI)
def test_a_large_eps_enters_values_and_gradients_as_it_should(phi):
    inputs = inputs_of(phi, 1, 1, 20, 30, 16, 16)
    inputs[2] += 1
    feature_map = feature_map_of(phi, 1, 16)
    expected = values_and_gradients(reference(feature_map, eps=0.5), *(x.double() for x in inputs))
    assert_close(values_and_gradients(triton(feature_map, eps=0.5), *inputs), expected, 1e-6, 1e-5)


@pytest.mark.parametrize("dtype", BOUNDS)
def test_relu_gives_zeros_to_queries_without_a_positive_coordinate(dtype):
    query, key, value = inputs_of("relu", 1, 1, 5, 20, 64, 64, dtype)
    query = -query.abs()
    feature_map = feature_map_of("relu", 1, 64)
    output, *gradients = values_and_gradients(triton(feature_map), query, key, value)
    assert torch.equal(output, torch.zeros_like(output))
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("phi", PHI)
def test_a_nan_is_not_hidden(phi):
    query, key, value = inputs_of(phi, 1, 1, 20, 30, 16, 16)
    query[0, 0, 3, 5] = float("nan")
    output = triton(feature_map_of(phi, 1, 16))(query, key, value)
    assert output[0, 0, 3].isnan().all()
    assert output[0, 0, :3].isfinite().all()


@pytest.mark.parametrize("value_dtype", [torch.bfloat16, torch.float16])
def test_value_of_another_dtype(value_dtype):
    """As DINOv3 hands it over under autocast: its rotary positions turn query and key into float32."""
    query, key, value = inputs_of("elu", 1, 1, 17, 17, 16, 16)
    value = value.to(value_dtype)
    feature_map = feature_map_of("elu", 1, 16)
    expected = values_and_gradients(reference(feature_map), query.double(), key.double(), value.double())
    actual = values_and_gradients(triton(feature_map), query, key, value)
    assert [x.dtype for x in actual] == [value_dtype, torch.float32, torch.float32, value_dtype]
    assert_close(actual, expected, 1e-2, 3e-2)


# --- masks and packed sequences --------------------------------------------------------------------------------------


@pytest.mark.parametrize("phi", PHI)
def test_padding_has_no_influence_even_if_not_finite(phi):
    query, key, value = inputs_of(phi, 2, 1, 12, 12, 16, 16)
    mask = torch.arange(12, device=DEVICE) < torch.tensor([[5], [0]], device=DEVICE)
    feature_map = feature_map_of(phi, 1, 16)
    clean = values_and_gradients(triton(feature_map, mask), query, key, value)
    padding = ~mask[:, None, :, None]
    dirty = [key.masked_fill(padding, float("inf")), value.masked_fill(padding, float("nan"))]
    for a, b in zip(values_and_gradients(triton(feature_map, mask), query, *dirty), clean, strict=True):
        assert torch.equal(a, b)
    alone = triton(feature_map)(query[:1], key[:1, :, :5], value[:1, :, :5])
    torch.testing.assert_close(clean[0][:1], alone, rtol=1e-5, atol=1e-6)
    for result in clean:  # of the image without a token
        assert torch.equal(result[1], torch.zeros_like(result[1]))


# with 250 tokens in two parts, the second of them empty for 6 tokens; without a mask: PACKS below
@pytest.mark.parametrize(
    ("phi", "heads", "lengths"), [*((phi, 1, (5, 0, 40, 0)) for phi in PHI), ("elu", 1, (250, 6)), ("elu", 2, (3, 9))]
)
def test_packed_sequences_are_attended_to_one_by_one(phi, heads, lengths):
    bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    tokens, feature_map = bounds[-1], feature_map_of(phi, heads, 16)
    inputs = inputs_of(phi, 1, heads, tokens, tokens, 16, 24)
    mask = random_mask(1, tokens)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)

    def one_by_one(*leaves):
        parts = []
        for begin, end in pairwise(bounds):
            if end > begin:
                parts.append(reference(feature_map, mask[:, begin:end])(*(x[:, :, begin:end] for x in leaves)))
        return torch.cat(parts, dim=2)

    expected = values_and_gradients(one_by_one, *(x.double() for x in inputs))
    actual = values_and_gradients(triton(feature_map, mask, cu_seqlens=cu_seqlens), *inputs)
    assert_close(actual, expected, 1e-6, 2e-5)


# what the kernels leave to other code, and what they take through the operator: packed images must not notice
PACKS = {
    "kernels": {},
    "kernels, learned, int64 bounds with gaps": {"name": "hedgehog", "gaps": True},
    "float64": {"dtype": torch.float64},
    "wide heads": {"dim": 300, "masked": True},
    "hooks": {"hooks": True},
    "mean keys": {"center_keys": True, "masked": True},
    "two reasons": {"dtype": torch.float64, "center_keys": True, "name": "t2r"},
}


@pytest.mark.parametrize("case", PACKS)
def test_packed_images_are_attended_to_one_by_one_without_kernels_too(case):
    options = {"name": "elu", "dim": 16, "dtype": torch.float32, "center_keys": False} | PACKS[case]
    feature_map = build_feature_map(options["name"], 1, options["dim"], center_keys=options["center_keys"])
    feature_map = feature_map.to(DEVICE, options["dtype"])
    if "hooks" in options:
        feature_map.register_forward_hook(lambda *args: None)
    bounds = [0, 5, 5, 45, 46]
    inputs = [x.to(options["dtype"]) for x in inputs_of("elu", 1, 1, 46, 46, options["dim"], 24)]
    mask = random_mask(1, 46) if "masked" in options else None
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    if "gaps" in options:
        cu_seqlens = cu_seqlens.long().repeat_interleave(2)[::2]

    def one_by_one(*leaves):
        parts = []
        for begin, end in pairwise(bounds):
            if end > begin:
                part = None if mask is None else mask[:, begin:end]
                tensors = (x[:, :, begin:end] for x in leaves)
                parts.append(linear_attention_reference(*tensors, feature_map, part))
        return torch.cat(parts, dim=2)

    def packed(*leaves):
        numbers = None if mask is None else mask.long()
        return linear_attention(*leaves, feature_map, numbers, cu_seqlens=cu_seqlens, backend="triton")

    actual = values_and_gradients(packed, *inputs)
    feature_map.double()
    expected = values_and_gradients(one_by_one, *(x.double() for x in inputs))
    assert_close(actual, expected, 1e-5, 2e-5)


# --- memory, launches, order -----------------------------------------------------------------------------------------


def test_strides_are_taken_as_they_come():
    feature_map = feature_map_of("elu", 2, 16)
    inputs = inputs_of("elu", 2, 2, 10, 10, 16, 16)
    expected = values_and_gradients(triton(feature_map), *(x.contiguous() for x in inputs))
    fused = torch.stack(inputs, dim=2).transpose(2, 3).flatten(3).chunk(3, dim=-1)  # one projection for q, k and v
    sparse = [x.repeat_interleave(2, dim=-1)[..., ::2] for x in inputs]
    turned = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in inputs]
    for variant in (fused, (sparse[0], turned[1], sparse[2])):
        assert all(not x.is_contiguous() for x in variant)
        for a, b in zip(values_and_gradients(triton(feature_map), *variant), expected, strict=True):
            assert torch.equal(a, b)


def test_an_expanded_gradient_of_the_output():
    leaves = [x.requires_grad_() for x in inputs_of("elu", 1, 1, 20, 20, 16, 16)]
    output = triton(feature_map_of("elu", 1, 16))(*leaves)
    expanded = torch.autograd.grad(output.sum(), leaves, retain_graph=True)
    for a, b in zip(expanded, torch.autograd.grad(output, leaves, torch.ones_like(output)), strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def poisoned_memory():
    """New memory holds NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dim", [17, 256])
def test_all_memory_is_written_before_it_is_read(dim, packed):
    inputs = inputs_of("elu", 1, 1, 20, 20, dim, min(dim, 24))
    cu_seqlens = torch.tensor([0, 9, 9, 20], dtype=torch.int32, device=DEVICE) if packed else None
    operator = triton(feature_map_of("elu", 1, dim), random_mask(1, 20), cu_seqlens=cu_seqlens)
    assert all(x.isfinite().all() for x in values_and_gradients(operator, *inputs))


def test_no_tokens_and_no_images():
    feature_map = feature_map_of("elu", 2, 16)
    query, key, value = inputs_of("elu", 1, 2, 5, 5, 16, 16)
    assert torch.equal(triton(feature_map)(query, key[:, :, :0], value[:, :, :0]), torch.zeros_like(query))
    assert triton(feature_map)(query[:, :, :0], key, value).shape == (1, 2, 0, 16)
    assert triton(feature_map)(query[:0], key[:0], value[:0]).shape == (0, 2, 5, 16)


def test_the_number_of_parts_does_not_show_in_the_result(monkeypatch):
    inputs = inputs_of("elu", 1, 1, 130, 200, 16, 16)
    inputs[1][..., 150:, :] *= 4  # parts differ in the size of their keys
    feature_map = feature_map_of("elu", 1, 16)
    expected = values_and_gradients(reference(feature_map), *(x.double() for x in inputs))
    plan = backend._Plan(inputs[0], inputs[2], "elu", None, "forward")
    for multiprocessors, parts in ((1, 2), (1000, 3)):
        monkeypatch.setattr(backend, "_multiprocessors", lambda device: multiprocessors)  # noqa: B023
        assert plan.parts(200) == parts
    results = [values_and_gradients(triton(feature_map), *inputs) for _ in range(2)]
    assert_close(results[0], expected, 1e-6, 2e-5)
    for first, again in zip(*results, strict=True):
        assert torch.equal(first, again)


def test_two_launches_forward_and_two_backward(monkeypatch):
    launched: list[str] = []

    class Recorded:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            launched.append(self.name)
            return self.kernel[grid]

    kernels = backend._kernels()
    names = ("state", "output", "query_gradient", "key_gradient")
    recorded = {name: Recorded(name, getattr(kernels, name)) for name in names}
    monkeypatch.setattr(backend, "_kernels", lambda: SimpleNamespace(**vars(kernels) | recorded))
    leaves = [x.requires_grad_() for x in inputs_of("elu", 1, 1, 10, 200, 16, 16)]
    output = triton(feature_map_of("elu", 1, 16))(*leaves)
    assert launched == list(names[:2])
    output.sum().backward()
    assert launched == list(names)


class Operations(TorchDispatchMode):
    """Names of the operations that run."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.append(str(operation))
        return operation(*args, **kwargs or {})

    def __enter__(self):
        self.names: list[str] = []
        return super().__enter__()


def test_the_default_map_reads_queries_and_keys_no_more_than_it_must():
    """Each operation is a pass over them: a projection, its negative, both in one tensor, and their softmax."""
    inputs, feature_map = inputs_of("elu", 1, 1, 5, 5, 16, 16), build_feature_map("hedgehog", 1, 16).to(DEVICE)
    with Operations() as operations, torch.no_grad():
        linear_attention(*inputs, feature_map, backend="triton")
    views = ("view", "permute", "transpose", "unsqueeze", "expand", "detach", "squeeze", "slice")
    names = [name.split(".")[1] for name in operations.names]
    passes = Counter(name for name in names if not any(view in name for view in views))
    assert passes == {"bmm": 2, "neg": 2, "stack": 2, "_softmax": 2, "linear_attention": 1}


# --- one operator for autograd, autocast, compilers ------------------------------------------------------------------


def test_the_operators_keep_their_promises_to_pytorch():
    query, key, value = (x.requires_grad_() for x in inputs_of("elu", 1, 1, 5, 5, 16, 24))
    cu_seqlens = torch.tensor([0, 5], dtype=torch.int32, device=DEVICE)
    options = ("elu", 1.0, random_mask(1, 5), 1e-6, cu_seqlens)
    torch.library.opcheck(backend.linear_attention_op, (query, key, value, *options))
    inputs = [x.detach() for x in (query, key, value)]
    output, totals = backend.linear_attention_op(*inputs, *options)
    arguments = (output, *inputs, totals, *options)
    torch.library.opcheck(
        backend.linear_attention_backward_op, arguments, test_utils=("test_schema", "test_faketensor")
    )


def test_autocast_changes_nothing():
    inputs = inputs_of("elu", 1, 1, 20, 20, 16, 16)
    operator = triton(feature_map_of("elu", 1, 16))
    outside = values_and_gradients(operator, *inputs)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert (inputs[0] @ inputs[1].mT).dtype == torch.bfloat16  # autocast is on
        inside = values_and_gradients(operator, *inputs)
    for a, b in zip(inside, outside, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


def test_forward_mode_derivatives_are_left_to_pytorch():
    """The kernels have none, and would give zero without a word."""
    inputs = inputs_of("elu", 1, 1, 5, 5, 16, 16)
    tangents = tuple(torch.randn_like(x) for x in inputs)
    operator, oracle = (partial(linear_attention, feature_map="elu", backend=b) for b in ("triton", "reference"))
    _, expected = torch.func.jvp(oracle, tuple(inputs), tangents)
    torch.testing.assert_close(torch.func.jvp(operator, tuple(inputs), tangents)[1], expected, rtol=1e-4, atol=1e-5)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(operator(*map(forward_ad.make_dual, inputs, tangents))).tangent
    torch.testing.assert_close(tangent, expected, rtol=1e-4, atol=1e-5)


def test_a_second_derivative_is_refused():
    query, key, value = (x.requires_grad_() for x in inputs_of("elu", 1, 1, 5, 5, 16, 16))
    output = triton(feature_map_of("elu", 1, 16))(query, key, value)
    (gradient,) = torch.autograd.grad(output.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        gradient.sum().backward()


def test_compiles_whole_and_once_for_all_numbers_of_tokens():
    torch._dynamo.reset()
    operator = triton(feature_map_of("elu", 1, 16))
    counter = CompileCounter()
    compiled = torch.compile(operator, backend=counter, fullgraph=True)
    for tokens in (5, 7, 40):
        inputs = inputs_of("elu", 2, 1, tokens, tokens, 16, 16)
        for tensor in inputs:
            torch._dynamo.mark_dynamic(tensor, 2)
        assert torch.equal(compiled(*inputs), operator(*inputs))
    assert counter.frame_count == 1
    assert counter.op_count == 2  # the operator, and taking its first result


def test_compiles_with_gradients():
    torch._dynamo.reset()
    inputs = inputs_of("elu", 1, 1, 10, 12, 16, 16)
    operator = triton(feature_map_of("elu", 1, 16))
    compiled = torch.compile(operator, backend="aot_eager", fullgraph=True)
    for a, b in zip(values_and_gradients(compiled, *inputs), values_and_gradients(operator, *inputs), strict=True):
        assert torch.equal(a, b)


def test_exports_as_one_operator_with_dynamic_batch_and_tokens():
    class Operator(torch.nn.Module):
        def forward(self, query, key, value, mask):
            return linear_attention_triton(query, key, value, "elu", 1.0, mask, 1e-6)

    def inputs(batch, tokens):
        return (*inputs_of("elu", batch, 1, tokens, tokens, 16, 16), random_mask(batch, tokens))

    batch, tokens = torch.export.Dim("batch", min=1), torch.export.Dim("tokens", min=2)
    dynamic = ({0: batch, 2: tokens}, {0: batch, 2: tokens}, {0: batch, 2: tokens}, {0: batch, 1: tokens})
    exported = torch.export.export(Operator(), inputs(2, 9), dynamic_shapes=dynamic)
    called = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert called.count("adala.linear_attention.default") == 1
    assert all("getitem" in name or "linear_attention" in name or "sym" in name for name in called), called
    for shape in ((1, 7), (3, 20)):
        example_inputs = inputs(*shape)
        assert torch.equal(exported.module()(*example_inputs), Operator()(*example_inputs))


@pytest.mark.skipif(DEVICE == "cpu", reason="a CPU has no CUDA graphs")
def test_a_cuda_graph_captures_forward_and_backward():
    inputs = [x.requires_grad_() for x in inputs_of("elu", 1, 2, 300, 300, 64, 64, torch.bfloat16)]
    operator = triton(feature_map_of("elu", 2, 64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        captured = torch.cuda.make_graphed_callables(operator, tuple(inputs))
    fresh = inputs_of("elu", 1, 2, 300, 300, 64, 64, torch.bfloat16)
    for a, b in zip(values_and_gradients(captured, *fresh), values_and_gradients(operator, *fresh), strict=True):
        assert torch.equal(a, b)
