"""Features of teacher and student compared, on the student's own forward pass.

Three views of the same frozen features: how close they are (cosine and relative error per token group), whether images
of a class stay neighbors (k-NN on the CLS token), and whether the classes stay linearly separable (linear probe).
"""

import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import evaluate
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from modeling_adala.conversion.loading import load_teacher
from modeling_adala.errors import AdaLAError, DataError, UsageError
from modeling_adala.inspection.towers import eval_mode, forward_features, token_groups

from ..data.image_dataset import collate_images
from ..upstream import extract_model_from_parallel
from .metrics import Accuracy, FeatureCosine, FeatureRelativeError, KNNAccuracy

Batches = Iterable[dict[str, Any]]


@dataclass
class FeatureBank:
    """Features of a dataset, on the CPU, one row per image.

    Args:
        cls (`Tensor`): Final CLS features `(n, dim)`, float32.
        patch_mean (`Tensor`): Mean over the final patch features `(n, dim)`, float32.
        labels (`Tensor`, *optional*): Labels `(n,)`, int64; `None` if the data has no label per image.
    """

    cls: Tensor
    patch_mean: Tensor
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.cls)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the Transformers model inside DDP, FSDP, `torch.compile` and PEFT wrappers; adapters stay active."""
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    return cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model


def extract_features(
    model: nn.Module,
    dataloader: Batches,
    *,
    autocast_dtype: torch.dtype | None = None,
    description: str = "features",
    disable_progress: bool | None = None,
) -> FeatureBank:
    """Run a model over a dataset and keep its pooled features.

    Args:
        model (`nn.Module`): Runs in eval mode without gradients; its modes are restored afterwards.
        dataloader (`Iterable`): Batches with `pixel_values` `(batch, channels, height, width)` and optional `labels`.
        autocast_dtype (`torch.dtype`, *optional*): Such as `torch.bfloat16`. Default: no autocast.
        description (`str`, *optional*, defaults to `"features"`): Name on the progress bar.
        disable_progress (`bool`, *optional*): Default: a progress bar only in a terminal.

    Returns:
        [`FeatureBank`].

    Raises:
        DataError: If there are no batches, or one has no `pixel_values`.
        AdaLAError: If the features hold nan or infinity.
    """
    groups, bank = token_groups(unwrap(model).config), _BankBuilder()
    with evaluating(model):
        for batch in tqdm(dataloader, desc=description, disable=disable_progress, leave=False):
            bank.add(features_of(model, batch, autocast_dtype), groups, batch.get("labels"))
    return bank.build(description)


def compare_features(
    teacher: nn.Module,
    student: nn.Module,
    dataloader: Batches,
    *,
    autocast_dtype: torch.dtype | None = None,
    description: str = "teacher beside student",
    disable_progress: bool | None = None,
) -> tuple[dict[str, float], FeatureBank, FeatureBank]:
    """Run teacher and student on the same batches and compare all their tokens, keeping only the pooled ones.

    Args:
        teacher (`nn.Module`): Runs like `student`, in eval mode without gradients. May be on another device.
        student (`nn.Module`): A model with the same tokens and width.
        dataloader (`Iterable`): As for [`extract_features`], with the other arguments.

    Returns:
        The metrics and the banks of teacher and student. For each token group (`cls`, `patches`, `registers` if any)
        `<group>_cosine`, the mean over tokens, and `<group>_relative_error`, the norm of all differences over the norm
        of all teacher tokens; `patch_mean_cosine` of the mean patch per image; `relative_error` over all tokens.

    Raises:
        UsageError: If the features of the student have another shape.
        DataError, AdaLAError: As [`extract_features`].

    Example:

    ```python
    results, *_ = compare_features(teacher, student, data.loader(data.eval_dataset(32)))
    ```
    """
    groups = token_groups(unwrap(teacher).config)
    distances = {name: evaluate.combine([FeatureCosine(), FeatureRelativeError()]) for name in groups}
    overall = FeatureRelativeError()
    teacher_bank, student_bank = _BankBuilder(), _BankBuilder()
    with evaluating(teacher, student):
        for batch in tqdm(dataloader, desc=description, disable=disable_progress, leave=False):
            expected = features_of(teacher, batch, autocast_dtype)
            actual = features_of(student, batch, autocast_dtype).to(expected.device)
            if actual.shape != expected.shape:
                raise UsageError(
                    f"the student gives features {tuple(actual.shape)} but the teacher {tuple(expected.shape)};"
                    " compare a student with the teacher that it was converted from."
                )
            for name, where in groups.items():
                distances[name].add_batch(predictions=actual[:, where], references=expected[:, where])
            overall.add_batch(predictions=actual, references=expected)
            teacher_bank.add(expected, groups, batch.get("labels"))
            student_bank.add(actual, groups, batch.get("labels"))
    banks = teacher_bank.build("the teacher"), student_bank.build("the student")

    metrics = {f"{name}_{key}": value for name, pair in distances.items() for key, value in pair.compute().items()}
    pooled = FeatureCosine().compute(predictions=banks[1].patch_mean, references=banks[0].patch_mean)
    return {**metrics, "patch_mean_cosine": pooled["cosine"], **overall.compute()}, *banks


class FeatureEvaluator:
    """Evaluator for stages 1 and 2: the student's final features beside the teacher's, by `compare_features`.

    Args:
        teacher (`str` or `PreTrainedModel`): The teacher; a model is frozen in place.
        dataset (`Dataset`): Evaluation images, items with `pixel_values`.
        num_images (`int`, *optional*, defaults to 256): How many of them, spread over the dataset.
        batch_size (`int`, *optional*, defaults to 32): Images at a time.

    Example:

    ```python
    trainer = FeatureAlignmentTrainer(
        model=student,
        teacher_model=teacher,
        args=FeatureAlignmentConfig(eval_strategy="steps", eval_steps=100),
        train_dataset=data.train_dataset(seed=0),
        eval_dataset=data.eval_dataset(),
        evaluator=FeatureEvaluator(teacher, data.eval_dataset()),  # logs eval_patches_cosine and others
    )
    ```
    """

    def __init__(
        self, teacher: str | PreTrainedModel, dataset: Any, *, num_images: int = 256, batch_size: int = 32
    ) -> None:
        self.teacher = load_teacher(teacher)
        # many datasets are sorted by class
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:num_images].sort().values
        self.loader = DataLoader(Subset(dataset, order.tolist()), batch_size=batch_size, collate_fn=collate_images)

    def __call__(self, student: nn.Module) -> dict[str, float]:
        self.teacher.to(next(student.parameters()).device)
        return compare_features(self.teacher, student, self.loader, disable_progress=True)[0]


def linear_probe(train: FeatureBank, test: FeatureBank, *, max_iter: int = 300, tol: float = 1e-3) -> float:
    """Return the accuracy on `test` of logistic regression on `train`, on standardized CLS and mean patch features.

    Deterministic; 2 to 7 seconds on 2 CPU cores for 5,000 images of width 768.

    Args:
        train (`FeatureBank`): With labels.
        test (`FeatureBank`): With labels.
        max_iter (`int`, *optional*, defaults to 300): Most L-BFGS iterations.
        tol (`float`, *optional*, defaults to 1e-3): Largest gradient entry at which it stops earlier.

    Returns:
        `float` between 0 and 1.

    Raises:
        UsageError: If a bank has no labels.
    """
    # Imported here because it takes a second, which every import of the trainers would pay.
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if train.labels is None or test.labels is None:
        raise UsageError(
            "train, test: a linear probe needs FeatureBanks with labels, from batches with 'labels' (n,)."
        )
    if train.labels.unique().numel() == 1:
        # sklearn refuses a single class; there is only one thing that a classifier could answer.
        predicted = train.labels[:1].expand(len(test))
        return Accuracy().compute(predictions=predicted, references=test.labels)["accuracy"]
    inputs = [torch.cat([bank.cls, bank.patch_mean], dim=1).double().numpy() for bank in (train, test)]
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=max_iter, tol=tol))
    with warnings.catch_warnings():
        # Stopping at max_iter is what bounds the time.
        warnings.simplefilter("ignore", ConvergenceWarning)
        probe.fit(inputs[0], train.labels.numpy())
    return Accuracy().compute(predictions=probe.predict(inputs[1]), references=test.labels)["accuracy"]


def evaluate_pair(
    teacher: nn.Module,
    student: nn.Module,
    train_loader: Batches | None,
    eval_loader: Batches,
    *,
    autocast_dtype: torch.dtype | None = None,
    k: int = 20,
    probe: bool = True,
    teacher_train_bank: FeatureBank | None = None,
    disable_progress: bool | None = None,
) -> dict[str, Any]:
    """Return all comparisons of a student with its teacher.

    Args:
        teacher (`nn.Module`): Stock softmax model.
        student (`nn.Module`): Model converted from it.
        train_loader (`Iterable`, *optional*): Labeled images that k-NN and probe learn from. `None` skips both, and so
            do data without one label per image.
        eval_loader (`Iterable`): Images to evaluate on, batches as for [`extract_features`].
        autocast_dtype (`torch.dtype`, *optional*): Of both models.
        k (`int`, *optional*, defaults to 20): Neighbors for k-NN.
        probe (`bool`, *optional*, defaults to `True`): Whether to fit the linear probes.
        teacher_train_bank (`FeatureBank`, *optional*): `extract_features(teacher, train_loader)` from before, so that
            several students can share one pass of the teacher.
        disable_progress (`bool`, *optional*): Default: progress bars only in a terminal.

    Returns:
        Flat dictionary of numbers: those of [`compare_features`], `{teacher,student}_knn_accuracy`, `knn_retention`
        (student over teacher, `None` if the teacher is at 0), `{teacher,student}_linear_probe_accuracy`,
        `num_train_images`, `num_eval_images`, `seconds`.

    Raises:
        UsageError, DataError, AdaLAError: As [`compare_features`] and [`linear_probe`].

    Example:

    ```python
    train, test = data.loader(data.bank_dataset(64)), data.loader(data.eval_dataset(32))
    results = evaluate_pair(teacher, student, train, test, probe=False)
    ```
    """
    start = time.perf_counter()
    options: dict[str, Any] = {"autocast_dtype": autocast_dtype, "disable_progress": disable_progress}
    metrics, *eval_banks = compare_features(teacher, student, eval_loader, **options)
    results: dict[str, Any] = {**metrics, "num_train_images": 0, "num_eval_images": len(eval_banks[0])}
    if train_loader is not None and eval_banks[0].labels is not None:
        student_bank = extract_features(student, train_loader, description="student, training images", **options)
        if student_bank.labels is not None:
            if teacher_train_bank is None:
                description = "teacher, training images"
                teacher_train_bank = extract_features(teacher, train_loader, description=description, **options)
            elif teacher_train_bank.labels is None:
                raise UsageError("teacher_train_bank has no labels; extract it from batches with 'labels' (n,).")
            train_banks = teacher_train_bank, student_bank
            for name, train, test in zip(("teacher", "student"), train_banks, eval_banks, strict=True):
                knn = KNNAccuracy(train.cls, train.labels, k=k).compute(predictions=test.cls, references=test.labels)
                results[f"{name}_knn_accuracy"] = knn["knn_accuracy"]
                if probe:
                    results[f"{name}_linear_probe_accuracy"] = linear_probe(train, test)
            reached, possible = results["student_knn_accuracy"], results["teacher_knn_accuracy"]
            results.update(
                knn_retention=reached / possible if possible > 0 else None, num_train_images=len(student_bank)
            )
    results["seconds"] = time.perf_counter() - start
    return results


class _BankBuilder:
    """Pooled features, collected batch by batch."""

    def __init__(self) -> None:
        self.cls: list[Tensor] = []
        self.patch_mean: list[Tensor] = []
        self.labels: list[Tensor] = []

    def add(self, features: Tensor, groups: dict[str, slice], labels: Tensor | None) -> None:
        self.cls.append(features[:, groups.get("cls", groups["patches"])].mean(dim=1).float().cpu())
        self.patch_mean.append(features[:, groups["patches"]].mean(dim=1).float().cpu())
        if isinstance(labels, Tensor) and labels.ndim == 1 and not labels.is_floating_point():
            self.labels.append(labels.cpu().long())

    def build(self, name: str) -> FeatureBank:
        if not self.cls:
            raise DataError(f"the data loader for {name} gave 0 batches; pass a dataset with images (drop_last off).")
        cls, patch_mean = torch.cat(self.cls), torch.cat(self.patch_mean)
        if not (cls.isfinite().all() and patch_mean.isfinite().all()):
            raise AdaLAError(
                f"{name} gives features that hold nan or infinity; it diverged in training, or overflows float16."
            )
        return FeatureBank(cls, patch_mean, torch.cat(self.labels) if len(self.labels) == len(self.cls) else None)


def features_of(model: nn.Module, batch: dict[str, Any], autocast_dtype: torch.dtype | None = None) -> Tensor:
    """Return the final features of a batch, `(batch, tokens, hidden_size)`, in float32 or float64."""
    if "pixel_values" not in batch:
        raise DataError(f"a batch has {sorted(batch)} but no 'pixel_values'; check the transform and collator.")
    weight = next(model.parameters())
    autocast: AbstractContextManager = nullcontext()
    if autocast_dtype is not None:
        autocast = torch.autocast(weight.device.type, dtype=autocast_dtype)
    with autocast:
        features = forward_features(unwrap(model), batch["pixel_values"].to(weight.device, weight.dtype))
    return features if features.dtype == torch.float64 else features.float()


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put models into eval mode, without gradients, for a while."""
    with ExitStack() as modes, torch.no_grad():
        for model in models:
            modes.enter_context(eval_mode(model))
        yield
