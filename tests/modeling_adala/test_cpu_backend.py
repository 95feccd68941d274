"""The CPU backend, with compiled passes and with those in PyTorch: values, gradients, memory, and its choice."""

import importlib
import logging
import shutil
import subprocess
import sys

import pytest
import torch
from family_helpers import tiny_config
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_adala import (
    AdaLAViTConfig,
    AdaLAViTModel,
    UsageError,
    backends,
    build_feature_map,
    cpu_backend,
    cpu_passes,
    linear_attention,
)
from modeling_adala.backends import choose_backend
from modeling_adala.cpu_backend import linear_attention_cpu
from modeling_adala.feature_maps import apply_nonlinearity
from vit_adala.benchmark.operators import operator_error, operator_inputs

operator_module = importlib.import_module("modeling_adala.linear_attention")  # the package has a function of that name

NONLINEARITIES = ["elu", "relu", "exp", "softmax_pair", "identity"]
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}
COMPILED = [(passes, dtype) for passes in ("compiled", "fused") for dtype in (torch.float32, torch.bfloat16)]
PASSES = [*(("torch", dtype) for dtype in BOUNDS), *COMPILED]
needs_library = pytest.mark.skipif(cpu_passes.load_library() is None, reason="no compiler built the passes")


def fused_heads(batch: int, heads: int, tokens: int, dim: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Query, key and value as views of one projection, `(batch, tokens, 3 * heads * dim)`."""
    fused = torch.randn(batch, tokens, 3 * heads * dim, dtype=dtype)
    return [x.unflatten(-1, (heads, dim)).transpose(1, 2) for x in fused.chunk(3, dim=-1)]


def reference(query, key, value, nonlinearity, scale, key_mask, eps):
    """The formula in float64."""
    phi_q, phi_k = apply_nonlinearity(nonlinearity, query * scale, key * scale, key_mask)
    count = key.new_full((len(key),), key.shape[2])
    if key_mask is not None:
        phi_k, count = phi_k * key_mask[:, None, :, None], key_mask.sum(dim=1).clamp(min=1)
    scores = phi_q @ phi_k.mT / count[:, None, None, None]
    return scores @ value / (scores.sum(dim=-1, keepdim=True) + eps)


def relative_error(actual: torch.Tensor, expected: torch.Tensor, least: float = 1e-30) -> float:
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=least)).item()


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Whatever is not written is NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[cpu_backend.BLOCK_NUMEL, 64 * 3 * 40, 1], ids=["one block", "some blocks", "smallest blocks"])
def block_numel(request, monkeypatch):
    monkeypatch.setattr(cpu_backend, "BLOCK_NUMEL", request.param)


# --- values and gradients --------------------------------------------------------------------------------------------

# batch, heads, query tokens, tokens, dim, mask
SHAPES = [
    (1, 12, 197, 197, 64, False),
    (3, 2, 150, 150, 64, True),
    (2, 3, 7, 130, 72, True),
    (2, 1, 90, 17, 80, False),
    (1, 2, 1, 3, 16, False),
    (5, 2, 20, 20, 17, True),
]


@pytest.mark.usefixtures("block_numel")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
@pytest.mark.parametrize(("passes", "dtype"), PASSES)
def test_values_and_gradients_are_those_of_float64(passes, dtype, nonlinearity, shape, monkeypatch):
    batch, heads, query_tokens, tokens, dim, masked = shape
    compiled = passes != "torch"
    if passes == "compiled":
        monkeypatch.setattr(cpu_passes.CompiledPasses, "fuses", cpu_passes.TorchPasses.fuses)
    torch.manual_seed(0)
    query = fused_heads(batch, heads, query_tokens, dim, dtype)[0]
    _, key, value = fused_heads(batch, heads, tokens, dim, dtype)
    value = value + 1  # values have a mean in most models
    if nonlinearity == "identity":
        query, key = query.abs(), key.abs()
    mask = torch.rand(batch, tokens) < 0.7 if masked else None
    if masked:
        mask[0] = False  # an image without any token
    eps = 1e-12 if nonlinearity == "exp" else 1e-6
    weight = torch.randn(batch, heads, query_tokens, dim)

    def results(function, leaves):
        output = function(*leaves, nonlinearity, 0.8, mask, eps)
        return [output, *torch.autograd.grad((output * weight).sum(), leaves)]

    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    actual = results(lambda *arguments: linear_attention_cpu(*arguments, compiled), leaves)
    expected = results(reference, [x.detach().double().requires_grad_() for x in leaves])
    with torch.no_grad():  # another order of multiplication where tokens are few
        actual.append(linear_attention_cpu(*leaves, nonlinearity, 0.8, mask, eps, compiled))
    for name, ours, truth in zip(["output", "query", "key", "value", "no_grad"], actual, [*expected, expected[0]]):
        assert ours.dtype == dtype
        assert ours.isfinite().all()
        bound = BOUNDS[dtype] * (2 if name == "query" else 1)  # a difference of rounded numbers
        assert relative_error(ours, truth) < bound, name


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("batch", "heads", "query_tokens", "tokens"), [(0, 2, 3, 3), (2, 0, 3, 3), (2, 2, 0, 3), (2, 2, 3, 0)]
)
def test_of_nothing_comes_nothing(batch, heads, query_tokens, tokens, compiled):
    query = torch.randn(batch, heads, query_tokens, 64, requires_grad=True)
    key, value = (torch.randn(batch, heads, tokens, 64, requires_grad=True) for _ in range(2))
    output = linear_attention_cpu(query, key, value, "elu", 1.0, None, 1e-6, compiled)
    gradients = torch.autograd.grad(output.sum(), (query, key, value))
    assert output.shape == query.shape
    assert all(x.count_nonzero() == 0 for x in (output, *gradients))


@pytest.mark.parametrize("compiled", [False, True])
def test_the_gradient_of_float16_and_of_mixed_types_comes_in_the_type_of_each(compiled):
    """float16 is computed in float32; DINOv3's rotary positions leave query and key in float32 under autocast."""
    query, key, value = fused_heads(2, 2, 50, 64, torch.float32)
    for dtypes in ([torch.float16] * 3, [torch.float32, torch.float32, torch.bfloat16]):
        leaves = [x.to(dtype).requires_grad_() for x, dtype in zip((query, key, value), dtypes)]
        output = linear_attention_cpu(*leaves, "elu", 1.0, None, 1e-6, compiled)
        assert output.dtype == dtypes[2]
        for leaf, gradient in zip(leaves, torch.autograd.grad(output.float().square().sum(), leaves)):
            assert gradient.dtype == leaf.dtype
            assert gradient.abs().max() > 0


def test_the_backward_pass_ignores_autocast():
    leaves, feature_map = fused_heads(1, 2, 90, 64, torch.float32), build_feature_map("elu", 2, 64)
    leaves = [x.detach().requires_grad_() for x in leaves]
    expected = torch.autograd.grad(linear_attention(*leaves, feature_map).sum(), leaves)
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(linear_attention(*leaves, feature_map).sum(), leaves)
    assert all(map(torch.equal, inside, expected))


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # the fused passes round differently
@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_what_is_not_a_number_does_not_become_one(nonlinearity, dtype):
    query, key, value = fused_heads(1, 2, 100, 64, dtype)
    for tensor in (query, key, value):
        broken = [x.clone() for x in (query, key, value)]
        index = next(i for i, x in enumerate((query, key, value)) if x is tensor)
        broken[index][0, 1, 30, 5] = torch.nan
        output = linear_attention_cpu(*broken, nonlinearity, 1.0, None, 1e-6)
        assert output[0, 1, 30].isnan().any()
        assert output[0, 0].isfinite().all()  # the other head


@needs_library
def test_the_exponential_is_exact_to_rounding_over_its_range():
    """Through keys of one feature: the normalizer's features are exp(x)."""
    x = torch.cat((torch.linspace(-87, 0, 5000), torch.linspace(0, 30, 1000), torch.tensor([-1e4, -3e38])))
    passes = cpu_passes.CompiledPasses("elu", 1.0, 1e-6)
    features = passes.key_features(x.view(1, 1, -1, 1), None, None)
    expected = torch.where(x > 0, x.double() + 1, x.double().exp())
    normal = expected > 1e-37
    assert ((features.flatten()[normal] - expected[normal]) / expected[normal]).abs().max() < 1e-5
    assert features.flatten()[~normal].abs().max() < 1e-37


def test_the_number_of_threads_changes_the_order_of_sums_and_nothing_else():
    query, key, value = fused_heads(2, 3, 300, 64, torch.float32)
    before = torch.get_num_threads()
    outputs = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outputs.append(linear_attention_cpu(query, key, value, "elu", 1.0, None, 1e-6))
    finally:
        torch.set_num_threads(before)
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=1e-5, atol=1e-6)


needs_bfloat16 = pytest.mark.skipif(
    not (cpu_passes.load_library() and cpu_passes.load_library().adala_has_fused(64, 64)),
    reason="no processor, or no compiler, for the fused passes",
)


@needs_bfloat16
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 5e-3), (torch.float32, 1e-5)])
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
@pytest.mark.parametrize(
    ("batch", "heads", "query_tokens", "tokens", "dim", "value_dim"),
    [
        (1, 12, 197, 197, 64, 64),
        (1, 40, 66, 131, 64, 64),  # more heads than go together
        (7, 3, 64, 64, 64, 64),  # an image per thread
        (2, 2, 3, 257, 80, 80),
        (2, 3, 130, 99, 72, 72),  # rows that end within a vector
        (1, 2, 40, 33, 17, 5),
        (1, 2, 130, 5, 16, 24),  # a part of a vector
        (1, 1, 9, 1, 128, 100),
        (2, 1, 70, 70, 256, 16),
    ],
)
def test_the_fused_passes_are_those_of_float64(
    batch, heads, query_tokens, tokens, dim, value_dim, nonlinearity, threads, dtype, bound
):
    torch.manual_seed(0)
    query = fused_heads(batch, heads, query_tokens, dim, dtype)[0]
    key = fused_heads(batch, heads, tokens, dim, dtype)[1]
    value = fused_heads(batch, heads, tokens, value_dim, dtype)[2] + 3
    incoming = fused_heads(batch, heads, query_tokens, value_dim, dtype)[2]
    if nonlinearity == "identity":
        query, key = query.abs(), key.abs()
    mask = torch.rand(batch, tokens) < 0.7
    mask[0, 0] = True
    if batch > 1:
        mask[-1] = False
    before = torch.get_num_threads()
    passes = cpu_passes.CompiledPasses(nonlinearity, 0.8, 1e-6)
    results = [torch.full_like(x, torch.nan) for x in (incoming, query, key, value)]
    output, *gradients = results
    eps = cpu_backend._sum_of_eps(key, mask, passes)
    largest = cpu_backend._largest_key(key, mask, passes)
    inputs = query, key, value, mask, eps, largest
    try:
        torch.set_num_threads(threads)
        assert passes.fuses(key, value)
        kept = passes.attention(*inputs, output, keep_state=True)
        passes.attention_gradient(*inputs, *kept, incoming, gradients)
        alone = torch.full_like(output, torch.nan)
        assert passes.attention(*inputs, alone) is None
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone, output)
    leaves = [x.double().requires_grad_() for x in (query, key, value)]
    expected = reference(*leaves, nonlinearity, 0.8, mask, 1e-6)
    expected = [expected.detach(), *torch.autograd.grad(expected, leaves, incoming.double())]
    for name, actual, truth, factor in zip(["output", "query", "key", "value"], results, expected, [1, 3, 2, 1]):
        assert actual.isfinite().all()
        # the weight of a single key is 1 whatever it is, so that gradients are all but zero
        least = incoming.norm().item() if tokens == 1 and name in ("query", "key") else 1e-30
        assert relative_error(actual, truth, least) < factor * bound, name


@needs_library
def test_sums_over_many_tokens_stay_exact():
    """Rounded once at every token, they would be off by 1e-5."""
    feature_map = build_feature_map("elu", 1, 16)
    inputs = operator_inputs(1, 1, 2**18, 16, requires_grad=True)
    error = operator_error(lambda *args: linear_attention(*args, feature_map), inputs, feature_map, backward=True)
    assert error < 4e-6


@needs_bfloat16
def test_wide_heads_are_left_to_the_passes():
    library = cpu_passes.load_library()
    shapes = [(dim, width) for dim in (64, 72, 272) for width in (64, 2000)]
    assert [shape for shape in shapes if library.adala_has_fused(*shape)] == [(64, 64), (72, 64)]


# --- memory and cost -------------------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """The most numbers that an operation wrote to new memory."""

    def __init__(self):
        super().__init__()
        self.numel, self.name = 0, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        for x in output if isinstance(output, tuple | list) else [output]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in known and x.numel() > self.numel:
                self.numel, self.name = x.numel(), str(func)
        return output


@pytest.mark.parametrize("compiled", [False, True])
def test_scratch_does_not_grow_with_tokens_or_images(compiled, monkeypatch):
    monkeypatch.setattr(cpu_backend, "BLOCK_NUMEL", 2 * 64 * 100)

    def largest(batch: int, tokens: int) -> int:
        query, key, value = fused_heads(batch, 2, tokens, 64, torch.float32)
        output = torch.empty_like(query)
        monkeypatch.setattr(cpu_backend, "_empty", lambda x, dim: output)
        with torch.no_grad(), LargestTensor() as recorder:
            linear_attention_cpu(query, key, value, "softmax_pair", 1.0, None, 1e-6, compiled)
        return recorder.numel

    size = largest(1, 1000)
    assert size <= 2**18  # a few blocks, or bytes of the fused pass
    assert largest(1, 8000) <= size
    assert largest(8, 1000) <= size


@pytest.mark.parametrize(("tokens", "quadratic"), [(17, True), (60, True), (70, False), (1000, False)])
def test_few_tokens_are_multiplied_in_the_quadratic_order(tokens, quadratic, monkeypatch):
    """The cheaper order in multiplications: below head_dim tokens."""
    called = []
    original = cpu_backend._quadratic
    monkeypatch.setattr(cpu_backend, "_quadratic", lambda *args: called.append(1) or original(*args))
    query, key, value = fused_heads(2, 2, tokens, 64, torch.float32)
    linear_attention_cpu(query, key, value, "elu", 1.0, None, 1e-6, compiled=False)
    assert bool(called) == quadratic


# --- the choice of a backend -----------------------------------------------------------------------------------------


@pytest.fixture
def fresh_choice(monkeypatch):
    monkeypatch.delenv("ADALA_BACKEND", raising=False)
    backends._choose.cache_clear()
    yield
    backends._choose.cache_clear()


def test_where_there_is_a_compiler_the_passes_were_built():
    """The install must not fail without one, and so would not tell that something is wrong with the build."""
    if sys.platform != "linux" or shutil.which("cc") is None:
        pytest.skip("no C compiler here")
    assert cpu_passes.load_library() is not None


@pytest.mark.usefixtures("fresh_choice")
def test_what_is_asked_for_wins_over_the_environment_and_that_over_the_fastest(monkeypatch, caplog):
    fastest = "torch" if cpu_passes.load_library() is None else "cpu"
    assert choose_backend("cpu").name == fastest
    monkeypatch.setenv("ADALA_BACKEND", "torch")
    assert choose_backend("cpu").name == fastest  # the variable is read once
    backends._choose.cache_clear()
    assert choose_backend("cpu") == backends.Backend("torch", "asked for by ADALA_BACKEND")
    reason = "asked for by the argument or the configuration"
    assert choose_backend("cpu", "reference") == backends.Backend("reference", reason)
    assert choose_backend("cpu", fastest) == backends.Backend(fastest, reason)
    assert caplog.messages == []


@pytest.mark.usefixtures("fresh_choice")
def test_argument_configuration_and_environment_reach_the_operator_in_this_order(monkeypatch):
    ran, attend = [], operator_module._attend
    monkeypatch.setattr(operator_module, "_attend", lambda *args: ran.append(args[-1]) or attend(*args))
    monkeypatch.setenv("ADALA_BACKEND", "reference")
    query, key, value = fused_heads(1, 2, 9, 16, torch.float32)
    linear_attention(query, key, value, "elu")
    linear_attention(query, key, value, "elu", backend="torch")
    for backend in (None, "torch"):
        config = tiny_config(AdaLAViTConfig, backend=backend, num_hidden_layers=1)
        AdaLAViTModel(config)(torch.randn(1, 3, 32, 32))
    assert ran == ["reference", "torch", "reference", "torch"]


@pytest.mark.usefixtures("fresh_choice")
def test_a_backend_that_cannot_run_here_gives_way_and_says_so_once(caplog):
    with caplog.at_level(logging.WARNING):
        choices = {choose_backend("meta", "cpu") for _ in range(3)}
    assert [choice.name for choice in choices] == ["torch"]
    assert len(caplog.messages) == 1
    assert "'cpu', asked for by the argument or the configuration, cannot run" in caplog.messages[0]


@pytest.mark.usefixtures("fresh_choice")
def test_unknown_backends_are_refused_by_name(monkeypatch):
    with pytest.raises(
        UsageError, match=r"backend='cuda' \(from the configuration\) is unknown.*torch, cpu, triton, reference"
    ):
        AdaLAViTConfig(backend="cuda")
    monkeypatch.setenv("ADALA_BACKEND", "fast")
    with pytest.raises(UsageError, match=r"backend='fast' \(from ADALA_BACKEND\)"):
        choose_backend("cpu")
    with pytest.raises(UsageError, match=r"backend='fastest' \(from the argument or the configuration\)"):
        choose_backend("cpu", "fastest")


def test_the_variable_reaches_the_operator_of_a_fresh_process():
    program = (
        "import torch\n"
        "from modeling_adala import build_feature_map, cpu_passes, linear_attention\n"
        "cpu_passes.CompiledPasses.key_features = None\n"  # would fail if it ran
        "x = torch.randn(1, 2, 90, 16)\n"
        "print(linear_attention(x, x, x, build_feature_map('elu', 2, 16)).isfinite().all().item())\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env={"ADALA_BACKEND": "torch"}, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "True", done.stderr


@needs_library
def test_more_features_than_the_compiled_passes_take_are_left_to_pytorch(caplog):
    cpu_passes._warn_unsupported.cache_clear()
    query, key, value = fused_heads(1, 1, 40, 1040, torch.float32)
    with caplog.at_level(logging.WARNING):
        outputs = [linear_attention_cpu(query, key, value, "elu", 1.0, None, 1e-6) for _ in range(2)]
    assert ["1040 features" in message for message in caplog.messages] == [True]
    expected = reference(query.double(), key.double(), value.double(), "elu", 1.0, None, 1e-6)
    assert relative_error(outputs[0], expected) < 1e-5
