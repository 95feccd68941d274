"""Push a linear ViT to the Hub and open it again by its id.

    hf auth login
    python examples/share.py out/quickstart/3-supervised your-name/vit-adala-digits

With --smoke, a freshly converted teacher goes to the test Hub of tests/hub_server.py instead of the real one:

    python examples/share.py --smoke

What goes up is one commit: weights, configuration, image processor, card, and the code that opens the model where this
package is not installed. `vit-adala push` does it on the command line and asks before it changes a repository.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hub_cards import plan_push, push
from modeling_adala import convert
from trainers import DIGITS_TEACHER, load_digits


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Push a classifier to the Hub and open it again by its id.")
    parser.add_argument("directory", metavar="DIR", nargs="?", help="folder of an AdaLA classifier")
    parser.add_argument("repo_id", metavar="REPO_ID", nargs="?", help="name or organization/name")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--smoke", action="store_true", help="needs no argument and no Hub")
    args = parser.parse_args()
    if not args.smoke and args.repo_id is None:
        parser.error("pass DIR and REPO_ID, or --smoke")
    return args


def share(directory: str, repo_id: str, private: bool) -> None:
    plan = plan_push(directory, repo_id, private=private)
    for file in plan.files:
        print(f"{file.change:8} {file.size:>12,} bytes  {file.path}")
    url = push(plan)

    images = load_digits("test").shuffle(seed=0).select(range(16))["image"][:]
    logits = []
    for name in (directory, repo_id):
        model = AutoModelForImageClassification.from_pretrained(name).eval()
        processor = AutoImageProcessor.from_pretrained(name)
        mode = "L" if model.config.num_channels == 1 else "RGB"
        inputs = processor([image.convert(mode) for image in images], return_tensors="pt")
        with torch.inference_mode():
            logits.append(model(**inputs).logits)
    difference = (logits[0] - logits[1]).abs().max().item()
    megabytes = sum(file.size for file in plan.changes) / 1e6
    print(
        f"{url}: {len(plan.changes)} files, {megabytes:.1f} MB; {type(model).__name__} opened as {repo_id},"
        f" its logits differ from the folder's by {difference:g}"
    )


def share_on_test_hub() -> None:
    """Run this script again in a process that takes the test Hub for the real one."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from hub_server import HubServer

    with HubServer() as hub, tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "vit-adala-digits"
        convert(DIGITS_TEACHER).save_pretrained(model)
        AutoImageProcessor.from_pretrained(DIGITS_TEACHER).save_pretrained(model)
        command = [sys.executable, __file__, str(model), "org/vit-adala-digits"]
        subprocess.run(command, env=hub.environment(Path(folder) / "hf"), check=True)


def main() -> None:
    args = parse_args()
    if args.smoke:
        share_on_test_hub()
    else:
        share(args.directory, args.repo_id, args.private)


if __name__ == "__main__":
    main()
