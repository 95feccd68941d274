"""Two processes that share every weight by FSDP2 (blocks and root wrapped) compute the gradients of one process.

accelerate 1.15 has no FSDP on a CPU, so that `fully_shard` is called here as accelerate calls it, and what is run is a
step of each trainer, not `train`.
"""

import copy
import tempfile
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from training_helpers import NoiseImages, assert_same_tensors, tiny_dinov2, tiny_vit

from modeling_adala import UsageError, convert
from modeling_adala.conversion.loading import load_student
from modeling_adala.inspection.towers import transformer_blocks
from trainers import (
    AttentionAlignmentConfig,
    AttentionAlignmentTrainer,
    FeatureAlignmentConfig,
    FeatureAlignmentTrainer,
    SupervisedConfig,
    SupervisedTrainer,
)
from trainers.base_trainer import AdaLATrainer

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
PROCESSES, IMAGES = 2, 4
CASES = ("attention", "attention, own o_proj", "feature", "feature, checkpointed", "supervised", "supervised, teacher")


def trainer_of(case: str, folder: Path) -> AdaLATrainer:
    """A trainer of the stage with a student that differs from its teacher, the same in every process."""
    teacher = tiny_vit() if case.startswith("supervised") else tiny_dinov2()
    student = convert(teacher, check_parity=False)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    if case == "attention":  # the shortcut for an output projection that is the teacher's
        state = {name: value for name, value in teacher.state_dict().items() if ".o_proj." in name}
        student.load_state_dict(state, strict=False)
    if "checkpointed" in case:
        student.gradient_checkpointing_enable()
    settings = {"output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 1}
    images = NoiseImages(IMAGES)
    if case.startswith("attention"):
        return AttentionAlignmentTrainer(
            student, teacher, AttentionAlignmentConfig(**settings, calibration_images=4), train_dataset=images
        )
    if case.startswith("feature"):
        return FeatureAlignmentTrainer(
            student, teacher, FeatureAlignmentConfig(**settings, calibration_images=4), train_dataset=images
        )
    if "teacher" in case:  # features are compared relative to their variance in the batch, which is another one
        args = SupervisedConfig(**settings, teacher_logits_weight=2.0, teacher_features_weight=0.0)
        return SupervisedTrainer(student, args, teacher_model=teacher, train_dataset=images)
    return SupervisedTrainer(student, SupervisedConfig(**settings), train_dataset=images)


def gradients_of(trainer: AdaLATrainer, first: int, count: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of `count` images and the gradients that it leaves, whole."""
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(first, first + count)])
    model = trainer.model.train()
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    trainer._check_gradients(model)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return loss.detach(), {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in gradients.items()}


def shard(model: nn.Module) -> None:
    for block in transformer_blocks(model):
        fully_shard(block)
    fully_shard(model)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    meeting, here = f"file://{folder}/meeting", Path(folder)
    dist.init_process_group("gloo", meeting, timedelta(seconds=60), world_size=PROCESSES, rank=rank)
    results = {}
    for case in CASES:
        torch.manual_seed(0)
        trainer = trainer_of(case, here / f"run-{rank}")
        whole = copy.deepcopy(trainer.model.state_dict())
        shard(trainer.model)
        share = IMAGES // PROCESSES
        loss, gradients = gradients_of(trainer, rank * share, share)
        dist.all_reduce(loss)
        # the checkpoint is whole, as accelerate gathers it, and goes back into the shards
        gathered = get_model_state_dict(trainer.model, options=StateDictOptions(full_state_dict=True))
        if rank == 0:
            assert_same_tensors(gathered, whole)
        if rank == 0 and case == "feature":
            trainer.model.save_pretrained(here / "saved", state_dict=gathered)
        doubled = {name: 2 * value if value.is_floating_point() else value for name, value in whole.items()}
        set_model_state_dict(trainer.model, dict(doubled), options=StateDictOptions(full_state_dict=True))
        for name, parameter in trainer.model.named_parameters():
            torch.testing.assert_close(parameter.full_tensor(), doubled[name], rtol=0, atol=0)
        results[case] = (loss / PROCESSES, gradients)
    if rank == 0:
        torch.save(results, here / "results.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def sharded():
    """Loss and gradients of each case from two processes, and the folder of a saved student."""
    with tempfile.TemporaryDirectory() as folder:  # forked: the libraries are imported already
        context = torch.multiprocessing.start_processes(
            run_rank, (folder,), nprocs=PROCESSES, join=False, start_method="fork"
        )
        assert context.join(timeout=240) or context.join(timeout=60)
        yield torch.load(Path(folder, "results.pt")), Path(folder, "saved")


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_one_process(case, sharded, tmp_path):
    torch.manual_seed(0)
    loss, gradients = sharded[0][case]
    expected_loss, expected = gradients_of(trainer_of(case, tmp_path), 0, IMAGES)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-4)
    assert gradients.keys() == expected.keys() and len(expected) > 4
    largest = max(value.abs().max() for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(gradients[name], value, rtol=1e-4, atol=1e-4 * largest.item(), msg=name)


def test_softmax_layers_are_not_chosen_in_shards(monkeypatch, tmp_path):
    create = AttentionAlignmentTrainer.create_accelerator_and_postprocess

    def under_fsdp(self):
        create(self)
        self.is_fsdp_enabled = True

    monkeypatch.setattr(AttentionAlignmentTrainer, "create_accelerator_and_postprocess", under_fsdp)
    args = AttentionAlignmentConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, auto_softmax_layers=1)
    teacher = tiny_dinov2()
    with pytest.raises(UsageError, match=r"auto_softmax_layers=1 .* FSDP"):
        AttentionAlignmentTrainer(convert(teacher, check_parity=False), teacher, args, train_dataset=NoiseImages(4))


def test_gathered_checkpoint_opens_as_a_student(sharded, tmp_path):
    torch.manual_seed(0)
    expected = trainer_of("feature", tmp_path).model.state_dict()
    assert_same_tensors(dict(load_student(str(sharded[1])).state_dict()), dict(expected))
