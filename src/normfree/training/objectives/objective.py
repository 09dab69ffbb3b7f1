"""What a run minimizes other than plain cross-entropy: weighted terms added to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from normfree.data import PackedData
from normfree.errors import InputError
from normfree.modeling import NormfreeConfig
from normfree.modeling.linear_cross_entropy import SoftTargets
from normfree.training.recipe import Recipe

CROSS_ENTROPY = "cross_entropy_nats"
"""The metric: mean next-token loss without the terms of the objective."""
DIVERGENCE = "distillation_kl_nats"
"""The metric: mean KL(teacher ‖ student) of the predicted tokens, at the temperature of the soft targets."""
OBJECTIVE_FILE = "objective.safetensors"


class Term(NamedTuple):
    """A summand of the loss: its value, a scalar mean over the sequences of a micro-batch, and its weight.

    Being a mean of what each sequence (or token) has by itself, it does not depend on how a batch is divided into
    micro-batches and over processes.
    """

    value: Tensor
    weight: float


class Lesson(NamedTuple):
    """What a teacher makes of a micro-batch.

    soft_targets: mixed into the model's cross-entropy.
    entropy: its attention entropy, float32 [batch, n_layer, n_head] in nats, where it is compared.
    """

    soft_targets: SoftTargets
    entropy: Tensor | None


class Objective(ABC):
    """One objective, ready to train with: cross-entropy, mixed with a teacher's soft targets, + the sum of its terms.

    A new one is a subclass, its :class:`ObjectiveOptions`, and a line in ``OBJECTIVES``. Logits are never all in
    memory, so no term receives them.

    reads_entropy: whether ``terms`` receives the model's attention entropy.
    learned: parameters trained with the model's, without weight decay and outside of gradient clipping. Checkpoints
        hold them in a file of their own.
    """

    reads_entropy: bool

    def __init__(self) -> None:
        self.learned = nn.ParameterDict()

    def to(self, device: torch.device) -> None:
        """Moves everything to ``device``, in place."""
        self.learned.to(device)

    def save(self, checkpoint: Path) -> None:
        """Writes what was learned, if anything is, into ``checkpoint``."""
        if self.learned:
            state = {name: value.cpu().contiguous() for name, value in self.learned.state_dict().items()}
            save_file(state, checkpoint / OBJECTIVE_FILE)

    def load(self, checkpoint: Path) -> None:
        """Sets what :meth:`save` wrote."""
        if self.learned:
            self.learned.load_state_dict(load_file(checkpoint / OBJECTIVE_FILE))

    def lesson(self, input_ids: Tensor) -> Lesson | None:
        """What a teacher makes of a micro-batch, int64 [batch, T]: none, unless the objective has one."""
        return None

    @abstractmethod
    def terms(self, entropy: Tensor | None, lesson: Lesson | None) -> dict[str, Term]:
        """The terms of one micro-batch, by the name under which ``metrics.parquet`` has their value.

        Args:
            entropy: float32 [batch, n_layer, n_head] in nats, from :class:`normfree.probes.EntropyRecorder`; given
                where ``reads_entropy`` says so.
            lesson: what :meth:`lesson` returned for it.
        """

    def head_values(self) -> dict[str, Tensor]:
        """What to record of each head in ``layers.parquet``, by name: each [n_layer, n_head]."""
        return {}


class ObjectiveOptions(BaseModel, ABC):
    """The options of one kind of objective, as they stand in a run's ``config.yaml``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str

    @property
    @abstractmethod
    def reads_entropy(self) -> bool:
        """True if the trained model's attention entropy is needed."""

    @abstractmethod
    def build(self, model: NormfreeConfig, folder: Path) -> Objective:
        """The objective for a model of that configuration, trained in ``folder``.

        Raises:
            InputError: it does not fit that model, or something it needs cannot be loaded.
        """

    def check_data(self, data: PackedData, folder: Path) -> None:
        """Checks that a run in ``folder`` can follow the objective on ``data``: all do, unless they say otherwise.

        Raises:
            InputError: it cannot.
        """

    def check(self, recipe: Recipe) -> None:
        """Checks that a run with ``recipe`` can follow the objective.

        Raises:
            InputError: it cannot.
        """
        if self.reads_entropy and recipe.torch_compile:
            raise InputError(
                f"the objective {self.kind} reads attention entropy, which compiled code does not show; "
                "set recipe.torch_compile to false"
            )
