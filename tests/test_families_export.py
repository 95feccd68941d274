"""Every family compiles whole, exports with dynamic sizes, and is the same in a process that has never seen it.

Limits of `torch.export` with dynamic height and width that are those of the stock models (Transformers 5.23):

- Learned square grids of positions (ViT, DeiT, I-JEPA, DINOv2 with and without registers, CLIP, SigLIP): one branch
  returns the grid as it is at the native size, so the program of any other size refuses images with exactly as many
  patches as the native one ("Guard failed"). DINOv3 has no such branch.
- SigLIP 2 reads the grid of each image out of `spatial_shapes` in Python, in a loop over the batch: neither a whole
  graph nor a dynamic grid. Compiling it takes `torch._dynamo.config.capture_scalar_outputs`; exported it keeps one grid
  and one batch size.
- CLIP and SigLIP with both towers are exported with as many images as in the example: the text batch would have to be
  dynamic with it, and the sizes of the images are what counts here.
"""

import json
import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing
from family_helpers import CASES, NATIVE, RECTANGULAR, inputs_of, is_vision_text, randomize, tensors, tiny_config
from torch.export import Dim
from training_helpers import one_thread  # noqa: F401

from modeling_adala.families import FAMILIES

SIZES = (RECTANGULAR, (48, 40), (16, 56))
