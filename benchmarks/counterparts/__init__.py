"""Rival attentions, each from its formula in a file of its own, for evidence and not shipped.

`attach` of interface.py puts one into a student, and our trainers train it as it is.
"""

from .bounds import RandomMixing, Softmax
from .cosformer import CosFormer
from .efficient_attention import EfficientAttention
from .exponential import Exponential
from .focused import Focused
from .inline import InLine
from .interface import Counterpart, attach
from .jetvit import JetViT
from .lolcats import LoLCATs
from .mala import MALA
from .monarch import Monarch
from .nystromformer import Nystromformer
from .performer import Performer
from .polaformer import PolaFormer
from .t5 import T5
from .windowed import Windowed

COUNTERPARTS: dict[str, type[Counterpart]] = {
    "exp": Exponential,
    "performer": Performer,
    "cosformer": CosFormer,
    "efficient": EfficientAttention,
    "focused": Focused,
    "polaformer": PolaFormer,
    "inline": InLine,
    "mala": MALA,
    "nystromformer": Nystromformer,
    "monarch": Monarch,
    "lolcats": LoLCATs,
    "t5": T5,
    "jetvit": JetViT,
    "windowed": Windowed,
    "random": RandomMixing,
    "softmax": Softmax,
}

__all__ = ["COUNTERPARTS", "attach"]
