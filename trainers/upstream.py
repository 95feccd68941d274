"""Private API of Transformers, accelerate and PyTorch that this package relies on.

A release may move or change any of these names; `tests/test_upstream.py` then says in a sentence which one, and what
needs it. The private methods of `Trainer` that base_trainer.py overrides or calls are listed in the same test.
"""

import torch

# The model inside DDP, FSDP and torch.compile: evaluation/probes.py.
from accelerate.utils import extract_model_from_parallel

# Many gradients times one factor, in one call: early_gradients.py.
from torch import _foreach_mul as multiply_all

# How `Trainer` keeps its checkpoints, which base_trainer.py seals and resumes from.
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput

__all__ = [
    "TRAINER_STATE_NAME",
    "TrainOutput",
    "cpu_multiplies_bfloat16",
    "extract_model_from_parallel",
    "multiply_all",
]


def cpu_multiplies_bfloat16() -> bool:
    """Return whether this CPU multiplies bfloat16 matrices in hardware: base_config.py."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
