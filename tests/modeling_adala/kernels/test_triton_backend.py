"""The Triton backend: what it refuses, what it tells compilers, and its kernels in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from modeling_adala.kernels import triton_backend as backend

SUITE = "tests/modeling_adala/kernels/triton_suite.py"
ROOT = Path(__file__).parents[3]
KERNELS = ("state", "output", "query_gradient", "key_gradient")
MODES = ["interpreter", *(["gpu"] if torch.cuda.is_available() else [])]

triton = pytest.importorskip("triton")


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_kernels(mode):
    """`triton_suite.py`, in another process: triton is interpreted for a whole process or not at all."""
    command = [sys.executable, "-m", "pytest", "-n0", "-x", "-p", "no:cacheprovider", SUITE]
    environment = {**os.environ, "TRITON_INTERPRET": "1" if mode == "interpreter" else "0"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


def test_compiled_kernels_do_not_run_on_a_cpu():
    assert not backend.interpreted()
    assert backend.unavailable("cpu") == "Triton has no code for cpu"


def tensors(dtype=torch.float32, dim=64, value_dim=64, query_tokens=10) -> list[torch.Tensor]:
    return [
        torch.empty(2, 3, query_tokens, dim, dtype=dtype, device="meta"),
        torch.empty(2, 3, 10, dim, dtype=dtype, device="meta"),
        torch.empty(2, 3, 10, value_dim, dtype=dtype, device="meta"),
    ]


@pytest.mark.parametrize(
    ("inputs", "phi", "reason"),
    [
        (tensors(torch.float64), "elu", "query in torch.float64"),
        (tensors(dim=257), "identity", "query of width 257 (at most 256) with value in torch.float32"),
        (
            tensors(torch.bfloat16, value_dim=513),
            "elu",
            "value of width 513 (at most 512) with value in torch.bfloat16",
        ),
        (tensors(), "softmax_pair", "the feature map 'softmax_pair'"),
    ],
)
def test_what_is_not_supported_is_named(inputs, phi, reason):
    answer = backend.unsupported(*inputs, phi)
    assert answer is not None and answer.startswith(reason)


@pytest.mark.parametrize("dtype", backend.DTYPES)
@pytest.mark.parametrize("dim", [16, 64, 72, 80, 88, 96, 128, 256])
def test_every_head_dim_of_16_to_256_is_supported(dtype, dim):
    assert backend.unsupported(*tensors(dtype, dim, dim, query_tokens=3), "elu") is None


@pytest.mark.parametrize("packed", [False, True])
def test_fake_tensors_have_the_shapes_and_strides_of_real_ones(packed):
    with FakeTensorMode():
        batch = 1 if packed else 2
        query, key = (torch.empty(batch, 5, 3, 24, dtype=torch.bfloat16).transpose(1, 2) for _ in range(2))
        value = torch.empty(batch, 5, 3, 40, dtype=torch.float16).transpose(1, 2)
        cu_seqlens = torch.empty(5, dtype=torch.int32) if packed else None
        options = ("elu", 1.0, None, 1e-6, cu_seqlens)
        output, totals = backend.linear_attention_op(query, key, value, *options)
        gradients = backend.linear_attention_backward_op(output, query, key, value, totals, *options)
    assert (output.shape, output.dtype) == ((batch, 3, 5, 40), torch.float16)
    assert output.transpose(1, 2).is_contiguous()
    assert (totals.shape, totals.dtype) == ((4 if packed else 2, 3, backend.record_numel(24, 40)), torch.float32)
    for gradient, x in zip(gradients, (query, key, value), strict=True):
        assert (gradient.shape, gradient.dtype, gradient.stride()) == (x.shape, x.dtype, x.stride())


@pytest.mark.parametrize("multiprocessors", [108, 132])  # of an A100 and an H200
@pytest.mark.parametrize(("batch", "heads"), [(1, 12), (1, 16), (1, 24), (8, 16), (8, 40)])
def test_no_program_runs_alone_after_all_others(monkeypatch, multiprocessors, batch, heads):
    """A multiprocessor holds `WAVES` programs or one. One too many would double the time."""
    monkeypatch.setattr(backend, "_multiprocessors", lambda device: multiprocessors)
    x = torch.empty(batch, heads, 1, 64, dtype=torch.bfloat16)
    for direction in backend.TILES:
        plan = backend._Plan(x, x, "elu", None, direction)
        most, programs = backend.WAVES * multiprocessors, batch * heads
        parts = plan.parts(16384)
        assert parts == 1 if programs > most else most - programs < parts * programs <= most
        assert plan.parts(1024) == min(parts, 4)  # a part is worth its record


# head dims of 80 on the oldest cards that the kernels support, of 64 on Hopper, whose products take other paths
TARGETS = [(80, name, dtype, 80) for dtype in (torch.float32, torch.bfloat16) for name in KERNELS]
TARGETS += [(90, "query_gradient", torch.bfloat16, 64)]


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "name", "dtype", "dim"), TARGETS)
def test_kernels_compile_for_a_gpu_without_one(capability, name, dtype, dim, monkeypatch):
    """The interpreter takes much that the compiler does not. Fits shared memory of the smallest cards, too."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(backend._kernels(), name)
    direction = "backward" if "gradient" in name else "forward"
    monkeypatch.setattr(backend, "_wgmma", lambda device: capability == 90)
    x = torch.empty(1, 1, 1, dim, dtype=dtype)
    plan = backend._Plan(x, x, "elu", None, direction)
    constants = {**plan.options, "CHUNKS": plan.chunks, "FUSED": plan.fused, "key_d": 1, "value_d": 1, "query_d": 1}
    pointer = "*fp32" if dtype == torch.float32 else "*bf16"
    buffers = dict.fromkeys(("query", "key", "value", "output"), pointer)
    buffers |= {f"{name}_gradient": pointer for name in buffers}
    buffers |= {"records": "*fp32", "totals": "*fp32", "key_mask": "*i1", "cu_seqlens": "*i32"}
    types = buffers | {"scale": "fp32", "eps": "fp32"}
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    source = ASTSource(kernel, signature, {n: constants[n] for n in kernel.arg_names if n in constants})
    options = {"num_warps": plan.options["num_warps"], "num_stages": plan.options["num_stages"]}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert ("wgmma.mma_async" if capability == 90 else "mma.sync") in compiled.asm["ptx"]  # on tensor cores
    assert compiled.metadata.shared <= 99 * 1024
