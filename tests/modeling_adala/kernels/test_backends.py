"""The choice of a backend, and the calls that the kernels leave to PyTorch."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad

from modeling_adala import AdaLAViTConfig, UsageError, build_feature_map, kernels, linear_attention
from modeling_adala.feature_maps import EluFeatureMap
from modeling_adala.kernels import Backend, backends, choose_backend, dispatch

ROOT = Path(__file__).parents[3]


@pytest.fixture
def fresh_choice(monkeypatch):
    monkeypatch.delenv("ADALA_BACKEND", raising=False)
    backends._choose.cache_clear()
    yield
    backends._choose.cache_clear()


@pytest.mark.usefixtures("fresh_choice")
def test_the_argument_wins_over_the_environment_and_that_over_the_fastest(monkeypatch, caplog):
    assert choose_backend("cpu") == Backend("torch", "PyTorch is the fastest on a CPU")
    monkeypatch.setenv("ADALA_BACKEND", "reference")
    assert choose_backend("cpu").name == "torch"  # the variable is read once
    backends._choose.cache_clear()
    assert choose_backend("cpu") == Backend("reference", "asked for by ADALA_BACKEND")
    assert choose_backend("cpu", "torch") == Backend("torch", "asked for by the argument or the configuration")
    assert caplog.messages == []


@pytest.mark.usefixtures("fresh_choice")
@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_kernels_are_the_fastest_wherever_they_run(monkeypatch, device):
    monkeypatch.setattr(backends, "unavailable", lambda device_type: None)
    assert choose_backend(device).name == ("torch" if device == "cpu" else "triton")
    monkeypatch.setattr(backends, "unavailable", lambda device_type: f"nothing runs on {device_type}")
    backends._choose.cache_clear()
    reason = "PyTorch is the fastest on a CPU" if device == "cpu" else f"nothing runs on {device}"
    assert choose_backend(device) == Backend("torch", reason)


@pytest.mark.usefixtures("fresh_choice")
def test_a_backend_that_cannot_run_is_replaced_with_one_warning(caplog):
    with caplog.at_level(logging.WARNING):
        choices = {choose_backend("meta", "triton") for _ in range(3)}
    assert [choice.name for choice in choices] == ["torch"]
    assert len(caplog.messages) == 1
    assert "'triton', asked for by the argument or the configuration, cannot run: " in caplog.messages[0]


@pytest.mark.usefixtures("fresh_choice")
def test_unknown_backends_are_refused_by_name(monkeypatch):
    message = r"backend='cuda' \(from the configuration\) is unknown; choose one of torch, triton, reference"
    with pytest.raises(UsageError, match=message):
        AdaLAViTConfig(backend="cuda")
    with pytest.raises(UsageError, match=r"backend='fastest' \(from the argument or the configuration\)"):
        choose_backend("cpu", "fastest")
    monkeypatch.setenv("ADALA_BACKEND", "fast")
    with pytest.raises(UsageError, match=r"backend='fast' \(from ADALA_BACKEND\)"):
        linear_attention(*torch.randn(3, 1, 2, 9, 16), "elu")


@pytest.mark.long
def test_without_triton_the_package_imports_and_pytorch_takes_over():
    program = """
import sys
sys.modules["triton"] = None
import torch
from modeling_adala import linear_attention
from modeling_adala.kernels.triton_backend import unavailable
assert unavailable("cuda").startswith("triton cannot be imported"), unavailable("cuda")
inputs = torch.randn(3, 1, 2, 9, 16)
assert torch.equal(linear_attention(*inputs, "elu"), linear_attention(*inputs, "elu", backend="torch"))
"""
    environment = os.environ | {"ADALA_BACKEND": "triton"}
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("backend 'triton', asked for by ADALA_BACKEND, cannot run: triton cannot be") == 1


# --- calls that the kernels leave to PyTorch -------------------------------------------------------------------------


def dispatched(feature_map, inputs=None, cu_seqlens=None):
    inputs = torch.randn(3, 1, 2, 9, 16) if inputs is None else inputs
    return dispatch.linear_attention(*inputs.unbind(), feature_map, None, 1e-6, cu_seqlens)


@pytest.fixture
def refused(monkeypatch):
    """The kernels would be wrong here, not just slow."""

    def run(*args):
        raise AssertionError("a kernel ran")

    monkeypatch.setattr(dispatch, "linear_attention_triton", run)


@pytest.mark.usefixtures("refused")
def test_hooks_derivatives_and_packed_mean_keys_are_left_to_pytorch(caplog):
    plain, hooked = (build_feature_map("elu", 2, 16) for _ in range(2))
    with pytest.raises(AssertionError, match="a kernel ran"):
        dispatched(plain)
    hooked.register_forward_hook(lambda *args: None)
    assert dispatched(hooked) is None
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32)
    assert dispatched(build_feature_map("elu", 2, 16, center_keys=True), cu_seqlens=bounds) is None
    inputs, answers = torch.randn(3, 1, 2, 9, 16), []
    torch.func.grad(lambda x: answers.append(dispatched(plain, x)) or x.sum())(inputs)
    with forward_ad.dual_level():
        answers.append(dispatched(plain, forward_ad.make_dual(inputs, inputs)))
    assert answers == [None, None]
    assert caplog.messages == []


@pytest.mark.usefixtures("refused")
def test_what_the_kernels_do_not_support_is_said_once(caplog):
    dispatch._warn_unsupported.cache_clear()
    with caplog.at_level(logging.WARNING):
        inputs = torch.randn(3, 1, 2, 9, 16, dtype=torch.float64)
        assert [dispatched(build_feature_map("relu", 2, 16), inputs) for _ in range(2)] == [None, None]
    assert caplog.messages == ["backend 'triton' does not support query in torch.float64; PyTorch runs it."]


def test_an_affine_part_that_drops_tokens_is_refused():
    class Pooled(EluFeatureMap):
        def affine(self, query, key, key_mask):
            return query, key[:, :, ::2], 1.0

    with pytest.raises(UsageError, match=r"Pooled turns query and key of \(1, 2, 9, 16\) and .* \(1, 2, 5, 16\)"):
        dispatched(Pooled(2, 16))


@pytest.mark.usefixtures("fresh_choice")
def test_the_operator_asks_the_kernels_where_they_are_chosen(monkeypatch):
    """With the arguments that it has checked, and takes `None` for "you do it"."""
    inputs, asked = torch.randn(3, 1, 2, 9, 16), []
    expected = linear_attention(*inputs, "elu", backend="torch")
    monkeypatch.setattr(backends, "unavailable", lambda device_type: None)
    monkeypatch.setattr(kernels, "linear_attention", lambda *args: asked.append(args))
    assert torch.equal(linear_attention(*inputs, "elu", torch.ones(1, 9), backend="triton"), expected)
    ((*_, feature_map, key_mask, eps, cu_seqlens),) = asked
    assert (type(feature_map), key_mask.dtype, eps, cu_seqlens) == (EluFeatureMap, torch.bool, 1e-6, None)
    monkeypatch.setattr(kernels, "linear_attention", lambda *args: args[2])
    assert torch.equal(linear_attention(*inputs, "elu", backend="triton"), inputs[2])
