"""int8 for ONNX Runtime: the weights of matrix products, and what that costs in accuracy."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Subset
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.modeling_outputs import SemanticSegmenterOutput

from modeling_adala.errors import UsageError
from modeling_adala.inspection.towers import token_groups
from modeling_adala.modeling_adala import head_of
from trainers.data.data_config import DataModule
from trainers.data.labels import head_ids
from trainers.evaluation.metrics import Accuracy, KNNAccuracy
from trainers.evaluation.probes import FeatureBank, linear_probe
from trainers.evaluation.segmentation import evaluate_segmentation

from .tracing import model_inputs

Run = Callable[[dict[str, Any]], dict[str, Tensor]]


def quantize(source: Path, target: Path) -> None:
    """Write an ONNX file whose products with constant weights are int8, their inputs quantized as they come.

    Convolutions (patches, local mixing), the products inside attention, norms and sums stay in float32.
    """
    import onnx_ir

    from .onnx_graph import save
    from .upstream import quantize_onnx

    save(quantize_onnx(onnx_ir.load(source)), target)


class AccuracyCheck:
    """Accuracy of a model on labeled images: of its own classifier or segmenter, or else of k-NN and a linear probe.

    Args:
        model (`PreTrainedModel`): Says which outputs there are.
        data (`DataModule`): Evaluation images and, for features, training images; for a segmenter, with masks.
        batch (`int`, *optional*): Images in a batch, if the graph fixes it; what is left over then is not used.
        eval_images (`int`), train_images (`int`): How many of them at most.

    Raises:
        UsageError: If the data have no evaluation split or no labels of the model's classes, or the model gives
            neither classes nor features.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        data: DataModule,
        batch: int | None = None,
        eval_images: int = 1000,
        train_images: int = 2000,
    ):
        self.model, self.head = model, head_of(model.config, type(model).__name__) or ""
        name = f"dataset={data.config.dataset!r}"
        evaluation: Any = data.eval_dataset(eval_images)
        if evaluation is None or not data.labels:
            raise UsageError(f"{name} has no labeled evaluation images, which int8 is judged on; pass another.")
        if self.head == "ForMaskedImageModeling":
            raise UsageError(
                f"quantize='int8': {type(model).__name__} gives neither classes nor features, on which it is judged;"
                " export it in float32 or float16."
            )
        self.ids = head_ids(model.config.id2label, data.labels)
        if self.ids is None and self.head.startswith("For"):
            raise UsageError(f"{name} has other classes than the model, whose accuracy is measured; pass another.")
        bank = None if self.head.startswith("For") else data.bank_dataset(train_images)
        parts: Any = [evaluation, bank]
        if batch is not None:
            parts = [None if part is None else Subset(part, range(len(part) // batch * batch)) for part in parts]
        self.loader, self.bank_loader = [cast(Any, data.loader(part, batch)) for part in parts]
        self.images = len(parts[0])

    def __call__(self, run: Run, description: str) -> dict[str, float]:
        """Return the figures of a model or a runtime, by name.

        Args:
            run (`Callable`): Takes the arguments of the model's `forward`, returns its outputs by name.
            description (`str`): Name on the progress bar.
        """
        if self.head == "ForSemanticSegmentation":
            segmenter: Any = _Segmenter(self.model, run)
            return {"head_mean_iou": evaluate_segmentation(segmenter, self.loader)["mean_iou"]}
        if self.head.startswith("For"):
            accuracy, ids = Accuracy(), torch.tensor(self.ids)
            for batch in tqdm(self.loader, desc=description, disable=None, leave=False):
                logits = run(model_inputs(self.model, batch["pixel_values"]))["logits"]
                accuracy.add_batch(predictions=logits, references=ids[batch["labels"]])
            return {"head_accuracy": accuracy.compute()["accuracy"]}
        train, test = (self._bank(run, loader, description) for loader in (self.bank_loader, self.loader))
        knn = KNNAccuracy(train.cls, train.labels).compute(predictions=test.cls, references=test.labels)
        return {**knn, "linear_probe_accuracy": linear_probe(train, test)}

    def _bank(self, run: Run, loader: Iterable[dict[str, Any]], description: str) -> FeatureBank:
        rows = []
        for batch in tqdm(loader, desc=description, disable=None, leave=False):
            outputs = run(model_inputs(self.model, batch["pixel_values"]))
            rows.append((*self._pooled(outputs), batch["labels"]))
        return FeatureBank(*(torch.cat(column) for column in zip(*rows, strict=True)))

    def _pooled(self, outputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return class token and mean patch; of a backbone, the mean of its last map for both."""
        for name in ("last_hidden_state", "vision_model_output.last_hidden_state"):
            if name in outputs:
                groups, tokens = token_groups(self.model.config), outputs[name]
                cls = tokens[:, groups.get("cls", groups["patches"])].mean(dim=1)
                return cls, tokens[:, groups["patches"]].mean(dim=1)
        mean = list(outputs.values())[-1].mean(dim=(2, 3))
        return mean, mean


class _Segmenter(nn.Module):
    """What `evaluate_segmentation` asks of a model."""

    device = torch.device("cpu")

    def __init__(self, model: PreTrainedModel, run: Run):
        super().__init__()
        self.config, self.run = model.config, run

    def forward(self, pixel_values: Tensor) -> Any:
        return SemanticSegmenterOutput(logits=self.run({"pixel_values": pixel_values})["logits"])
