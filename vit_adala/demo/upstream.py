"""Private API of PyTorch; see `modeling_adala/upstream.py`."""

# Every operation and its results: measure.py, to count the memory of live tensors.
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["TorchDispatchMode", "tree_leaves"]
