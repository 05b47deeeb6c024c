"""Muon and AdamW as one optimizer: the same steps as the two apart, one schedule for both, restorable."""

import copy

import torch
from torch.optim import AdamW, Muon
from torch.optim.lr_scheduler import LambdaLR

from tests.support.models import tiny_model
from tw_recipes.pipelines.optimizer import MuonAdamW

IDS = torch.arange(1, 13)[None]


def _step(model: torch.nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad()
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    for optimizer in optimizers:
        optimizer.step()


def _parameters(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_steps_are_those_of_the_two_apart_under_one_schedule() -> None:
    model, twin = tiny_model(), tiny_model()
    joint = MuonAdamW(model, muon_lr=0.02, adamw_lr=1e-3, weight_decay=0.1)
    outer = ("embed_tokens", "lm_head", "norm")
    inner = [p for name, p in twin.named_parameters() if not any(word in name for word in outer)]
    rest = [p for name, p in twin.named_parameters() if any(word in name for word in outer)]
    assert inner
    assert rest
    apart = (
        Muon(inner, lr=0.02, momentum=0.95, weight_decay=0.1),
        AdamW(rest, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1),
    )
    schedules = [LambdaLR(optimizer, lambda step: 1 / (step + 1)) for optimizer in (joint, *apart)]
    for _ in range(3):
        _step(model, joint)
        _step(twin, *apart)
        for schedule in schedules:
            schedule.step()
    torch.testing.assert_close(_parameters(model), _parameters(twin), rtol=0, atol=0)


def test_a_restored_optimizer_goes_on_the_same_way() -> None:
    model = tiny_model()
    optimizer = MuonAdamW(model)
    _step(model, optimizer)
    twin = copy.deepcopy(model)
    restored = MuonAdamW(twin)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for group in (*optimizer.param_groups, *restored.param_groups):
        group["lr"] *= 0.5
    _step(model, optimizer)
    _step(twin, restored)
    torch.testing.assert_close(_parameters(model), _parameters(twin), rtol=0, atol=0)
