"""The model before the removal as the teacher of the one whose norms go."""

from __future__ import annotations

import torch
from torch import Tensor

from normfree.data import PackedData
from normfree.training.objectives import Distillation, DistillationOptions, Lesson, Objective, Term
from normfree.training.pretrained import starting_model


class Distilled(Objective):
    """(1 - ``weight``) · cross-entropy + ``weight`` · KL(original ‖ model) + the terms of ``objective``.

    The original is frozen and in evaluation mode, so that a resumed run learns from the same one; every micro-batch
    costs one more forward pass. Distributions are those of the logits, at a temperature of 1.

    Args:
        source: the model before the removal (:func:`~normfree.training.load_pretrained`).
        data: the tokens of the run.

    Raises:
        InputError: the original cannot be loaded.
    """

    reads_entropy = False

    def __init__(self, objective: Objective, source: str, data: PackedData, weight: float) -> None:
        super().__init__()
        self.objective, self.learned = objective, objective.learned
        options = DistillationOptions(teacher=source, weight=weight, temperature=1.0)
        self.teacher = Distillation(options, starting_model(source, data).eval().requires_grad_(False))

    def to(self, device: torch.device) -> None:
        self.objective.to(device)
        self.teacher.to(device)

    def lesson(self, input_ids: Tensor) -> Lesson:
        return self.teacher.lesson(input_ids)

    def terms(self, entropy: Tensor | None, lesson: Lesson | None) -> dict[str, Term]:
        return self.objective.terms(entropy, lesson)
