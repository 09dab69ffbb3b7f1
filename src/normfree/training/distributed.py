"""A model of which each process holds a part (FSDP2), and its states, which are those of one process when written.

accelerate's own FSDP is not used: it is silently left out on a CPU, computes norms and residual stream in half
precision, and writes other checkpoints. Here the arithmetic is that of one process, and so are the files.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from normfree.errors import InputError
from normfree.modeling import NormfreeConfig
from normfree.modeling.decoder_blocks import decoder_blocks
from normfree.processes import is_main_process, n_processes
from normfree.training.objectives import Objective
from normfree.training.recipe import Recipe
from normfree.training.run_config import RunConfig


def averaging(model: nn.Module, recipe: Recipe, device: torch.device) -> nn.Module:
    """``model`` as training calls it: with DDP around it where every process holds all of it."""
    if n_processes() == 1 or recipe.is_sharded:
        return model
    return DistributedDataParallel(model, device_ids=None if device.type == "cpu" else [device])


def check_sharding(config: RunConfig, model: NormfreeConfig, objective: Objective | None) -> None:
    """Checks that a run can be sharded.

    Raises:
        InputError: it cannot, and why.
    """
    reasons = {
        "lora, whose adapters are merged into whole weights": config.lora is not None,
        "an objective that learns parameters of its own": objective is not None and len(objective.learned) > 0,
        "one slope for all layers (model.slope_sharing global), which belongs to no layer": (
            model.slope_sharing == "global"
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise InputError(f"recipe.sharding full does not go with {reason}; set recipe.sharding to none")


def shard(model: nn.Module) -> None:
    """Shards ``model`` over all processes, in place: block by block, and all that is not in a block as one unit.

    A block's weights are gathered for its forward and backward pass and freed after each. The rest (embeddings, final
    norm, unembedding) stays gathered between the two. Weights and gradients are sent in their own precision.
    """
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    mesh = init_device_mesh(device.type, (n_processes(),))
    for block in decoder_blocks(model).values():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole_model_state(model: nn.Module) -> dict[str, Any]:
    """``model.state_dict()`` with whole tensors on the CPU in the main process, empty in the others. Collective.

    Tied weights are in it once, as transformers writes them.
    """
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    own_names = {name for name, _ in model.named_parameters()}
    second_names = {name for name, _ in model.named_parameters(remove_duplicate=False)} - own_names
    return {name: value for name, value in state.items() if name not in second_names}


def load_whole_model(model: nn.Module, state: dict[str, Any]) -> Any:
    """Sets ``model`` to ``state``, of which this process takes its part; returns missing and unexpected keys."""
    return set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, strict=False))


def whole(tensor: Tensor) -> Tensor:
    """All of ``tensor``, in every process. Collective where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """This process's part of ``tensor``: all of it if not sharded, possibly empty if sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """``optimizer.state_dict()`` as one process has it, with whole tensors on the CPU. Collective.

    Tensors are gathered one after the other; only the main process keeps them, and the others return an empty state.
    """
    content: dict[str, Any] = optimizer.state_dict()
    state: dict[int, dict[str, Any]] = {}
    for index, values in content["state"].items():
        tensors = {name: whole(value) if isinstance(value, Tensor) else value for name, value in values.items()}
        if is_main_process():
            state[index] = {
                name: value.cpu() if isinstance(value, Tensor) else value for name, value in tensors.items()
            }
    return {**content, "state": state}


def load_whole_optimizer_state(optimizer: torch.optim.Optimizer, content: dict[str, Any]) -> None:
    """Sets ``optimizer`` to this process's part of a state of whole tensors."""
    parameters = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    indices: Iterable[int] = chain.from_iterable(group["params"] for group in content["param_groups"])
    state: dict[int, dict[str, Any]] = {}
    for index, parameter in zip(indices, parameters, strict=True):
        values = content["state"].get(index, {})
        state[index] = {name: _sharded_like(parameter, value) for name, value in values.items()}
    optimizer.load_state_dict({**content, "state": state})


def _sharded_like(parameter: Tensor, value: Any) -> Any:
    """``value`` sharded as ``parameter`` is, if it has the parameter's shape."""
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
