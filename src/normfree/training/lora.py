"""Fine-tuning with low-rank changes of frozen weights (Hu et al., "LoRA", arXiv 2106.09685), through peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from normfree.errors import InputError
from normfree.files import written_whole
from normfree.modeling import NormfreeForCausalLM

ADAPTERS_FILE = "adapters.safetensors"
BASE = ".base_layer."
"""Where peft puts a module that it adapts: ``q_proj.weight`` is then ``q_proj.base_layer.weight``."""


class LoraOptions(BaseModel):
    """W + (alpha / rank) · B A in place of every projection W, with A [rank, n_in] and B [n_out, rank].

    rank: of the changes.
    alpha: their scale; twice the rank if not given (Biderman et al., "LoRA Learns Less and Forgets Less", arXiv
        2405.09673).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: int = Field(ge=1)
    alpha: float | None = Field(None, gt=0)

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return 2.0 if self.alpha is None else self.alpha / self.rank

    def check(self) -> None:
        """Checks that peft is installed.

        Raises:
            InputError: it is not installed.
        """
        _peft()


class Adapters:
    """Low-rank changes of ``model``'s projections, put in place; everything else stays as it is but the norms.

    All linear maps inside the blocks are adapted, those of the feed-forward network too: without them LoRA stays
    behind full fine-tuning (Dettmers et al., "QLoRA", arXiv 2305.14314, Section 4). The norms' gains and biases train
    in full, as in LongLoRA (Chen et al., arXiv 2309.12307, Section 3.3): they are few. Embeddings, the unembedding and
    all other biases are frozen. A trains in float32 where the weights are in half precision, and B, which begins at
    zero, too.

    Raises:
        InputError: peft is not installed.
    """

    def __init__(self, model: NormfreeForCausalLM, options: LoraOptions) -> None:
        peft = _peft()
        self.model = model
        targets = [
            f"model.blocks.{name}"
            for name, module in model.model.blocks.named_modules()
            if isinstance(module, nn.Linear)
        ]
        alpha = options.scale * options.rank
        config = peft.LoraConfig(r=options.rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0)
        peft.inject_adapter_in_model(config, model)
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
            parameter.requires_grad_(".lora_" in name or "_norm." in name)

    def plain_state(self) -> dict[str, Tensor]:
        """The state dict of the same function as a model without adapters."""
        state = self.model.state_dict()
        plain = {name.replace(BASE, "."): tensor for name, tensor in state.items() if ".lora_" not in name}
        return plain | {f"{name}.weight": _merged(module) for name, module in self._adapted()}

    def merge(self) -> None:
        """Makes ``model`` that model, in place."""
        state = self.plain_state()
        for name, module in self._adapted():
            parent, _, child = name.rpartition(".")
            setattr(self.model.get_submodule(parent), child, module.base_layer)
        self.model.load_state_dict(state)

    def save(self, checkpoint: Path) -> None:
        """Writes what trains, and the buffers, into ``checkpoint``: with the weights it started from, all there is."""
        state = self.model.state_dict(keep_vars=True)
        kept = {
            name: tensor.detach().cpu().contiguous()
            for name, tensor in state.items()
            if tensor.requires_grad or not isinstance(tensor, nn.Parameter)
        }
        with written_whole(checkpoint / ADAPTERS_FILE) as temporary:
            save_file(kept, temporary)

    def load(self, checkpoint: Path) -> None:
        """Sets all that :meth:`save` wrote.

        Raises:
            InputError: there is none, or of another model.
        """
        path = checkpoint / ADAPTERS_FILE
        if not path.exists():
            raise InputError(f"{checkpoint} has no {ADAPTERS_FILE}: it is no checkpoint of a run with lora")
        state = load_file(path)
        trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        missing, unexpected = self.model.load_state_dict(state, strict=False)
        if unexpected or trained & set(missing):
            raise InputError(f"{path} holds adapters of another model; give another output folder")

    def _adapted(self) -> list[tuple[str, Any]]:
        return [(name, module) for name, module in self.model.named_modules() if hasattr(module, "lora_A")]


@torch.no_grad()
def _merged(module: Any) -> Tensor:
    """W + (alpha / rank) · B A, added in float32 at least and rounded once."""
    weight = cast(Tensor, module.base_layer.weight)
    change: Tensor = module.get_delta_weight("default")
    return (weight + change).to(weight.dtype)


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise InputError(f"LoRA needs peft ({error}); install it with: pip install 'normfree[lora]'") from error
    return peft
