"""Opens a checkpoint folder as its users do, in a separate process, and prints the findings as JSON.

    python -P vit_adala/doctor/probe.py FOLDER                                        with the package
    python -P vit_adala/doctor/probe.py FOLDER --without-package --trust-remote-code  with the code in the folder

A script, not a module of the package: it has to run where the package cannot be imported.
"""

import argparse
import inspect
import json
import math
import sys

import torch
import transformers
from transformers import AutoConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module

PACKAGES = ("hub_cards", "modeling_adala", "trainers", "vit_adala")
SHOWN = 8  # values of each output


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--without-package", action="store_true")
    parser.add_argument("--trust-remote-code", action="store_true")
    args = parser.parse_args()
    if args.without_package:
        hide_package()
    else:
        import modeling_adala  # noqa: F401
    print(json.dumps(probe(args.folder, args.trust_remote_code)))


def hide_package() -> None:
    """Make every import of our packages fail in this process."""
    sys.modules.update({name: None for name in PACKAGES})  # type: ignore[misc]


def probe(folder, trust=False):
    """Return the class that a folder opens as, missing and unexpected weights, and outputs.

    Args:
        folder (`str`): Checkpoint folder.
        trust (`bool`, *optional*, defaults to `False`): Run the code files in it.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    model, info = find_class(folder, config, trust).from_pretrained(
        folder, trust_remote_code=trust, use_safetensors=True, dtype=torch.float32, output_loading_info=True
    )
    with torch.inference_mode():
        output = model.eval()(**make_inputs(model, config))
    return {
        "class": type(model).__name__,
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "outputs": [value for tensor in tensors(output) for value in tensor.flatten()[:SHOWN].tolist()],
    }


def find_class(folder, config, trust):
    """Return the Auto class that opens the architecture of a configuration, or the class itself if none does."""
    architecture = (config.architectures or [""])[0]
    references = getattr(config, "auto_map", None) or {}
    for name in (name for name in dir(transformers) if name.startswith("AutoModel")):
        auto_class = getattr(transformers, name)
        classes = getattr(auto_class, "_model_mapping", {}).get(type(config), ())
        names = [cls.__name__ for cls in (classes if isinstance(classes, tuple | list) else (classes,))]
        if architecture in (references.get(name, "").rsplit(".", 1)[-1], *names):
            return auto_class
    # AutoBackbone refuses local folders (transformers 5.24), and no Auto class opens CLIP's projection
    package = sys.modules.get("modeling_adala")
    if package is None and trust:
        reference = next(reference for name, reference in references.items() if name != "AutoConfig")
        return get_class_from_dynamic_module(f"{reference.rsplit('.', 1)[0]}.{architecture}", folder)
    return getattr(package, architecture, None) or getattr(transformers, architecture)


def make_inputs(model, config):
    """Return pixels of the model's own size, the same in every process, and token ids if it takes text."""
    vision, names = getattr(config, "vision_config", config), inspect.signature(model.forward).parameters
    size = getattr(vision, "image_size", None)
    if size is None:  # SigLIP 2 says how many patches, of a square
        size = math.isqrt(vision.num_patches) * vision.patch_size
    height, width = (size, size) if isinstance(size, int) else size
    pixels = torch.linspace(-1, 1, vision.num_channels * height * width)
    inputs = {"pixel_values": pixels.reshape(1, vision.num_channels, height, width)}
    if "spatial_shapes" in names:  # SigLIP 2 takes packed patches
        rows, columns = height // vision.patch_size, width // vision.patch_size
        inputs["pixel_values"] = pixels.reshape(1, rows * columns, -1)
        inputs["pixel_attention_mask"] = torch.ones(1, rows * columns, dtype=torch.long)
        inputs["spatial_shapes"] = torch.tensor([[rows, columns]])
    if "input_ids" in names:
        inputs["input_ids"] = torch.tensor([[0, 1]])
    return inputs


def tensors(output):
    """Return all tensors of a model output as a list."""
    if isinstance(output, torch.Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [tensor for value in values if value is not None for tensor in tensors(value)]


if __name__ == "__main__":
    try:
        main()
    except Exception as error:  # the parent shows one line
        sys.exit(f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}")
