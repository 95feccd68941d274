"""Settings that every test shares.

    HF_HUB_OFFLINE=1 .venv/bin/python -m pytest

That is what `make test` runs. No test needs the network, an accelerator or a file outside the repository.
"""

import gc
import os
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

# Read once, when the libraries are imported, hence before any import below.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import pytest
import torch

# Without CUDA all runs on the CPU; Apple's MPS is left out because it has no float64, which the oracle needs.
if not torch.cuda.is_available():
    os.environ["ACCELERATE_USE_CPU"] = "true"

# Tiny tensors lose more by waiting for a second thread than they gain, above all on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Same numbers whichever tests ran before."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def frozen_libraries() -> None:
    """Trainers collect garbage, which takes half a second where so much is imported: what is there is left out."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def short_reports() -> Iterator[None]:
    """Reports measure the smallest image size alone, and not for 20 seconds; their pictures are coarse."""
    from trainers.report import pictures, report

    def save_coarse(figure: Any, path: Path, **kwargs: Any) -> None:
        save_figure(figure, path, **kwargs | {"dpi": 30})

    save_figure = pictures.save_figure
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "measure_speed", partial(report.measure_speed, budget=0.0))
        for module in (pictures, report):
            patch.setattr(module, "save_figure", save_coarse)
        yield


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # of pytest-xdist: files with many tests first, however short they are


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that what is left for the end is short and all processes end at once."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (-slow[item.path], -tests[item.path]))
