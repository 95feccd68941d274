"""Private API of Transformers and PyTorch that the files beside it rely on.

A release may move any of these names; `tests/test_upstream.py` then says in a sentence which one, and what needs it.
Private attributes of public objects (`config._attn_implementation`, ...) are used where they belong, as listed there.
"""

# Whether `torch.func` is at work, whose tensors have no values to look at: linear_attention.py.
from torch._C import _are_functorch_transforms_active as is_transformed

# Whether some mode, such as a FLOP counter or a tracer, waits to see each operation: linear_attention.py.
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

# Initial values that leave alone what `from_pretrained` has loaded: feature_maps.py.
from transformers import initialization as init

# The hidden states that a backbone needs, but whose caller did not ask for: mixins.py.
from transformers.backbone_utils import filter_output_hidden_states

# Fewer heads of keys than of queries, repeated as "sdpa" does: attention_interface.py.
from transformers.integrations.sdpa_attention import repeat_kv

# The mask function of attention that hides nothing but padding: attention_interface.py.
from transformers.masking_utils import bidirectional_mask_function

# `return_dict=False` for a `forward` of our own: mixins.py.
from transformers.utils import can_return_tuple

__all__ = [
    "bidirectional_mask_function",
    "can_return_tuple",
    "filter_output_hidden_states",
    "init",
    "is_in_torch_dispatch_mode",
    "is_transformed",
    "repeat_kv",
]
