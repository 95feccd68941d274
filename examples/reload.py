"""Open a finished run as any Transformers model and let it read ten held-out digits.

    python examples/reload.py out/quickstart/3-supervised

Importing `modeling_adala` is all that `AutoModelForImageClassification` needs to know the linear-attention classes.
"""

import argparse

import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification

import modeling_adala  # noqa: F401
from trainers import load_digits


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Reload a checkpoint and classify ten held-out digits.")
    parser.add_argument("directory", metavar="DIR", help="folder of a saved classifier")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    processor = AutoImageProcessor.from_pretrained(args.directory)
    model = AutoModelForImageClassification.from_pretrained(args.directory).eval()

    test = load_digits("test")
    # One of each: the rows are sorted by digit.
    rows = test.select(range(0, len(test), len(test) // 10))
    with torch.inference_mode():
        logits = model(**processor(rows["image"][:], return_tensors="pt")).logits

    correct = 0
    for label, probabilities in zip(rows["label"][:], logits.softmax(-1)):
        predicted = int(probabilities.argmax())
        correct += predicted == label
        verdict = "ok" if predicted == label else "WRONG"
        print(f"digit {label}  read as {model.config.id2label[predicted]}  {probabilities[predicted]:6.1%}  {verdict}")
    print(f"{type(model).__name__} from {args.directory}: {correct} of {len(rows)} correct")


if __name__ == "__main__":
    main()
