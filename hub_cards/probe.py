"""Opens a checkpoint folder as its user would, in a process of its own, and prints what came of it as JSON.

    python -P hub_cards/probe.py FOLDER                                          with the package
    python -P hub_cards/probe.py FOLDER --without-package --trust-remote-code    with the code that the folder carries

A script, and no module of the package: it has to run where the package cannot be imported.
"""

import argparse
import json
import sys

import torch
import transformers
from transformers import AutoConfig, AutoModel

PACKAGES = ("hub_cards", "modeling_adala", "trainers", "vit_adala")
SHOWN = 8


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--without-package", action="store_true")
    parser.add_argument("--trust-remote-code", action="store_true")
    args = parser.parse_args()
    if args.without_package:
        sys.modules.update({name: None for name in PACKAGES})  # type: ignore[misc]  # importing one of them then fails
    else:
        import modeling_adala  # noqa: F401
    trust = args.trust_remote_code
    config = AutoConfig.from_pretrained(args.folder, trust_remote_code=trust)
    model, info = find_auto_class(config).from_pretrained(
        args.folder, trust_remote_code=trust, use_safetensors=True, dtype=torch.float32, output_loading_info=True
    )
    sizes = getattr(config, "vision_config", config)
    height, width = (sizes.image_size,) * 2 if isinstance(sizes.image_size, int) else sizes.image_size
    pixels = torch.linspace(-1, 1, sizes.num_channels * height * width).reshape(1, sizes.num_channels, height, width)
    with torch.inference_mode():
        output = model.eval()(pixels)[0]
    result = {
        "class": type(model).__name__,
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "outputs": output.flatten()[:SHOWN].tolist(),
    }
    print(json.dumps(result))


def find_auto_class(config):
    """The Auto class that opens the architecture of a configuration. `AutoModel` where there is none of its own."""
    architecture = (config.architectures or [""])[0]
    for name in (name for name in dir(transformers) if name.startswith("AutoModel")):
        auto_class = getattr(transformers, name)
        reference = (getattr(config, "auto_map", None) or {}).get(name, "")
        classes = getattr(auto_class, "_model_mapping", {}).get(type(config), ())
        names = [cls.__name__ for cls in (classes if isinstance(classes, tuple | list) else (classes,))]
        if architecture in (reference.rsplit(".", 1)[-1], *names):
            return auto_class
    return AutoModel


if __name__ == "__main__":
    try:
        main()
    except Exception as error:  # whatever it is, one line of it is what the parent shows
        sys.exit(f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}")
