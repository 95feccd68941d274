"""What the losses of stages 1 and 2 are relative to does not hang on the order of the data."""

from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset, IterableDataset
from training_helpers import QUIET, copy_state, tiny_dinov2

from modeling_adala import convert
from trainers.runs.stages import STAGES

ATTENTION, FEATURES, _ = STAGES
CLASSES, OF_EACH = 8, 64


class ClassImages(Dataset):
    """Images of classes that look nothing like each other, in the order given."""

    def __init__(self, order: list[int]):
        generator = torch.Generator().manual_seed(0)
        patterns = 2 * torch.randn(CLASSES, 1, 28, 28, generator=generator)
        noise = 0.3 * torch.randn(CLASSES * OF_EACH, 1, 28, 28, generator=generator)
        images = patterns.repeat_interleave(OF_EACH, dim=0) + noise
        self.images, self.read = images[order], []

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        self.read.append(int(index))
        return {"pixel_values": self.images[index]}


class Stream(IterableDataset):
    """With a length, as some streams have."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self):
        return (self.dataset[index] for index in range(len(self.dataset)))


SORTED = list(range(CLASSES * OF_EACH))
SHUFFLED = torch.randperm(CLASSES * OF_EACH, generator=torch.Generator().manual_seed(1)).tolist()


def trainer_of(stage: str, folder: Path, dataset, **settings):
    teacher = tiny_dinov2()
    student = convert(teacher, check_parity=False, feature_map="elu")
    settings = QUIET | {"max_steps": 2, "per_device_train_batch_size": 16, "save_strategy": "no"} | settings
    args = STAGES[stage].config_class(output_dir=str(folder), **settings)
    return STAGES[stage].trainer_class(model=student, args=args, teacher_model=teacher, train_dataset=dataset)


def flat(variances: list) -> torch.Tensor:
    return torch.stack([x for part in variances for x in (part.values() if isinstance(part, dict) else [part])])


@pytest.mark.parametrize("stage", [ATTENTION, FEATURES])
def test_sorted_data_give_nearly_the_variances_of_all_the_data(tmp_path, stage):
    every, of_first = (
        flat(trainer_of(stage, tmp_path, data, calibration_images=count).variances())
        for data, count in ((ClassImages(SORTED), len(SORTED)), (ClassImages(SORTED[:OF_EACH]), OF_EACH))
    )
    assert (of_first / every).min() < 0.9  # one class alone would mislead
    for order in (SORTED, SHUFFLED):
        found = flat(trainer_of(stage, tmp_path, ClassImages(order), calibration_images=64).variances())
        torch.testing.assert_close(found, every, rtol=0.08, atol=0)


def test_calibration_images_are_the_same_in_every_process_and_after_training(tmp_path):
    read = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        trainer = trainer_of(FEATURES, tmp_path, ClassImages(SORTED), calibration_images=10)
        list(trainer.calibration_batches())
        read.append(trainer.train_dataset.read)
    trainer.train()
    del trainer.train_dataset.read[:]
    list(trainer.calibration_batches())
    read.append(trainer.train_dataset.read)
    assert read[0] == read[1] == read[2] and len(set(read[0])) == 10
    list(trainer_of(FEATURES, tmp_path, other := ClassImages(SORTED), seed=7).calibration_batches())
    assert other.read[:10] != read[0]


@pytest.mark.parametrize("stage", [ATTENTION, FEATURES])
def test_stream_of_the_users_own_trains(tmp_path, stage):
    """Every torch `IterableDataset` has a `__getitem__`, which raises."""
    stream = Stream(ClassImages(SHUFFLED))
    trainer = trainer_of(stage, tmp_path, stream, calibration_images=20)
    before = copy_state(trainer.model)
    assert torch.equal(torch.cat(list(trainer.calibration_batches())), stream.dataset.images[:20])
    trainer.train()
    assert not all(torch.equal(x, before[name]) for name, x in copy_state(trainer.model).items())


def test_fewer_images_than_asked_for_are_all_taken_once(tmp_path):
    trainer = trainer_of(ATTENTION, tmp_path, ClassImages(SORTED[:5]), calibration_images=64)
    assert sum(len(batch) for batch in trainer.calibration_batches()) == 5
    assert sorted(trainer.train_dataset.read) == [0, 1, 2, 3, 4]
