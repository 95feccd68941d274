"""Built-in recipes, by name: `vit-adala run quickstart`."""

from pathlib import Path


def find_recipe(name_or_path: str) -> str:
    """Return the file of a built-in recipe for its name, and any other name or path as it is.

    A local file of that name comes first.
    """
    built_in = {path.stem: path for path in Path(__file__).parent.glob("*.yaml")}
    return name_or_path if Path(name_or_path).exists() else str(built_in.get(name_or_path, name_or_path))
