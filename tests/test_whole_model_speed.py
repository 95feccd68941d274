"""docs/speed.md works as it stands, CUDA graphs included."""

import re
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from family_helpers import inputs_of, randomize, tensors, tiny_config

from modeling_adala import AdaLAViTConfig, AdaLAViTForImageClassification
from modeling_adala.modeling_adala import MODELS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "speed.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
NEEDS_GPU = "cuda"
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


def tiny_model(name: str = "vit"):
    torch.manual_seed(0)
    return randomize(MODELS[name]["Model"](tiny_config(MODELS[name]["Model"].config_class, num_hidden_layers=1)))


def outputs(model, inputs) -> list[torch.Tensor]:
    return [x.clone() for x in tensors(model(**inputs))]  # a CUDA graph writes its outputs to the same memory


def test_the_page_has_examples_for_a_cpu_and_for_a_gpu():
    assert {NEEDS_GPU in block for block in BLOCKS} == {True, False}


def test_examples_run(tmp_path, monkeypatch):
    """In order, in one namespace, with an untrained student; those that need a GPU where there is one."""
    config = AdaLAViTConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=64)
    AdaLAViTForImageClassification(config).save_pretrained(tmp_path / "student")
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for block in BLOCKS:
        if NEEDS_GPU not in block or torch.cuda.is_available():
            exec(compile(block, "docs/speed.md", "exec"), namespace)
    assert namespace["features"].isfinite().all()
    assert namespace["features"].dtype == torch.bfloat16


@needs_gpu
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_cuda_graphs_give_the_same_answers(name):
    torch._dynamo.reset()
    model = tiny_model(name).cuda()
    compiled = torch.compile(model, mode="reduce-overhead")
    for seed in range(4):  # the graph is recorded on the way
        inputs = inputs_of(model, (24, 48), seed=seed)
        inputs = {key: x.cuda() if isinstance(x, torch.Tensor) else x for key, x in inputs.items()}
        for actual, expected in zip(outputs(compiled, inputs), outputs(model, inputs), strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
