"""Mixins of the model classes: linear attention, backbones and a segmentation head, for images of any size."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import BackboneOutput, SemanticSegmenterOutput

from .attention_interface import LocalMixing, give_patch_grid, is_new_parameter, note_arguments, patch_grid
from .configuration_adala import ADALA_VERSION, pair, vision_config
from .errors import CheckpointError
from .families import ROWS, get_family
from .feature_maps import FeatureMap, build_feature_map
from .upstream import can_return_tuple, filter_output_hidden_states

# modules of a base model that a backbone leaves out
_POOLERS = [rf"(^|\.){name}\." for name in sorted({row.pooler for row in ROWS})]


class AdaLAMixin:
    """Base of all AdaLA models: feature maps in the attention modules, neutral at first.

    Models are saved with in-memory names and with their code, so that `trust_remote_code` opens them where this
    package is not installed.

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
            if not get_family(options.model_type).passes_kwargs:
                module.output_attentions_noted = False
                module.register_forward_pre_hook(note_arguments, with_kwargs=True)
            if layer not in options.softmax_layers:
                heads, head_dim = options.num_attention_heads, module.head_dim
                module.feature_map = build_feature_map(
                    options.feature_map, heads, head_dim, **options.feature_map_kwargs
                )
                if options.local_mixing:
                    module.local_mixing = LocalMixing(heads * head_dim, options.local_mixing, options.dynamic_mixing)
        for module in self.modules():
            is_tower = hasattr(module, "embeddings") and getattr(module.config, "local_mixing", 0) > 0
            if is_tower and give_patch_grid not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(give_patch_grid, with_kwargs=True)
        super().post_init()

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        """Open a checkpoint as `PreTrainedModel.from_pretrained` does, and refuse one whose blocks would stay random.

        Transformers only reports weights that it does not find, and a student of random weights looks like any other.

        Raises:
            CheckpointError: If weights of a block are missing, those of new modules aside.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        modules = set(_attention_modules(model))
        blocks = tuple(f"{name.rpartition('.')[0]}." for name, module in model.named_modules() if module in modules)
        missing = [key for key in info["missing_keys"] if key.startswith(blocks) and not is_new_parameter(key)]
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
            if isinstance(module, FeatureMap | LocalMixing):
                module.reset_parameters()
        super().initialize_weights()

    def set_attn_implementation(self, attn_implementation, *args, **kwargs):
        if attn_implementation == "adala" and "vision_config" in self.config.sub_configs:
            attn_implementation = {"vision_config": "adala"}  # as in the configuration
        super().set_attn_implementation(attn_implementation, *args, **kwargs)

    def save_pretrained(self, save_directory, *args, **kwargs):
        # With the teacher family's old names on disk (the default), `Trainer` resumes and `load_best_model_at_end`
        # silently leave most tensors as they were: transformers issues 43701 and 40187, open in 5.23.
        kwargs.setdefault("save_original_format", False)
        if self.is_remote_code():
            self.config.auto_map = self.auto_map
        vision_config(self.config).adala_version = ADALA_VERSION
        return super().save_pretrained(save_directory, *args, **kwargs)


def _attention_modules(model: Any) -> Iterator[Any]:
    for module in model.modules():
        # by a field: `trust_remote_code` on a local folder loads the configuration's code twice, as two classes
        if hasattr(module, "q_proj") and hasattr(module.config, "softmax_layers"):
            yield module


def last_layernorm(model: Any) -> nn.Module:
    """Return the layer norm after the last block of a vision tower."""
    return getattr(model, get_family(model.config.model_type).last_norm)


def num_special_tokens(config) -> int:
    """Return the number of tokens before the patches: class and distillation token, registers."""
    return get_family(config.model_type).class_tokens + getattr(config, "num_register_tokens", 0)


def image_inputs(config, pixel_values: torch.Tensor) -> dict[str, Any]:
    """Return the arguments with which a vision tower's `forward` takes `(batch, channels, height, width)` of any size.

    `config` is that of the tower, stock or AdaLA; sides are multiples of the patch. SigLIP 2 gets packed patches
    `(batch, patches, patch * patch * channels)` with their mask and shapes, made so that a graph takes any batch.
    """
    family = get_family(config.model_type)
    if family.packed:
        rows, columns = patch_grid(config, pixel_values)
        (batch, channels), patch, device = pixel_values.shape[:2], config.patch_size, pixel_values.device
        patches = pixel_values.reshape(batch, channels, rows, patch, columns, patch).permute(0, 2, 4, 3, 5, 1)
        return {
            "pixel_values": patches.reshape(batch, rows * columns, -1),
            "pixel_attention_mask": torch.ones(batch, rows * columns, device=device, dtype=torch.long),
            "spatial_shapes": torch.stack([torch.full((batch,), side, device=device) for side in (rows, columns)], 1),
        }
    if family.any_size:
        return {"pixel_values": pixel_values}
    native = pair(config.image_size)
    # the interpolation of a square grid of positions is the identity at the native size; that of a rectangle is not
    is_native = native[0] != native[1] and tuple(pixel_values.shape[-2:]) == native
    return {"pixel_values": pixel_values, "interpolate_pos_encoding": not is_native}


class AdaLABackboneMixin(BackboneMixin):
    """Base of backbones, in front of a family's model class: same parameters, feature maps of chosen stages.

    Behaves as `Dinov2Backbone`: `out_features` or `out_indices` choose the stages, `config.apply_layernorm` and
    `config.reshape_hidden_states` say in which form they come. The pooler of the model is left out.
    """

    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _keys_to_ignore_on_load_unexpected = _POOLERS

    def __init__(self, config, **kwargs):
        super().__init__(config, **kwargs)
        self.num_features = [config.hidden_size for _ in range(config.num_hidden_layers + 1)]
        if getattr(self, "pooler", None) is not None:
            self.pooler = None
        if hasattr(self, "use_head"):  # SigLIP's attention pooling
            self.use_head, self.head = False, None

    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: torch.Tensor, **kwargs) -> BackboneOutput:
        """Return `feature_maps`, one `(batch, hidden_size, rows, columns)` per chosen stage.

        `pixel_values` are `(batch, channels, height, width)` of any size, sides multiples of the patch.
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
                    hidden_state = patches.transpose(1, 2).unflatten(2, grid).contiguous()
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
    _keys_to_ignore_on_load_unexpected = _POOLERS

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
        """Return `logits` `(batch, num_labels, rows, columns)` and, with labels, the loss at their resolution.

        `labels` are class indices `(batch, height, width)`; `config.semantic_loss_ignore_index` does not count. The
        loss is the mean cross-entropy over the others, after bilinear up-sampling of the scores.
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
