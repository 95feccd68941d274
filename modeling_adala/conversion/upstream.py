"""Private API of Transformers and huggingface_hub that opens and inspects models; see `modeling_adala/upstream.py`."""

from collections.abc import Callable

# The cache's answer that the Hub has no such file: loading.py.
from huggingface_hub import _CACHED_NO_EXIST as CACHED_NO_EXIST
from transformers import AttentionInterface

# Teachers lie on disk under old names, and their new ones are looked up by class: registration.py.
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

__all__ = [
    "CACHED_NO_EXIST",
    "WeightRenaming",
    "attention_functions",
    "get_checkpoint_conversion_mapping",
    "register_checkpoint_conversion_mapping",
]


def attention_functions() -> dict[str, Callable]:
    """Return the table that `AttentionInterface.register` writes to and all models read: check_linear.py."""
    return AttentionInterface._global_mapping
