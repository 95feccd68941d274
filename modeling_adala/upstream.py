"""Private API of Transformers and PyTorch that this package relies on.

A release may move or change any of these names; `tests/test_upstream.py` then says in a sentence which one, and what
needs it. Private attributes of public objects (`config._attn_implementation`, `tensor._version`, ...) are used where
they belong; the same test lists them.

This file travels with the weights (`trust_remote_code`): torch, transformers and flat siblings only.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch

# The cache's answer that the Hub has no such file: loading.py.
from huggingface_hub import _CACHED_NO_EXIST as CACHED_NO_EXIST

# Whether `torch.func` is at work, whose tensors are no numbers in memory: linear_attention.py.
from torch._C import _are_functorch_transforms_active as is_transformed

# Whether some mode, such as a FLOP counter or a tracer, waits to see each operation: linear_attention.py.
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from transformers import AttentionInterface, PretrainedConfig

# Initial values that leave alone what `from_pretrained` has loaded: feature_maps.py.
from transformers import initialization as init

# The hidden states that a backbone needs, but whose caller did not ask for: mixins.py.
from transformers.backbone_utils import filter_output_hidden_states

# Teachers lie on disk under old names, and their new ones are looked up by class: registration.py.
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

# Fewer heads of keys than of queries, repeated as "sdpa" does: attention_interface.py.
from transformers.integrations.sdpa_attention import repeat_kv

# What a mask is made with that hides nothing but padding: attention_interface.py.
from transformers.masking_utils import bidirectional_mask_function

# Where a module looks up its attention: fused_projections.py.
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto import modeling_auto

# DINOv3's rotation, which leaves the tokens before the patches alone: fused_projections.py.
from transformers.models.dinov3_vit.modeling_dinov3_vit import apply_rotary_pos_emb

# `return_dict=False` for a `forward` of our own: mixins.py.
from transformers.utils import can_return_tuple

__all__ = [
    "ALL_ATTENTION_FUNCTIONS",
    "CACHED_NO_EXIST",
    "WeightRenaming",
    "apply_rotary_pos_emb",
    "attention_functions",
    "auto_classes_of",
    "bidirectional_mask_function",
    "can_return_tuple",
    "cpu_has_bfloat16_products",
    "filter_output_hidden_states",
    "get_checkpoint_conversion_mapping",
    "init",
    "is_in_torch_dispatch_mode",
    "is_transformed",
    "register_checkpoint_conversion_mapping",
    "repeat_kv",
]


def attention_functions() -> dict[str, Callable]:
    """Return what `AttentionInterface.register` writes to and all models read from: check_linear.py listens there."""
    return AttentionInterface._global_mapping


def auto_classes_of(config_class: type[PretrainedConfig]) -> dict[str, Any]:
    """Return the Auto classes that open models of a configuration, by name, and what each opens: hub_code.py."""
    classes = {}
    for name, auto_class in inspect.getmembers(modeling_auto, inspect.isclass):
        mapping = getattr(auto_class, "_model_mapping", None)
        if name.startswith("Auto") and mapping is not None and config_class in mapping:
            classes[name] = mapping[config_class]
    return classes


def cpu_has_bfloat16_products() -> bool:
    """Return whether this CPU multiplies bfloat16 matrices in hardware: cpu_backend.py."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
