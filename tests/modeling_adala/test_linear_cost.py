"""Linear attention copies nothing, and its cost is linear in the number of tokens."""

import numpy as np
import pytest
import torch
from attention_helpers import MAPS, heads_view, in_one_piece
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from modeling_adala import build_feature_map, linear_attention, linear_attention_reference


class CopyRecorder(TorchDispatchMode):
    """Names of the operations that copy at least `threshold` numbers out of the memory of `tensors`."""

    COPIES = ("clone", "copy", "copy_", "_to_copy", "contiguous", "_reshape_copy")

    def __init__(self, tensors, threshold: int):
        super().__init__()
        self.storages = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        self.threshold, self.copies = threshold, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        reads = [x for x in args if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() in self.storages]
        is_copy = name in self.COPIES or name.endswith("_copy")
        if reads and is_copy and isinstance(output, torch.Tensor) and output.numel() >= self.threshold:
            self.copies.append(name)
        return output


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", MAPS)
def test_no_copy_of_query_key_or_value(name, batch):
    """Not even of one head of them."""
    heads, tokens, dim = 4, 128, 64
    inputs = [heads_view(batch, heads, tokens, dim, torch.float32) for _ in range(3)]
    feature_map = build_feature_map(name, heads, dim)
    with torch.no_grad(), CopyRecorder(inputs, batch * tokens * dim) as recorder:
        in_one_piece(*inputs, feature_map, None)
    assert recorder.copies == []
    with torch.no_grad(), CopyRecorder(inputs, batch * tokens * dim) as recorder:
        torch.matmul(inputs[0], inputs[1].transpose(2, 3))
    assert ("clone" in recorder.copies) == (batch > 1)  # what the recorder would have seen


def test_no_copy_inside_the_matrix_products_either():
    """The profiler also sees what a product copies on its own account, below the dispatcher."""
    query, key, value = (heads_view(2, 4, 128, 64, torch.float32) for _ in range(3))
    feature_map = build_feature_map("elu", 4, 64)

    def copied_by_bmm(function) -> list[list[int]]:
        with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            function()
        copies = []
        for event in profiler.events():
            parent = event.cpu_parent
            while event.name == "aten::copy_" and parent is not None:
                if parent.name == "aten::bmm":
                    copies.append(event.input_shapes[0])
                parent = parent.cpu_parent
        return copies

    every_second = query[:, 0, :, ::2]  # no stride of 1: a product must copy it
    assert copied_by_bmm(lambda: torch.bmm(every_second, every_second.transpose(1, 2))) != []
    assert copied_by_bmm(lambda: in_one_piece(query, key, value, feature_map, None)) == []


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_is_a_view_of_contiguous_batch_tokens_heads_dim_memory(dtype, batch):
    query, key, value = heads_view(batch, 3, 17, 64), heads_view(batch, 3, 23, 64), heads_view(batch, 3, 23, 80)
    output = linear_attention(*(x.to(dtype) for x in (query, key, value)), build_feature_map("elu", 3, 64))
    assert output.shape == (batch, 3, 17, 80)
    assert output.dtype == dtype
    assert output.transpose(1, 2).is_contiguous()


class CostRecorder(TorchDispatchMode):
    """Numbers written by all operations, the size of the largest tensor, and the products of matrix products."""

    def __init__(self):
        super().__init__()
        self.written, self.largest, self.flops = 0, 0, FlopCounterMode(display=False)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor):
            self.written += output.numel()
            self.largest = max(self.largest, output.numel())
        return output


@pytest.mark.parametrize("name", MAPS)
def test_cost_is_linear_in_the_number_of_tokens(name):
    """Count operations and sizes: unlike times, they do not depend on the load of the machine."""
    feature_map = build_feature_map(name, 2, 16)

    def cost(function, tokens: int) -> np.ndarray:
        inputs = [heads_view(1, 2, tokens, 16, torch.float32) for _ in range(3)]
        with torch.no_grad(), CostRecorder() as recorder, recorder.flops:
            function(*inputs, feature_map)
        return np.array([recorder.written, recorder.largest, recorder.flops.get_total_flops()])

    assert (cost(linear_attention, 16_384) <= 4.01 * cost(linear_attention, 4_096)).all()
    quadratic = cost(linear_attention_reference, 1_024) / cost(linear_attention_reference, 256)
    assert (quadratic > 8).all()  # what it would have seen
