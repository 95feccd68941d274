"""How a module of a stock model gets another way to run: a class in front of its own, and a look at its weights.

This file travels with the weights (`trust_remote_code`): torch, transformers and flat siblings only.
"""

import functools
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


def put_in_front(override: Any, module: Any) -> None:
    """Makes `module` an instance of `override` and of its own class, in this order. Once is enough.

    Not an attribute that holds a function: replicas of `nn.DataParallel` and deep copies would share it, with its
    reference to the original module.
    """
    if not isinstance(module, override):
        stock: Any = type(module)
        module.__class__ = _combined(override, stock)


def take_away(override: Any, module: Any) -> None:
    """Undoes `put_in_front`."""
    if isinstance(module, override):
        module.__class__ = type(module).__bases__[1]


@functools.cache
def _combined(override: Any, stock: Any) -> Any:
    # under the stock name, by which `_no_split_modules`, wrapping policies and people know it
    namespace = {"__module__": stock.__module__, "__doc__": stock.__doc__, "__reduce_ex__": _reduce}
    return type(stock.__name__, (override, stock), namespace)


def _reduce(self, protocol):
    return _rebuild, type(self).__bases__, self.__dict__  # pickle could not find a class made here by its name


def _rebuild(override: Any, stock: Any) -> Any:
    combined = _combined(override, stock)
    return combined.__new__(combined)


class Snapshot:
    """Of which tensors, with which values, something was computed.

    Sees optimizer steps, `load_state_dict`, `copy_` and all else that PyTorch counts as a change in place, another
    parameter, dtype or device, and `parameter.data = ...`. Does not see `parameter.data.copy_(...)` and the like,
    which PyTorch does not count.
    """

    def __init__(self, tensors: Iterable[Tensor | None]):
        # held on to, so that no other tensor can come to lie at the same address
        self.tensors = [None if x is None else x.detach() for x in tensors]
        self.states = [_state(x) for x in self.tensors]

    def is_of(self, tensors: Iterable[Tensor | None]) -> bool:
        """Whether these are the same tensors with the same values."""
        return [_state(x) for x in tensors] == self.states

    def __reduce__(self):
        return Snapshot, ((),)  # copies and pickles of a model have other tensors


def _state(x: Tensor | None) -> tuple | None:
    return None if x is None else (x.data_ptr(), x._version, x.dtype, x.device, x.shape)


def is_plain(x: Tensor) -> bool:
    """Whether a `Snapshot` tells the truth of `x`: an ordinary parameter, neither sharded, fake, transformed nor
    quantized, and not made in inference mode, where PyTorch counts no changes."""
    return type(x) is nn.Parameter and not x.is_inference()
