"""Probes that see the forward passes of a training step and no others."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from normfree.errors import InputError
from normfree.probes.entropy_probe import EntropyProbe
from normfree.probes.forward_passes import module_calls


@contextmanager
def probe_training_step(
    model: nn.Module, parts: Sequence[str] = ("",), *, is_compiled: bool = False
) -> Iterator[dict[str, EntropyProbe]]:
    """EntropyProbes, with counts of non-finite scores, of passes that compute gradients inside the block.

    Passes without gradients (evaluation, generation, a reference policy) do not count, unless the block is entered
    without gradients. Code compiled by ``torch.compile`` runs uncompiled inside.

    Args:
        model: the model that trains.
        parts: names of the modules that get a probe each; "" is the model.
        is_compiled: compiled code surrounds ``model``, which does not show it.

    Yields:
        the probes by the names of their parts.

    Raises:
        InputError: the model has no attention module, or its heads are divided between processes.
    """
    _check_heads_are_whole(model)
    probes = {part: EntropyProbe(model.get_submodule(part), count_nonfinite=True) for part in parts}
    with ExitStack() as stack:
        if _must_run_uncompiled(model, is_compiled=is_compiled):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_GradientPasses(model, list(probes.values())).watch())
        yield probes


class _GradientPasses:
    """Keeps probes active, except in passes that compute no gradients.

    A pass is the outermost call of a module of the model; inside it, reentrant gradient checkpointing runs modules
    without gradients. The hooks are torch's global ones, so the model can be copied and saved in the middle of a step.
    """

    def __init__(self, model: nn.Module, probes: Sequence[EntropyProbe]) -> None:
        self._modules = set(model.modules())
        self._probes = probes
        self._takes_all = not torch.is_grad_enabled()
        self._outermost: nn.Module | None = None
        self._depth = 0
        self._is_suspended = False
        self._active = ExitStack()

    @contextmanager
    def watch(self) -> Iterator[None]:
        with module_calls(self._enter, self._leave), self._active:
            self._activate()
            yield

    def _activate(self) -> None:
        for probe in self._probes:
            self._active.enter_context(probe)

    def _enter(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling() or module not in self._modules:
            return
        if self._outermost is None:
            self._outermost, self._depth = module, 0
            if not (self._takes_all or torch.is_grad_enabled()):
                self._is_suspended = True
                self._active.close()
        if module is self._outermost:
            self._depth += 1

    def _leave(self, module: nn.Module, args: Any, result: Any) -> None:
        if torch.compiler.is_compiling() or module is not self._outermost:
            return
        self._depth -= 1
        if self._depth == 0:
            self._outermost = None
            if self._is_suspended:
                self._is_suspended = False
                self._activate()


def _check_heads_are_whole(model: nn.Module) -> None:
    """Under tensor parallelism, head 0 differs between processes."""
    meshes = [getattr(parameter, "device_mesh", None) for parameter in model.parameters()]  # of DTensors
    divided = any("tp" in (mesh.mesh_dim_names or ()) for mesh in meshes if mesh is not None) or any(
        (getattr(module, "_tp_size", None) or 1) > 1 for module in model.modules()
    )
    if divided:
        raise InputError("tensor parallelism divides its heads between processes, which the probe cannot put together")


def _must_run_uncompiled(model: nn.Module, *, is_compiled: bool) -> bool:
    """True if there may be compiled code: there is none before torch's compiler is imported.

    Models with flex attention, itself compiled, are read as they are: uncompiled it would build the T×T matrix.
    """
    if "torch._dynamo" not in sys.modules:
        return False
    shows_it = any(
        type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None
        for module in model.modules()
    )
    uses_flex = any(
        getattr(getattr(module, "config", None), "_attn_implementation", None) == "flex_attention"
        for module in model.modules()
    )
    return is_compiled or shows_it or not uses_flex
