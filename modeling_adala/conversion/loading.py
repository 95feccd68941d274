"""Opening configurations, models and image processors: a mistake is one line, and no weight is left at random.

Transformers leaves a weight that it does not find at its random initial value, and says so in a report that a command
line silences. A student converted from random weights passes every comparison with its equally random teacher, so each
function here checks what arrived.
"""

import logging
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, RevisionResolutionError
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.activations import ACT2FN

from ..configuration_adala import has_linear_layers, vision_config
from ..errors import CheckpointError, DataError, UsageError
from ..families import get_family, is_adala
from ..inspection.towers import vision_tower
from ..modeling_adala import head_of, models_of, stock_class
from .checkpoint_safety import ATTENTIONS, check_checkpoint
from .loading_checks import (
    check_complete,
    check_finite,
    check_image_processor,
    reason_of,
    refuse_image_processor,
    saved_as,
)
from .stored_weights import check_dtypes, replace_it, stage_remedy, weight_files
from .upstream import CACHED_NO_EXIST

logger = logging.getLogger(__name__)

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


# --- configurations --------------------------------------------------------------------------------------------------


def load_config(name_or_path: str, **kwargs) -> PretrainedConfig:
    """Return the configuration of a model. A local folder is checked first, its weights included.

    Args:
        name_or_path (`str`): Hub id, local folder, or config.json.
        kwargs: Passed to `AutoConfig.from_pretrained`, such as `revision`.

    Raises:
        DataError: if nothing is there, or the Hub cannot be reached.
        CheckpointError: for a local folder that `check_checkpoint` refuses, and a configuration that is not valid.
    """
    is_folder = os.path.isdir(name_or_path)
    if is_folder and not os.path.isfile(os.path.join(name_or_path, "config.json")):
        raise DataError(
            f"model {name_or_path!r} could not be opened: the folder has no config.json."
            f" {stage_remedy(name_or_path) or 'Pass a folder with a config.json or a reachable Hub id'}."
        )
    if is_folder:
        check_checkpoint(name_or_path)
    try:
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False, **kwargs)
    except UsageError:
        raise
    except Exception as error:  # values of any wrong type raise errors of any type
        if "trust_remote_code" in str(error):
            raise CheckpointError(
                f"model {name_or_path!r} is not opened: it needs code of its own, which is never run here. Pass a"
                " model of a family that Transformers has."
            ) from error
        if os.path.exists(name_or_path) or not isinstance(error, OSError | HFValidationError):
            raise CheckpointError(
                f"model {name_or_path!r} could not be opened: {reason_of(error)} Pass a folder that save_pretrained"
                " wrote."
            ) from error
        raise DataError(
            f"model {name_or_path!r} could not be opened: it is not a local model folder, and the Hub did not deliver"
            " it (offline, or no such id). Pass a folder with a config.json or a reachable Hub id."
        ) from error
    for part in (config, *_sub_configs(config)):
        attention = part._attn_implementation
        if attention is not None and attention not in ATTENTIONS:
            raise CheckpointError(
                f"model {name_or_path!r} is not opened: its config.json sets attn_implementation={attention!r}, which"
                " would run code from elsewhere. Remove it from config.json."
            )
    return config


def commit_of(name_or_path: str, revision: str | None = None) -> str | None:
    """Return the commit that a model of the Hub was just opened at, and `None` for a local folder.

    A configuration of Transformers 5.23 or later no longer says it.
    """
    if os.path.exists(name_or_path):
        return None
    try:
        return HfApi().resolve_revision(name_or_path, revision=revision, local_files_only=True).resolved
    except (RevisionResolutionError, HFValidationError):
        return None


def load_teacher_config(teacher: str) -> PretrainedConfig:
    """Return the configuration of a teacher, known to be one, before any time goes into its weights or the data.

    Raises:
        UsageError: for an unsupported family, or a student given as a teacher.
        DataError, CheckpointError: see `load_config`.
    """
    config = load_config(teacher)
    _check_is_softmax(config, teacher)
    return config


def check_stage_directory(path: str, expected: tuple[str, ...], purpose: str) -> None:
    """Refuse a student that does not come out of the stage before.

    Raises:
        UsageError: naming the stage that is recorded in it and those that fit.
        DataError: if nothing is there.
    """
    found = getattr(vision_config(load_config(path)), "adala_stage", None)
    if found not in expected:
        raise UsageError(
            f"{path!r} was left by {'stage ' + repr(found) if found else 'no AdaLA stage'}; {purpose} starts from"
            f" {' or '.join(repr(name) for name in expected)}. Pass that folder."
        )


# --- models ----------------------------------------------------------------------------------------------------------


def load_teacher(
    teacher: str | os.PathLike | PreTrainedModel,
    head: str | None = None,
    *,
    finite: bool = True,
    config: PretrainedConfig | None = None,
    **kwargs,
) -> PreTrainedModel:
    """Open a softmax model of a supported family, frozen, in float32 and in eval mode.

    It is a stock model, or one of ours with softmax in every layer, such as a segmenter that stage 3 made of one.

    Args:
        teacher (`str` or `PreTrainedModel`): Hub id, local folder, or a model, which is frozen in place.
        head (`str`, *optional*): `"Model"`, `"ForImageClassification"`, ... Default: what the checkpoint was saved as.
            A head that the checkpoint does not have starts at random; one that only AdaLA has
            (`"ForSemanticSegmentation"`) opens the base model.
        finite (`bool`, *optional*, defaults to `True`): Refuse weights that are NaN or infinite.
        config (`PretrainedConfig`, *optional*): That of `load_teacher_config`, not to open it again.
        kwargs: Passed to `from_pretrained`, such as `revision`, `dtype` (default: float32) or `attn_implementation`
            (default: `"sdpa"`, regardless of config.json).

    Raises:
        UsageError: for an unsupported family, or a student given as a teacher.
        DataError: where neither a local folder nor the Hub has it.
        CheckpointError: for a local folder that `check_checkpoint` refuses, and weights that are missing, do not fit,
            or are not finite.

    Example:

    ```python
    teacher = load_teacher("facebook/dinov2-small")
    student = convert(teacher)
    ```
    """
    teacher = os.fspath(teacher) if isinstance(teacher, os.PathLike) else teacher
    if isinstance(teacher, str):
        if config is None:
            config = load_config(teacher, **{key: kwargs[key] for key in ("revision",) if key in kwargs})
        _check_is_softmax(config, teacher)
        kwargs = {"attn_implementation": "sdpa"} | kwargs
        teacher_class = _teacher_class(config, head)
        model = _open(teacher_class, teacher, config, "teacher", new_head=head is not None, finite=finite, **kwargs)
        model.config._commit_hash = commit_of(teacher, kwargs.get("revision"))
    else:
        model = check_teacher(teacher, finite=finite)
    return model.eval().requires_grad_(False)


def check_teacher(model: PreTrainedModel, *, finite: bool = True) -> PreTrainedModel:
    """Return a model that is already open, known to be a softmax model of a supported family with finite weights.

    Raises:
        UsageError: for an unsupported family, a student, or a model in linear mode.
        CheckpointError: for weights that are NaN or infinite.
    """
    name = type(model).__name__
    _check_is_softmax(model.config, name)
    if not is_adala(model.config) and vision_tower(model).config._attn_implementation == "adala":
        raise UsageError("teacher has attn_implementation='adala'; a teacher attends with softmax: set it to 'sdpa'.")
    if finite:
        check_finite(model, f"teacher {model.config.name_or_path or name!r}")
    return model


def load_student(name_or_path: str, *, finite: bool = True) -> PreTrainedModel:
    """Open an AdaLA checkpoint as the class it was saved as, in float32.

    Args:
        name_or_path (`str`): Hub id or local folder.
        finite (`bool`, *optional*, defaults to `True`): Refuse weights that are NaN or infinite.

    Raises:
        DataError: if nothing is there.
        CheckpointError: for a local folder that `check_checkpoint` refuses, and weights that are missing, do not fit,
            or are not finite.
        UsageError: if it is not an AdaLA checkpoint.

    Example:

    ```python
    student = load_student("out/2-feature-alignment")
    ```
    """
    config = load_config(name_or_path)
    if not is_adala(config):
        raise UsageError(
            f"model {name_or_path!r} is of type {config.model_type!r}, not an AdaLA checkpoint; convert it first."
        )
    classes = {cls.__name__: cls for cls in models_of(config).values()}
    architecture = (config.architectures or [next(iter(classes))])[0]
    if architecture not in classes:
        raise UsageError(f"model {name_or_path!r} is of class {architecture!r}; choose one of {', '.join(classes)}.")
    return _open(classes[architecture], name_or_path, config, "model", finite=finite, attn_implementation="adala")


def load_classifier(name_or_path: str, labels: list[str]) -> PreTrainedModel:
    """Open a linear or softmax checkpoint as an image classifier with these classes; a fitting head is kept.

    Raises:
        DataError: if nothing is there.
        CheckpointError: for a local folder that `check_checkpoint` refuses, and weights other than those of a new
            head that are missing, do not fit, or are not finite.
        UsageError: if its architecture has no classifier.

    Example:

    ```python
    classifier = load_classifier("out/2-feature-alignment", labels=["cat", "dog"])
    ```
    """
    config = load_config(name_or_path)
    if "ForImageClassification" not in models_of(config):
        raise UsageError(f"model {name_or_path!r} of type {config.model_type!r} has no image classification class.")
    kwargs = _label_names(config, labels)
    attention = "adala" if is_adala(config) else "sdpa"
    kwargs |= {"new_head": True, "new_labels": bool(kwargs), "attn_implementation": attention}
    return _open(AutoModelForImageClassification, name_or_path, config, "model", **kwargs)


def load_segmenter(name_or_path: str, labels: list[str]) -> PreTrainedModel:
    """Open a checkpoint as a semantic segmentation model with these classes; a fitting head is kept.

    A softmax checkpoint becomes the AdaLA class with softmax in every layer, which computes what its stock backbone
    does: Transformers has no such head for it.

    Raises:
        DataError: if nothing is there.
        CheckpointError: for a local folder that `check_checkpoint` refuses, and weights other than those of a new
            head that are missing, do not fit, or are not finite.
        UsageError: if its family has no segmentation model.

    Example:

    ```python
    segmenter = load_segmenter("out/2-feature-alignment", labels=["road", "sky", "tree"])
    ```
    """
    config = load_config(name_or_path)
    segmenter = models_of(config).get("ForSemanticSegmentation")
    if segmenter is None:
        raise UsageError(f"model {name_or_path!r} of type {config.model_type!r} has no semantic segmentation class.")
    kwargs = _label_names(config, labels)
    kwargs |= {"new_head": True, "new_labels": bool(kwargs), "attn_implementation": "adala"}
    if not is_adala(config):
        logger.info(
            "%s is a softmax model: opened as %s with softmax_layers = all %d layers, which equals it",
            name_or_path,
            segmenter.__name__,
            config.num_hidden_layers,
        )
        kwargs["softmax_layers"] = list(range(config.num_hidden_layers))
    return _open(segmenter, name_or_path, config, "model", **kwargs)


# --- image processors ------------------------------------------------------------------------------------------------


def load_image_processor(name_or_path: str) -> BaseImageProcessor | None:
    """Return a checkpoint's image processor, or `None`, with a warning, where it is known to have none.

    Raises:
        CheckpointError: for one that is damaged or would not normalize, see `check_image_processor`.
        DataError: if the Hub cannot be reached and nothing is known of the image processor.

    Example:

    ```python
    processor = load_image_processor("facebook/dinov2-small")
    ```
    """
    try:
        values, _ = BaseImageProcessor.get_image_processor_dict(name_or_path)
        check_image_processor(name_or_path, values)
        return AutoImageProcessor.from_pretrained(name_or_path, backend="pil", trust_remote_code=False)
    except CheckpointError:
        raise
    except Exception as error:  # values of any wrong type raise errors of any type
        if _has_no_processor(name_or_path):
            logger.warning("%s has no image processor: pixels are fed as 0..1", name_or_path)
            return None
        if os.path.exists(name_or_path):
            refuse_image_processor(name_or_path, reason_of(error).removesuffix("."), error)
        raise DataError(
            f"the image processor of {name_or_path!r} could not be opened: {reason_of(error)} Run this once with a"
            " network, or pass a local folder."
        ) from error


def _has_no_processor(name_or_path: str) -> bool:
    if os.path.isdir(name_or_path):
        return not any(os.path.isfile(os.path.join(name_or_path, file)) for file in PROCESSOR_FILES)
    return all(try_to_load_from_cache(name_or_path, file) is CACHED_NO_EXIST for file in PROCESSOR_FILES)


# --- what arrived ----------------------------------------------------------------------------------------------------


def _open(
    model_class: Any,
    name: str,
    config: PretrainedConfig,
    role: str,
    *,
    new_head: bool = False,
    new_labels: bool = False,
    finite: bool = True,
    **kwargs: Any,
) -> PreTrainedModel:
    """Open a model class or an Auto class, with all in place that the checkpoint should bring.

    `config` is as `load_config` returned it, `role` how messages call the model; for the options see `check_complete`.
    """
    what = f"{role} {name!r}"
    if getattr(config, "quantization_config", None) is not None:
        raise CheckpointError(f"{what} is quantized; pass the checkpoint that it was quantized from.")
    for part in (config, *_sub_configs(config)):
        activation = getattr(part, "hidden_act", None)
        if isinstance(activation, str) and activation not in ACT2FN:
            raise CheckpointError(
                f"{what} is not opened: its config.json sets hidden_act={activation!r}, which Transformers does not"
                " have. Set it to what the weights were trained with, such as 'gelu'."
            )
    if os.path.isdir(name) and not weight_files(name):
        raise CheckpointError(
            f"{what} has no weights: there is no model.safetensors."
            f" {stage_remedy(name) or 'Save the model as safetensors, or pass the folder that holds them'}."
        )
    if kwargs.get("attn_implementation") == "sdpa" and _wants_attentions(config):
        kwargs["attn_implementation"] = "eager"  # PyTorch's fused softmax has no weights to return
    try:
        model, info = model_class.from_pretrained(
            name,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, in one line
            **{"dtype": torch.float32} | kwargs,
        )
    except (CheckpointError, UsageError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and not os.path.isdir(name):
            raise DataError(
                f"{what} could not be opened: the Hub did not deliver its weights ({reason_of(error)}) Pass a local"
                " folder, or try again with a network."
            ) from error
        raise CheckpointError(f"{what} could not be opened: {reason_of(error)} {replace_it(name)}.") from error
    if getattr(model, "_hf_peft_config_loaded", False):
        raise CheckpointError(f"{what} holds adapters; merge them with merge_and_unload and save the model whole.")
    check_complete(model, info, config, what, new_head, new_labels)
    check_dtypes(what, weights_of(name, config))
    if finite:
        check_finite(model, what)
    return model


def _wants_attentions(config: PretrainedConfig) -> bool:
    return any(getattr(part, "output_attentions", False) for part in (config, *_sub_configs(config)))


def weights_of(name: str, config: PretrainedConfig) -> list[Path]:
    """Return the safetensors files of a local folder, or of a model of the Hub that is in the cache."""
    if os.path.isdir(name):
        return weight_files(name)
    cached = try_to_load_from_cache(name, "config.json", revision=getattr(config, "_commit_hash", None))
    return weight_files(Path(cached).parent) if isinstance(cached, str) else []


# --- which class -----------------------------------------------------------------------------------------------------


def _check_is_softmax(config: PretrainedConfig, name: str) -> None:
    if has_linear_layers(config):
        raise UsageError(f"teacher {name!r} is a linear-attention student; pass the softmax model it came from.")
    get_family(config.model_type)


def _teacher_class(config: PretrainedConfig, head: str | None) -> type[PreTrainedModel]:
    models = models_of(config)
    head = head or head_of(config, saved_as(config)) or "Model"
    if head not in models:
        raise UsageError(f"head={head!r} does not exist for {config.model_type}; choose {', '.join(models)}.")
    if is_adala(config):
        return models[head]
    return stock_class(models[head]) or stock_class(models["Model"])  # type: ignore[return-value]


def _label_names(config: PretrainedConfig, labels: list[str]) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that give a model these classes; none if it has them."""
    if [config.id2label.get(index) for index in range(len(config.id2label))] == labels:
        return {}
    return {"id2label": dict(enumerate(labels)), "label2id": {name: index for index, name in enumerate(labels)}}


def _sub_configs(config: PretrainedConfig) -> list[PretrainedConfig]:
    return [part for name in config.sub_configs if isinstance(part := getattr(config, name, None), PretrainedConfig)]
