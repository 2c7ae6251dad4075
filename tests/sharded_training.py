"""Run by test_training.py under torchrun: three steps with whole and with sharded parameters, and three more from their states."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_model_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dit.models import DiT
from tstitch.training import EMA, FULL, full_state


def train(sharded: bool, steps: int = 3, start: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    """Weights, moving average and optimizer state after `steps`; with `start`, training begins at its weights and optimizer state."""
    torch.manual_seed(0)
    model = DiT(input_size=8, hidden_size=32, depth=2, num_heads=2, num_classes=4, class_dropout_prob=0.0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    if sharded:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer, ema = torch.optim.AdamW(model.parameters(), lr=1e-2), EMA(model, 0.9)
    if start:
        whole = StateDictOptions(full_state_dict=True)
        set_model_state_dict(model, start[0], options=whole)
        set_optimizer_state_dict(model, optimizer, start[2], options=whole)
    for step in range(steps):
        x = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(step))
        model(x, torch.tensor([1, 50, 400, 900]), torch.arange(4)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model, step)
    with ema.lent_to(model):
        average = full_state(model)
    return [full_state(model), average, get_optimizer_state_dict(model, optimizer, options=FULL)]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts agree to rounding."""
    return a.keys() == b.keys() and all((a[name] - b[name]).abs().max() < 1e-5 for name in a)


dist.init_process_group("gloo")
whole, sharded = train(False), train(True)
states = [whole, sharded]  # full states are on rank 0 alone
dist.broadcast_object_list(states, 0)
longer, resumed = (train(k == 1, start=copy.deepcopy(state)) for k, state in enumerate(states))
if dist.get_rank() == 0:
    print(same(whole[0], sharded[0]), same(whole[1], sharded[1]), same(resumed[0], longer[0]), not same(longer[0], whole[0]))
dist.destroy_process_group()
