"""Model cards from recorded facts, and the push to the Hub. Needs `huggingface_hub` and `jinja2`, too."""

from .card import build_card, write_card
from .card_data import AdaLACardData
from .push import PushPlan, plan_push, push

__all__ = ["AdaLACardData", "PushPlan", "build_card", "plan_push", "push", "write_card"]
