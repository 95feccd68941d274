"""What the model classes are made of: linear attention, backbones, a segmentation head, and how images go in.

This file travels with the weights (`trust_remote_code`): torch, transformers and flat siblings only.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import BackboneOutput, SemanticSegmenterOutput

from .attention_interface import note_output_attentions
from .configuration_adala import pair, vision_config
from .errors import CheckpointError, UsageError
from .feature_maps import FeatureMap, build_feature_map
from .fused_projections import check_fusible, fuse, unfuse
from .hub_code import ADALA_VERSION, auto_map
from .position_cache import cache_positions
from .upstream import can_return_tuple, filter_output_hidden_states

LAST_LAYER_NORMS = ("layernorm", "norm", "post_layernorm")
# what a base model has and a backbone has not
POOLERS = [r"(^|\.)pooler\.", r"(^|vision_model\.)head\."]
# where not one; registers come on top
CLASS_TOKENS = {"deit": 2, "ijepa": 0, "siglip_vision_model": 0, "siglip2_vision_model": 0}
# their attention keeps the argument `output_attentions` to itself
SILENT_ATTENTION = {"siglip_vision_model", "siglip2_vision_model"}
# these interpolate their positions (or rotate by them) without being told
ANY_SIZE = {"dinov2", "dinov2_with_registers", "dinov3_vit"}


class AdaLAMixin:
    """What all AdaLA models share: feature maps in the attention modules, neutral at first; positions interpolated
    once per image size (`cache_positions`); saved with in-memory names and with their code, so that
    `trust_remote_code` opens them where this package is not installed.

    Stands in front of the stock class. The attention modules of a text tower have a configuration of their own, which
    is no AdaLA configuration, and stay as they are.
    """

    # here and not in `__init__`, whose arguments stay those of the stock class: all call it at the end
    def post_init(self):
        self.model_tags = ["linear-attention", "vit-adala", "distillation"]  # for the stock card of `push_to_hub`
        for layer, module in enumerate(_attention_modules(self)):
            if hasattr(module, "feature_map"):  # a backbone inside a head has given it one
                continue
            module.feature_map, options = None, module.config
            if options.model_type.removeprefix("adala_") in SILENT_ATTENTION:
                module.output_attentions_noted = False
                module.register_forward_pre_hook(note_output_attentions, with_kwargs=True)
            if layer not in options.softmax_layers:
                heads, head_dim = options.num_attention_heads, module.head_dim
                module.feature_map = build_feature_map(
                    options.feature_map, heads, head_dim, **options.feature_map_kwargs
                )
        cache_positions(self)
        super().post_init()

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        """Open a checkpoint as `PreTrainedModel.from_pretrained` does, and refuse one whose blocks would stay random.

        Transformers only reports weights that it does not find, and a student of random weights looks like any other.

        Raises:
            CheckpointError: If weights of a block are missing, those of new feature maps aside.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        modules = set(_attention_modules(model))
        blocks = tuple(f"{name.rpartition('.')[0]}." for name, module in model.named_modules() if module in modules)
        missing = [key for key in info["missing_keys"] if key.startswith(blocks) and ".feature_map." not in key]
        if missing:
            raise CheckpointError(
                f"{str(args[0] if args else cls.__name__)!r} does not load as {cls.__name__}: {len(missing)} weights"
                f" of its blocks are missing, such as {min(missing)!r}. Open it as the class that it was saved as, or"
                " get it again from where it comes from."
            )
        return (model, info) if output_loading_info else model

    @torch.no_grad()
    def initialize_weights(self) -> None:
        # here and not in `_init_weights`: stock models inside this one (`ViTModel` in a classifier) bring their own
        for module in self.modules():
            if isinstance(module, FeatureMap):
                module.reset_parameters()
        super().initialize_weights()

    def set_attn_implementation(self, attn_implementation, *args, **kwargs):
        if attn_implementation == "adala" and "vision_config" in self.config.sub_configs:
            attn_implementation = {"vision_config": "adala"}  # as in the configuration
        super().set_attn_implementation(attn_implementation, *args, **kwargs)

    def fuse_qkv_projections(self) -> None:
        """Computes query, key and value as one product, and folds the projection of a learned feature map into it.

        For inference: one product instead of five, and no feature map in float32 between them. The answers are the
        same but for rounding. Parameters, `state_dict` and what `save_pretrained` writes stay as they are; the fused
        weights are a copy. It is made anew at the next call after `train()` and `eval()`, and when PyTorch has counted
        a change of the parameters (an optimizer step, `load_state_dict`, an operation in place). A write through
        `parameter.data`, as some moving averages do it, is not counted: call `eval()`, or this again, after one.

        The projections run one by one, as ever, in training mode, while gradients are recorded, behind adapters that
        came later, and in softmax mode. A compiled or exported model cannot look: call this again after changing its
        weights.

        Raises:
            UsageError: in training mode, and where a projection or a feature map is more than its weights (adapters,
            quantization, off-loading, hooks).
        """
        if self.training:
            raise UsageError("fuse_qkv_projections() is for inference and this model trains; call model.eval() first.")
        names = {module: name for name, module in self.named_modules()}
        modules = list(_attention_modules(self))
        for module in modules:
            check_fusible(names[module], module)
        for module in modules:
            fuse(module)

    def unfuse_qkv_projections(self) -> None:
        """Undoes `fuse_qkv_projections`, and frees the memory of the copy (a fourth of the weights of a ViT)."""
        for module in _attention_modules(self):
            unfuse(module)

    def save_pretrained(self, save_directory, *args, **kwargs):
        # With the teacher family's old names on disk (the default), `Trainer` resumes and `load_best_model_at_end`
        # silently leave most tensors as they were: transformers issues 43701 and 40187, open in 5.23.
        kwargs.setdefault("save_original_format", False)
        if self.is_remote_code():
            # Transformers copies the code beside the weights, but would name no class other than this one.
            self.config.auto_map = auto_map(self.config_class)
        vision_config(self.config).adala_version = ADALA_VERSION
        return super().save_pretrained(save_directory, *args, **kwargs)


def _attention_modules(model: Any) -> Iterator[Any]:
    for module in model.modules():
        # by a field: `trust_remote_code` on a local folder loads the configuration's code twice, as two classes
        if hasattr(module, "q_proj") and hasattr(module.config, "softmax_layers"):
            yield module


@torch.no_grad()
def attention_map(model: nn.Module, pixel_values: torch.Tensor, layer: int, **kwargs) -> torch.Tensor:
    """Effective attention weights of one layer: who attends to whom, as linear attention really weighs it.

    Args:
        model (`PreTrainedModel`): An AdaLA model, with or without a head.
        pixel_values (`Tensor`): `(batch, channels, height, width)`.
        layer (`int`): Layer index; negative numbers count from the end.
        kwargs: Passed to the model, such as `interpolate_pos_encoding=True`.

    Returns:
        `Tensor`: `(batch, heads, tokens, tokens)`, rows sum to 1 (just below it for linear layers).

    Raises:
        UsageError: for a layer that the model does not have, or a model in softmax mode.
    """
    modules = list(_attention_modules(model))
    if not -len(modules) <= layer < len(modules):
        raise UsageError(f"layer={layer} does not exist; this model has layers 0 to {len(modules) - 1}.")
    weights = []

    def keep(module, args, kwargs, output):
        weights.append(output[1])

    handle = modules[layer].register_forward_hook(keep, with_kwargs=True)
    modules[layer].output_attention_weights = True  # of this layer alone: each has N x N
    try:
        model(pixel_values=pixel_values, **kwargs)
    finally:
        handle.remove()
        del modules[layer].output_attention_weights
    if weights[0] is None:
        raise UsageError(f"layer={layer} is in softmax mode; call model.set_attn_implementation('adala') first.")
    return weights[0]


def last_layernorm(model: nn.Module) -> nn.Module:
    """The layer norm after the last block; families name it differently."""
    return next(getattr(model, name) for name in LAST_LAYER_NORMS if hasattr(model, name))


def patch_grid(config, pixel_values: torch.Tensor) -> tuple[int, int]:
    """Rows and columns of patches in an image batch `(batch, channels, height, width)`."""
    patch = pair(config.patch_size)
    return pixel_values.shape[-2] // patch[0], pixel_values.shape[-1] // patch[1]


def num_special_tokens(config) -> int:
    """How many tokens stand before the patches: class and distillation token, registers."""
    registers = getattr(config, "num_register_tokens", 0)
    return CLASS_TOKENS.get(config.model_type.removeprefix("adala_"), 1) + registers


def image_inputs(config, pixel_values: torch.Tensor) -> dict[str, Any]:
    """What a vision tower's `forward` needs to take images of any size.

    Args:
        config (`PretrainedConfig`): Of the vision tower, stock or AdaLA.
        pixel_values (`Tensor`): `(batch, channels, height, width)`, sides multiples of the patch.

    Returns:
        `dict`: `pixel_values` and, where the family wants to be told, `interpolate_pos_encoding`; for SigLIP 2 the
        packed patches `(batch, patches, patch * patch * channels)` with their mask and shapes.
    """
    family = config.model_type.removeprefix("adala_")
    if family == "siglip2_vision_model":
        rows, columns = patch_grid(config, pixel_values)
        batch, channels, patch = *pixel_values.shape[:2], config.patch_size
        patches = pixel_values.reshape(batch, channels, rows, patch, columns, patch).permute(0, 2, 4, 3, 5, 1)
        return {
            "pixel_values": patches.reshape(batch, rows * columns, -1),
            "pixel_attention_mask": torch.ones(batch, rows * columns, device=pixel_values.device, dtype=torch.long),
            "spatial_shapes": torch.tensor([[rows, columns]] * batch, device=pixel_values.device),
        }
    if family in ANY_SIZE:
        return {"pixel_values": pixel_values}
    native = pair(config.image_size)
    # the interpolation of a square grid of positions is the identity at the native size; that of a rectangle is not
    is_native = native[0] != native[1] and tuple(pixel_values.shape[-2:]) == native
    return {"pixel_values": pixel_values, "interpolate_pos_encoding": not is_native}


class AdaLABackboneMixin(BackboneMixin):
    """Makes a backbone of a family's own model class: same parameters, feature maps instead of a last hidden state.

    Behaves as `Dinov2Backbone`: `out_features` or `out_indices` choose the stages, `config.apply_layernorm` and
    `config.reshape_hidden_states` say in which form they come. The pooler of the model is left out.
    """

    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _keys_to_ignore_on_load_unexpected = POOLERS

    def __init__(self, config, **kwargs):
        super().__init__(config, **kwargs)
        self.num_features = [config.hidden_size for _ in range(config.num_hidden_layers + 1)]
        if hasattr(self, "use_head"):  # SigLIP's attention pooling
            self.use_head, self.head = False, None

    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: torch.Tensor, **kwargs) -> BackboneOutput:
        """Feature maps of the chosen stages.

        Args:
            pixel_values (`Tensor`): `(batch, channels, height, width)`, sides multiples of the patch, any size.

        Returns:
            `BackboneOutput`: `feature_maps`, one `(batch, hidden_size, rows, columns)` per chosen stage.
        """
        inputs = image_inputs(self.config, pixel_values)
        # past BackboneMixin, whose forward is a placeholder
        output = super(BackboneMixin, self).forward(**inputs, **kwargs)
        grid, maps = patch_grid(self.config, pixel_values), []
        for stage, hidden_state in zip(self.stage_names, output.hidden_states):
            if stage in self.out_features:
                if self.config.apply_layernorm:
                    hidden_state = last_layernorm(self)(hidden_state)
                if self.config.reshape_hidden_states:
                    patches = hidden_state[:, num_special_tokens(self.config) :]
                    hidden_state = patches.transpose(1, 2).reshape(len(patches), -1, *grid).contiguous()
                maps.append(hidden_state)
        return BackboneOutput(
            feature_maps=tuple(maps), hidden_states=output.hidden_states, attentions=output.attentions
        )


class AdaLASegmentationMixin:
    """Semantic segmentation with the linear head of DINOv2's protocol: batch norm and a 1x1 convolution.

    The head sees the patch features of the stages in `config.out_indices` (default: the last one), normalized and
    concatenated (Oquab et al. 2023, arXiv 2304.07193, section 7.4). A subclass names its `backbone_class`.
    """

    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _keys_to_ignore_on_load_unexpected = POOLERS

    def __init__(self, config):
        super().__init__(config)
        self.num_labels = config.num_labels
        # under the family's own prefix, so that the checkpoints of its base model fit
        setattr(self, self.base_model_prefix, self.backbone_class(config))
        channels = config.hidden_size * len(config.out_features)
        self.batch_norm = nn.BatchNorm2d(channels)
        self.classifier = nn.Conv2d(channels, config.num_labels, kernel_size=1)
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs
    ) -> SemanticSegmenterOutput:
        """Class scores per patch, and the loss at the resolution of the labels.

        Args:
            pixel_values (`Tensor`): `(batch, channels, height, width)`, sides multiples of the patch.
            labels (`Tensor`, *optional*): `(batch, height, width)`, class indices; those equal to
                `config.semantic_loss_ignore_index` do not count. The loss is the mean cross-entropy over the others,
                after bilinear up-sampling of the scores.

        Returns:
            `SemanticSegmenterOutput`: `logits` of `(batch, num_labels, rows, columns)`, one score per patch.
        """
        output = self.base_model(pixel_values, **kwargs)
        logits = self.classifier(self.batch_norm(torch.cat(output.feature_maps, dim=1)))
        loss = None
        if labels is not None:
            scores = F.interpolate(logits.float(), labels.shape[-2:], mode="bilinear", align_corners=False)
            loss = F.cross_entropy(scores, labels, ignore_index=self.config.semantic_loss_ignore_index)
        return SemanticSegmenterOutput(
            loss=loss, logits=logits, hidden_states=output.hidden_states, attentions=output.attentions
        )
