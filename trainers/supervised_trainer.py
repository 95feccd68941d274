"""Stage 3: labels. Nothing here that plain `transformers.Trainer` cannot do; it adds metrics and defaults."""

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from .base_trainer import AdaLATrainer, freeze_all_but
from .metric_functions import compute_accuracy
from .supervised_config import SupervisedConfig


class SupervisedTrainer(AdaLATrainer):
    """Fine-tunes an image classifier, linear or softmax, and reports its accuracy at evaluation.

    Args:
        model (`PreTrainedModel`): A model for image classification, AdaLA or stock.
        args (`SupervisedConfig`): Settings.
        compute_metrics (`Callable`, *optional*): As for `Trainer`. Default: accuracy.
        kwargs: As for `Trainer`; items hold `pixel_values` and `labels`.
    """

    stage = "supervised"

    def __init__(
        self,
        model: PreTrainedModel,
        args: SupervisedConfig,
        *,
        compute_metrics: Callable | None = None,
        **kwargs: Any,
    ):
        if isinstance(model, PreTrainedModel):
            backbone = {id(parameter) for parameter in model.base_model.parameters()}
            names = {name for name, parameter in model.named_parameters() if id(parameter) not in backbone}
            # the class token's mask twin never sees a gradient in classification
            freeze_all_but(
                model, lambda name: "mask_token" not in name and (name in names or not args.freeze_backbone)
            )
        super().__init__(model=model, args=args, compute_metrics=compute_metrics or compute_accuracy, **kwargs)
