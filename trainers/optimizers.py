"""Muon for the weight matrices of the blocks, AdamW for everything else, as one optimizer."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer


class MuonWithAdamW(Optimizer):
    """Two stock optimizers behind one interface, so that schedulers, accelerate and checkpoints see a single one.

    `torch.optim.Muon` (arXiv 2502.16982) takes matrices only. With its update scaled to the size of AdamW's, both parts
    share one learning rate.

    Args:
        matrices (`Iterable[nn.Parameter]`): 2-D weights, for Muon.
        others (`list[dict]`): Parameter groups for AdamW.
        lr (`float`): Learning rate of both.
        weight_decay (`float`): Decoupled weight decay of Muon; AdamW's is in its groups.
        kwargs: For AdamW, such as `betas` and `eps`.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: list[dict[str, Any]],
        lr: float,
        weight_decay: float = 0.0,
        **kwargs: Any,
    ):
        muon = Muon(list(matrices), lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        others = [group for group in others if group["params"]]
        self.parts: list[Optimizer] = [muon, *([AdamW(others, lr=lr, fused=True, **kwargs)] if others else [])]
        # The base class would build its own groups: they have to be the very dictionaries of the two parts, because
        # that is where a scheduler writes the learning rate.
        self.defaults: dict[str, Any] = {"lr": lr}
        self._link()
        super().__setstate__({})

    def _link(self) -> None:
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        self.state = self.parts[0].state

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._link()


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], set[int]]:
    """The trainable weight matrices inside the blocks, and the ids of those parameters."""
    matrices = [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "layer" in name and module.weight.requires_grad
    ]
    return matrices, {id(parameter) for parameter in matrices}
