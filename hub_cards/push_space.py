"""Plans a Hugging Face Space with the demo of a pushed model, for `push` to upload.

The Space runs on the packages of the release that pushes it, which travel as folders next to `app.py`: vit-adala is on
no index yet, and of a repository the build of a Space sees `requirements.txt` alone, so that it could not install a
wheel that lies there.
"""

from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import HfApi, RepoCard
from huggingface_hub.utils import HFValidationError, validate_repo_id

import modeling_adala
from modeling_adala.errors import UsageError

from .push import CARD, PushPlan, plan_files

SPACE = Path(__file__).with_name("space")
FILES = {
    "hub_cards": ("**/*.py", "space/*", "templates/*.jinja"),
    "modeling_adala": ("**/*.py",),
    "trainers": ("**/*.py", "teachers/*/*"),
    "vit_adala": ("**/*.py", "demo/*.css", "recipes/*.yaml"),
}
"""Patterns of the files of each package that travel."""


def plan_space(
    space_id: str, repo_id: str, *, private: bool = False, compare: bool = True, api: HfApi | None = None
) -> PushPlan:
    """Decide what a push of the demo uploads, without changing anything.

    Args:
        space_id (`str`): Name of the Space, `"name"` or `"organization/name"`.
        repo_id (`str`): Model on the Hub that it shows.
        private (`bool`, *optional*, defaults to `False`): Make a new Space private.
        compare (`bool`, *optional*, defaults to `True`): Compare with the Space. `False` needs no network.
        api (`HfApi`, *optional*): Endpoint and token. Default: those of the environment.

    Raises:
        UsageError: For a malformed `space_id`, or `private` on a public Space.
        AdaLAError: If the Hub refuses, fails or cannot be reached.
    """
    try:
        validate_repo_id(space_id)
    except HFValidationError as error:
        raise UsageError(f"space={space_id!r} is not a valid repository name: {error}") from error
    card = RepoCard((SPACE / CARD).read_text(encoding="utf-8"))
    card.data["title"], card.data["models"] = space_id.rpartition("/")[2], [repo_id]
    sources: dict[str, Path | bytes] = {path.name: path for path in SPACE.iterdir() if path.is_file()}
    sources |= dict(_packages()) | {CARD: str(card).encode()}
    notes = [f"{space_id} is private, as is the model: give the Space a token that reads it"] if private else []
    return plan_files(
        sources,
        lambda path: path.partition("/")[0] in FILES,
        compare,
        api or HfApi(),
        repo_type="space",
        repo_id=space_id,
        revision="main",
        private=private,
        card=str(card),
        notes=notes,
    )


def _packages() -> Iterator[tuple[str, Path]]:
    """Yield the files of this installation by their path in the Space."""
    root = Path(modeling_adala.__file__).parents[1]
    for package, patterns in FILES.items():
        for pattern in patterns:
            for path in (root / package).glob(pattern):
                if path.is_file() and "__pycache__" not in path.parts:
                    yield path.relative_to(root).as_posix(), path
