"""What we use of other libraries without their promise is still there and still does what we need.

A failure here is a sentence: what changed, what of ours needs it, and where to look. It comes first when a new release
breaks us, so nothing of ours is imported before a test runs.
"""

import ast
import importlib
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
PACKAGES = ("modeling_adala", "trainers", "hub_cards", "vit_adala")
UPSTREAM = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("upstream.py"))]

CONFIGURATION = "modeling_adala/configuration_adala.py"
CHECKPOINTS = "trainers/base_trainer.py, to resume from whole checkpoints only"
OLD_NAMES = "conversion/registration.py, without which teachers load with random attention"
PUSH = "hub_cards/push.py, to tell what a push would change"
EXPORT = "vit_adala/export, to trace models into graphs"
COUNT = "vit_adala/demo/measure.py, to count the memory of tensors"
NOTICE = "modeling_adala/linear_attention.py, to let PyTorch see each operation where it waits for them"
# where it is and what it is called: who needs it
NAMES = {
    "accelerate.utils.extract_model_from_parallel": "trainers/evaluation/probes.py, to see through DDP and FSDP",
    "accelerate.utils.get_int_from_env": "vit_adala/cli.py, to print once and not in every process",
    "huggingface_hub._CACHED_NO_EXIST": "modeling_adala/conversion/loading.py, to tell no file from no network",
    "huggingface_hub.dataclasses.strict": f"{CONFIGURATION}, as the stock configurations do",
    "huggingface_hub.utils.sha.git_hash": PUSH,
    "huggingface_hub.utils.sha.sha_fileobj": PUSH,
    "torch._C._are_functorch_transforms_active": NOTICE,
    "torch._foreach_mul": "trainers/early_gradients.py, to scale all gradients at once",
    "torch.cpu._is_amx_tile_supported": "trainers/base_config.py, to choose bf16 where it pays",
    "torch.cpu._is_avx512_bf16_supported": "trainers/base_config.py, to choose bf16 where it pays",
    "torch.utils._python_dispatch.TorchDispatchMode": COUNT,
    "torch.utils._python_dispatch.is_in_torch_dispatch_mode": NOTICE,
    "torch.utils._pytree.tree_leaves": COUNT,
    "transformers.AttentionInterface._global_mapping": "modeling_adala/inspection/check_linear.py, to watch attention",
    "transformers.AutoModel._model_mapping": "vit_adala/doctor/probe.py, to know auto_map",
    "transformers.PreTrainedModel._can_set_attn_implementation": "inspection/check_linear.py, to say why",
    "transformers.PreTrainedModel._keys_to_ignore_on_load_unexpected": "modeling_adala/mixins.py, to drop poolers",
    "transformers.PreTrainedModel.initialize_weights": "modeling_adala/mixins.py, to start feature maps neutral",
    "transformers.PreTrainedModel.is_remote_code": "modeling_adala/mixins.py, to save a checkpoint with its code",
    "transformers.PretrainedConfig._attn_implementation": f"{CONFIGURATION}, to be linear by default",
    "transformers.PretrainedConfig.base_config_key": f"{CONFIGURATION}, to read the vision part of CLIP",
    "transformers.PretrainedConfig.get_config_dict": f"{CONFIGURATION}, to read stock checkpoints",
    "transformers.PretrainedConfig.sub_configs_defaults": f"{CONFIGURATION}, for models of two towers",
    "transformers.backbone_utils.BackboneConfigMixin": f"{CONFIGURATION}, for backbones",
    "transformers.backbone_utils.BackboneMixin": "modeling_adala/mixins.py, for backbones",
    "transformers.backbone_utils.filter_output_hidden_states": "modeling_adala/mixins.py, for backbones",
    "transformers.conversion_mapping.get_checkpoint_conversion_mapping": OLD_NAMES,
    "transformers.conversion_mapping.register_checkpoint_conversion_mapping": OLD_NAMES,
    "transformers.core_model_loading.WeightRenaming": OLD_NAMES,
    "transformers.dynamic_module_utils.get_relative_import_files": "hub_cards/push.py, to push code with weights",
    "transformers.exporters.OnnxConfig": EXPORT,
    "transformers.exporters.OnnxRuntimeDynamicConfig": EXPORT,
    "transformers.exporters.OnnxRuntimeQuantizer": EXPORT,
    "transformers.exporters.OpenVINOConfig": EXPORT,
    "transformers.exporters.exporter_onnx.OnnxExporter": EXPORT,
    "transformers.exporters.exporter_openvino.OpenVINOExporter": EXPORT,
    "transformers.initialization": "modeling_adala/feature_maps.py, to leave loaded weights alone",
    "transformers.integrations.sdpa_attention.repeat_kv": "modeling_adala/attention_interface.py, for grouped queries",
    "transformers.masking_utils.bidirectional_mask_function": "modeling_adala/attention_interface.py, to read masks",
    "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers.torch_int": (
        "vit_adala/export/upstream.py, to leave the size of an image free"
    ),
    "transformers.trainer.TRAINER_STATE_NAME": CHECKPOINTS,
    "transformers.trainer_utils.TrainOutput": CHECKPOINTS,
    "transformers.trainer_utils.rotate_checkpoints": CHECKPOINTS,
    "transformers.utils.can_return_tuple": "modeling_adala/mixins.py, for return_dict=False",
}
# methods of `Trainer`: their arguments, and who overrides (or calls) them
TRAINER = {
    "_get_output_dir": (["trial"], "overrides"),
    "_save_checkpoint": (["model", "trial"], "overrides"),
    "_save": (["output_dir", "state_dict"], "overrides"),
    "_push_from_checkpoint": (["checkpoint_folder"], "overrides"),
    "_load_from_checkpoint": (["resume_from_checkpoint", "model"], "calls"),
    "_load_best_model": ([], "calls"),
    "_clip_grad_norm": (["model"], "overrides"),
    "_get_grad_norm": (["model", "grad_norm"], "overrides"),
    "_prepare_inputs": (["inputs"], "calls"),
    "get_batch_samples": (["epoch_iterator", "num_batches", "device"], "overrides"),
    "autocast_smart_context_manager": (["cache_enabled"], "overrides"),
    "prediction_step": (["model", "inputs", "prediction_loss_only", "ignore_keys"], "overrides"),
}
# private attributes of public objects, used where they belong, and the test below that looks at each
ATTRIBUTES = {
    "_attn_implementation",  # of a configuration: test_a_configuration_keeps_its_attention_in_one_property
    "_attn_implementation_internal",
    "_can_set_attn_implementation",  # of a model class, in NAMES
    "_data_dir_root",  # of an `evaluate.Metric`: test_a_metric_asks_for_its_folder
    "_forward_hooks",  # of a module: test_hooks_of_a_module
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_exit",  # of os, a module of Python itself
    *(name for name in TRAINER if name.startswith("_")),
    # of argparse, a module of Python itself
    "_action_groups",
    "_actions",
    "_format_action_invocation",
    "_group_actions",
    "_replace",  # of any named tuple
}


@contextmanager
def relied_on(library: str, change: str, user: str) -> Iterator[None]:
    """Turns whatever goes wrong inside into a sentence."""
    sentence = None
    try:
        yield
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        sentence = f"{library} {version(library)} {change}. Its user: {user}. ({reason})"
    if sentence is not None:
        raise pytest.fail.Exception(sentence, pytrace=False) from None


def find(name: str) -> object:
    """The object of a dotted name: the longest part that is a module, and attributes from there."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(name)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_where_it_was(name):
    library, package = name.partition(".")[0], NAMES[name].partition("/")[0]
    change = f"has no {name} any more: find where it went and change {package}/upstream.py or the file itself"
    with relied_on(library, change, NAMES[name]):
        find(name)


# --- what it does ----------------------------------------------------------------------------------------------------


def test_names_on_disk_are_registered_by_class_name():
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )
    from transformers.core_model_loading import WeightRenaming

    with relied_on("transformers", "registers the names of weights on disk in another way", OLD_NAMES):
        for name in ("ViTModel", "Dinov2Model", "CLIPVisionModel", "Siglip2VisionModel"):
            assert get_checkpoint_conversion_mapping(name), name
        renaming = WeightRenaming(r"old\.", "new.")
        register_checkpoint_conversion_mapping("AdaLANoSuchModel", [renaming], overwrite=True)
        (found,) = get_checkpoint_conversion_mapping("AdaLANoSuchModel")
        assert found.source_patterns == renaming.source_patterns


def test_a_configuration_keeps_its_attention_in_one_property():
    from transformers import CLIPConfig, CLIPVisionConfig, PretrainedConfig, ViTConfig

    with relied_on("transformers", "keeps attn_implementation in another way", CONFIGURATION):
        assert isinstance(PretrainedConfig._attn_implementation, property)
        config = ViTConfig()
        PretrainedConfig._attn_implementation.fset(config, "sdpa")
        assert config._attn_implementation == config._attn_implementation_internal == "sdpa"
        both = CLIPConfig()
        both._attn_implementation = {"vision_config": "adala"}
        assert both.vision_config._attn_implementation == "adala" != both.text_config._attn_implementation
        assert CLIPVisionConfig.base_config_key == "vision_config"
        assert both.sub_configs["vision_config"] is CLIPVisionConfig
        assert {*CLIPConfig.sub_configs_defaults} == {"text_config", "vision_config"}


def test_a_configuration_is_read_as_a_dictionary(tmp_path):
    from transformers import ViTConfig

    ViTConfig(hidden_size=24, num_attention_heads=2).save_pretrained(tmp_path)
    with relied_on("transformers", "reads configurations in another way", CONFIGURATION):
        values, rest = ViTConfig.get_config_dict(tmp_path, revision=None)
        assert values["hidden_size"] == 24
        assert isinstance(rest, dict)


def test_models_look_up_attention_and_mask_by_name_in_open_registries():
    from transformers import AttentionInterface, AttentionMaskInterface, ViTConfig
    from transformers.masking_utils import (
        ALL_MASK_ATTENTION_FUNCTIONS,
        bidirectional_mask_function,
        create_bidirectional_mask,
    )
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attend(*args, **kwargs): ...

    seen = []

    def mask(*args, **kwargs):
        seen.append(kwargs)

    AttentionInterface.register("adala_test", attend)
    AttentionMaskInterface.register("adala_test", mask)
    try:
        with relied_on(
            "transformers",
            "keeps attention functions in another way",
            "modeling_adala/attention_interface.py",
        ):
            assert AttentionInterface._global_mapping["adala_test"] is attend
            assert ALL_ATTENTION_FUNCTIONS["adala_test"] is attend
            assert ALL_MASK_ATTENTION_FUNCTIONS["adala_test"] is mask
            config, padding = ViTConfig(attn_implementation="adala_test"), torch.tensor([[1, 1, 0]])
            create_bidirectional_mask(config, torch.zeros(1, 3, 8), padding)
            assert seen[0]["mask_function"] is bidirectional_mask_function
            assert seen[0]["attention_mask"].tolist() == [[True, True, False]]
    finally:
        AttentionInterface._global_mapping.pop("adala_test", None)
        AttentionMaskInterface._global_mapping.pop("adala_test", None)


def test_keys_of_grouped_queries_are_repeated_one_by_one():
    from transformers.integrations.sdpa_attention import repeat_kv

    keys = torch.randn(2, 3, 4, 5)
    with relied_on("transformers", "repeats keys in another order", "modeling_adala/attention_interface.py"):
        assert torch.equal(repeat_kv(keys, 2), keys.repeat_interleave(2, dim=1))


def test_initial_values_leave_loaded_weights_alone():
    from transformers import initialization

    loaded, new = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    loaded._is_hf_initialized = True
    with relied_on("transformers", "initializes in another way", "modeling_adala/feature_maps.py"):
        for parameter in (loaded, new):
            initialization.zeros_(parameter)
        initialization.copy_(loaded, torch.full((2,), 3.0))
        assert (loaded.tolist(), new.tolist()) == ([1, 1], [0, 0])


def test_auto_classes_map_configurations_to_models():
    from transformers import AutoModel, ViTConfig, ViTModel

    with relied_on(
        "transformers",
        "keeps the models of an Auto class in another way",
        "vit_adala/doctor/probe.py",
    ):
        assert ViTConfig in AutoModel._model_mapping
        assert AutoModel._model_mapping[ViTConfig] is ViTModel


def test_code_files_and_what_they_need_are_found(tmp_path):
    from transformers.dynamic_module_utils import get_relative_import_files

    (tmp_path / "first.py").write_text("from .second import x\nimport torch\n")
    (tmp_path / "second.py").write_text("from . import third\n")
    with relied_on("transformers", "collects code files in another way", "hub_cards/push.py"):
        found = {Path(file).name for file in get_relative_import_files(tmp_path / "first.py")}
        assert "second.py" in found
        assert "first.py" not in found


def test_files_have_the_identity_that_the_hub_gives_them(tmp_path):
    from huggingface_hub.utils.sha import git_hash, sha_fileobj

    (tmp_path / "file").write_bytes(b"hello\n")
    with relied_on("huggingface-hub", "hashes files in another way", PUSH):
        assert git_hash(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"
        with (tmp_path / "file").open("rb") as file:
            assert sha_fileobj(file).hex() == "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"


@pytest.mark.parametrize("name", TRAINER)
def test_trainer_calls_the_methods_that_we_override_and_has_those_that_we_call(name):
    from transformers import Trainer

    arguments, use = TRAINER[name]
    with relied_on("transformers", f"changed Trainer.{name}", f"trainers/base_trainer.py, which {use} it"):
        assert list(inspect.signature(getattr(Trainer, name)).parameters) == ["self", *arguments]
        assert f"self.{name}(" in inspect.getsource(Trainer), "Trainer does not call it"


def test_checkpoints_keep_their_state_in_a_file_of_that_name():
    from transformers.trainer import TRAINER_STATE_NAME
    from transformers.trainer_utils import TrainOutput

    with relied_on("transformers", "keeps its checkpoints in another way", CHECKPOINTS):
        assert TrainOutput._fields == ("global_step", "training_loss", "metrics")
        assert TRAINER_STATE_NAME == "trainer_state.json"


def test_a_metric_asks_for_its_folder():
    import evaluate

    with relied_on("evaluate", "makes the cache folder of a metric in another way", "trainers/evaluation/metrics.py"):
        assert "self._build_data_dir()" in inspect.getsource(evaluate.Metric.__init__)
        assert "self._data_dir_root" in inspect.getsource(evaluate.Metric._build_data_dir)


def test_a_model_comes_out_of_its_wrapper():
    from accelerate.utils import extract_model_from_parallel

    model = nn.Linear(2, 2)
    with relied_on("accelerate", "unwraps models in another way", "trainers/evaluation/probes.py"):
        assert extract_model_from_parallel(torch.compile(model), keep_torch_compile=False) is model


# --- PyTorch ---------------------------------------------------------------------------------------------------------


def test_hooks_of_a_module():
    with relied_on("torch", "keeps hooks in another way", "modeling_adala/kernels/dispatch.py, to let them run"):
        module = nn.Identity()
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._backward_hooks
        assert not module._backward_pre_hooks
        module.register_forward_hook(print)
        module.register_forward_pre_hook(print)
        module.register_full_backward_hook(print)
        module.register_full_backward_pre_hook(print)
        assert module._forward_hooks
        assert module._forward_pre_hooks
        assert module._backward_hooks
        assert module._backward_pre_hooks


def test_torch_func_and_dispatch_modes_can_be_noticed():
    from torch._C import _are_functorch_transforms_active
    from torch.utils._python_dispatch import is_in_torch_dispatch_mode
    from torch.utils.flop_counter import FlopCounterMode

    seen = []
    with relied_on("torch", "tells of torch.func and of modes in another way", "modeling_adala/linear_attention.py"):
        torch.func.vmap(lambda x: (seen.append(_are_functorch_transforms_active()), x)[1])(torch.ones(2))
        with FlopCounterMode(display=False):
            seen.append(is_in_torch_dispatch_mode())
        assert seen == [True, True]
        assert not _are_functorch_transforms_active()
        assert not is_in_torch_dispatch_mode()


def test_what_a_processor_can_do_is_known():
    with relied_on("torch", "tells of a processor in another way", "trainers/base_config.py"):
        assert isinstance(torch.cpu._is_avx512_bf16_supported(), bool)
        assert isinstance(torch.cpu._is_amx_tile_supported(), bool)


def test_many_tensors_are_multiplied_by_one():
    with relied_on("torch", "multiplies lists of tensors in another way", "trainers/early_gradients.py"):
        products = torch._foreach_mul([torch.ones(2), torch.ones(3)], torch.tensor(2.0))
        assert [x.tolist() for x in products] == [[2, 2], [2, 2, 2]]


# --- names inside the stock models -----------------------------------------------------------------------------------

STOCK = {
    "ViTModel": ("layernorm", "o_proj"),
    "DeiTModel": ("layernorm", "o_proj"),
    "IJepaModel": ("layernorm", "o_proj"),
    "Dinov2Model": ("layernorm", "o_proj"),
    "Dinov2WithRegistersModel": ("layernorm", "o_proj"),
    "DINOv3ViTModel": ("norm", "o_proj"),
    "CLIPVisionModel": ("post_layernorm", "out_proj"),
    "SiglipVisionModel": ("post_layernorm", "out_proj"),
    "Siglip2VisionModel": ("post_layernorm", "out_proj"),
}


@pytest.mark.parametrize("name", STOCK)
def test_modules_of_a_stock_model_have_their_names(name):
    """By the class and its source alone: a model is only built once these hold, by the tests of the families."""
    import transformers

    model_class = getattr(transformers, name)
    last_norm, output = STOCK[name]
    with relied_on("transformers", f"renamed modules of {name}", "modeling_adala/{mixins,families}.py"):
        source = inspect.getsource(importlib.import_module(model_class.__module__))
        for module in ("q_proj", "k_proj", "v_proj", output):
            assert f"self.{module} = nn.Linear(" in source, module
        assert f"self.{last_norm} = " in source, last_norm
        assert "ALL_ATTENTION_FUNCTIONS.get_interface(" in source, "attention is not looked up"


# --- one place -------------------------------------------------------------------------------------------------------


def third_party(node: ast.AST) -> list[str]:
    """Dotted names of what a statement imports from another package."""
    if isinstance(node, ast.ImportFrom) and node.level == 0:
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


def is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def test_every_name_of_the_upstream_files_is_looked_at_here():
    public = {"torch", "transformers.AttentionInterface", "transformers.PretrainedConfig"}
    nodes = [node for path in UPSTREAM for node in ast.walk(ast.parse(path.read_text()))]
    found = {name for node in nodes for name in third_party(node)}
    found = {name for name in found if name.partition(".")[0] not in sys.stdlib_module_names}
    assert len(found) > 20
    # a module is imported whole to change a name of it
    assert not [name for name in found - public if not any(f"{known}.".startswith(f"{name}.") for known in NAMES)]


def test_private_names_are_used_in_the_upstream_files_alone():
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py") if path.name != "upstream.py"]
    nodes = [(path, node) for path in files for node in ast.walk(ast.parse(path.read_text()))]
    ours = set()
    for _, node in nodes:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            ours.add(node.name)
        elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
            ours.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    # used with the stock classes that they belong to
    in_place = {"accelerate.utils.get_int_from_env", "huggingface_hub.dataclasses.strict"}
    in_place |= {"transformers.backbone_utils.BackboneConfigMixin", "transformers.backbone_utils.BackboneMixin"}
    outside = set()
    for path, node in nodes:
        if isinstance(node, ast.Attribute):
            found = [node.attr] if is_private(node.attr) and node.attr not in ours | ATTRIBUTES else []
        else:
            found = [name for name in third_party(node) if is_private(name) or name in NAMES.keys() - in_place]
        outside |= {f"{path.relative_to(ROOT)}: {name}" for name in found if not name.startswith(PACKAGES)}
    assert not outside, f"private API of other libraries belongs into upstream.py of its package: {sorted(outside)}"
