"""A model of which each process holds a part (FSDP2), and its states, which are those of one process when written."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from normfree.probes.residual_stream import decoder_blocks
from normfree.processes import is_main_process, n_processes


def shard(model: nn.Module) -> None:
    """Shares ``model`` out over all processes, in place: block by block, and in one piece what is not in a block.

    A block's weights are gathered when it computes, forward and backward, and let go after it. What is left
    (embeddings, final norm, unembedding) stays gathered between the two passes. Weights and gradients keep their
    precision on the way.
    """
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    mesh = init_device_mesh(device.type, (n_processes(),))
    for block in decoder_blocks(model).values():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole_model_state(model: nn.Module) -> dict[str, Any]:
    """``model.state_dict()`` with whole tensors on the CPU in the main process, empty in the others; all come here.

    Tied weights are in it once, as transformers writes them.
    """
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    own_names = {name for name, _ in model.named_parameters()}
    second_names = {name for name, _ in model.named_parameters(remove_duplicate=False)} - own_names
    return {name: value for name, value in state.items() if name not in second_names}


def load_whole_model(model: nn.Module, checkpoint: Path) -> None:
    """Sets ``model`` to the weights in ``checkpoint``, of which this process takes its part.

    The files are mapped into memory: the processes of a machine read the same pages.
    """
    state: dict[str, Any] = {}
    for path in sorted(checkpoint.glob("model*.safetensors")):
        state |= load_file(path)
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, strict=False))


def whole(tensor: Tensor) -> Tensor:
    """All of ``tensor``, in every process; where it is sharded, all processes have to come here."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of ``tensor``: all of it where it is not sharded, perhaps nothing where it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """``optimizer.state_dict()`` as one process has it: whole tensors, on the CPU.

    All processes have to come here. Only the main process keeps the tensors; the others get them one after the other,
    and have an empty state in the end.
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
    """Sets ``optimizer`` to a state of whole tensors, of which it takes this process's part."""
    parameters = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    indices: Iterable[int] = chain.from_iterable(group["params"] for group in content["param_groups"])
    state: dict[int, dict[str, Any]] = {}
    for index, parameter in zip(indices, parameters, strict=True):
        values = content["state"].get(index, {})
        state[index] = {name: _sharded_like(parameter, value) for name, value in values.items()}
    optimizer.load_state_dict({**content, "state": state})


def _sharded_like(parameter: Tensor, value: Any) -> Any:
    """``value`` shared out as ``parameter`` is, if it has an entry for each of the parameter's."""
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
