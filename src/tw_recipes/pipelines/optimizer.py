"""Muon for the matrices inside the layers, AdamW for everything else, as one optimizer for a Trainer."""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import AdamW, Muon, Optimizer


class MuonAdamW(Optimizer):
    """Two optimizers that step together; the learning-rate schedule scales both.

    Args:
        model: A causal language model; its embeddings, head and vectors (norms, biases) go to AdamW.
        muon_lr: Learning rate of Muon.
        adamw_lr: Learning rate of AdamW.
        weight_decay: Of both.
    """

    def __init__(self, model: nn.Module, *, muon_lr: float = 0.02, adamw_lr: float = 4e-3, weight_decay: float = 0.01):
        outer = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        inner = [parameter for parameter in trained if parameter.ndim == 2 and id(parameter) not in outer]
        chosen = {id(parameter) for parameter in inner}
        rest = [parameter for parameter in trained if id(parameter) not in chosen]
        self.parts: tuple[Optimizer, ...] = (
            Muon(inner, lr=muon_lr, momentum=0.95, weight_decay=weight_decay),
            AdamW(rest, lr=adamw_lr, betas=(0.9, 0.95), weight_decay=weight_decay),
        )
        super().__init__([{"params": inner}, {"params": rest}], {})
        # The schedule writes into the groups of the parts themselves.
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Step both; `closure` is evaluated once."""
        loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The states of both."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore both; the groups stay those that a schedule writes into."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]
