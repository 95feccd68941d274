"""Recipes by name: settings that a recipe starts from, and that its own settings override."""

from typing import Any

# "default" is what the configuration classes have as defaults
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    # ViT-AdaLA (arXiv 2603.16063): plain linear attention in all layers, and the final features alone
    "paper": {
        "feature_map": "elu",
        "local_mixing": 0,
        "feature_alignment": {"hidden_states": []},
    },
}


def with_preset(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings on top of those of the preset that `settings["recipe"]` names, section by section."""
    merged = dict(PRESETS[settings.get("recipe", "default")])
    for name, value in settings.items():
        under = merged.get(name)
        merged[name] = {**under, **value} if isinstance(under, dict) and isinstance(value, dict) else value
    return merged
