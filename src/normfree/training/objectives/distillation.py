"""Distillation of a finished model into the one that trains (Hinton, Vinyals & Dean 2015)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from normfree.data import Beginning, PackedData, load_tokenizer
from normfree.errors import InputError
from normfree.modeling import NormfreeConfig, NormfreeForCausalLM
from normfree.modeling.linear_cross_entropy import SoftTargets
from normfree.modeling.loading import load_model
from normfree.probes import EntropyRecorder
from normfree.training.objectives.objective import Lesson, Objective, ObjectiveOptions, Term
from normfree.training.run_folder import CONFIG_FILE, RESULTS_FILE, last_checkpoint

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
ENTROPY_MISMATCH = "entropy_mismatch_nats_squared"


class DistillationOptions(ObjectiveOptions):
    """(1 - ``weight``) · cross-entropy + ``weight`` · temperature² · KL + ``entropy_weight`` · entropy mismatch.

    teacher: the folder of a finished run, or of a causal language model in transformers' form, with safetensors
        weights and the student's tokenizer. A relative path starts at the folder of the run that trains.
    weight: the share of the KL divergence, KL(teacher ‖ student) of softmax(logits / ``temperature``), mean over the
        predicted tokens. Its gradient falls with 1/temperature², hence the factor (Hinton et al., Section 2).
    temperature: softens both distributions.
    entropy_weight: weight of the mean squared difference, over sequences, layers and heads, of teacher's and student's
        attention entropy; both need the same numbers of layers and heads.
    """

    kind: Literal["distillation"] = "distillation"
    teacher: str = Field(min_length=1)
    weight: float = Field(default=0.5, gt=0, le=1)
    temperature: float = Field(default=2.0, gt=0, allow_inf_nan=False)
    entropy_weight: float = Field(default=0.0, ge=0, allow_inf_nan=False)

    @property
    def reads_entropy(self) -> bool:
        return self.entropy_weight > 0

    def build(self, model: NormfreeConfig, folder: Path) -> Distillation:
        return Distillation(self, load_teacher(self._folder(folder), model, same_heads=self.reads_entropy))

    def check_data(self, data: PackedData, folder: Path) -> None:
        """Checks that sequences begin with what the teacher's tokenizer puts before a text.

        Normfree's runs, and teachers saved without a tokenizer, read the student's sequences.

        Raises:
            InputError: they do not.
        """
        teacher = self._folder(folder)
        if not (teacher / "config.json").is_file() or (teacher.parent / CONFIG_FILE).is_file():
            return
        if not any((teacher / name).is_file() for name in TOKENIZER_FILES):
            return
        beginning = Beginning.of(load_tokenizer(str(teacher)), "tokenizer")
        if tuple(data.train.tokens[0, : len(beginning)].tolist()) != beginning.token_ids:
            raise InputError(
                f"objective.teacher: the tokenizer of {teacher} puts {' '.join(beginning.tokens)} before a text and "
                "the sequences here begin without it; set data.beginning to tokenizer"
            )

    def _folder(self, run_folder: Path) -> Path:
        # Resolved first: the system finds no ".." of a folder that is not there yet.
        return (run_folder / self.teacher).resolve()


class Distillation(Objective):
    """See :class:`DistillationOptions`; the teacher is in evaluation mode and gets no gradient."""

    def __init__(self, options: DistillationOptions, teacher: PreTrainedModel) -> None:
        super().__init__()
        self.options = options
        self.teacher: nn.Module = teacher
        self.reads_entropy = options.reads_entropy

    def to(self, device: torch.device) -> None:
        super().to(device)
        self.teacher.to(device)

    @torch.no_grad()
    def lesson(self, input_ids: Tensor) -> Lesson:
        if not self.reads_entropy:
            return Lesson(self._soft_targets(input_ids), None)
        with EntropyRecorder(self.teacher) as recorded:
            soft_targets = self._soft_targets(input_ids)
        return Lesson(soft_targets, recorded.per_head())

    def terms(self, entropy: Tensor | None, lesson: Lesson | None) -> dict[str, Term]:
        if entropy is None or lesson is None or lesson.entropy is None:
            return {}
        mismatch = (entropy - lesson.entropy).square().mean()
        return {ENTROPY_MISMATCH: Term(mismatch, self.options.entropy_weight)}

    def _soft_targets(self, input_ids: Tensor) -> SoftTargets:
        """Of Normfree's own models without their logits; other models may do anything to these."""
        teacher, how = self.teacher, (self.options.weight, self.options.temperature)
        if not isinstance(teacher, NormfreeForCausalLM):
            logits: Tensor = teacher(input_ids=input_ids, use_cache=False).logits
            return SoftTargets(logits, None, None, None, *how)
        hidden = teacher.model(input_ids=input_ids, use_cache=False).last_hidden_state
        head = teacher.lm_head
        return SoftTargets(hidden, head.weight, head.bias, teacher.config.final_logit_softcapping, *how)


def load_teacher(folder: Path, student: NormfreeConfig, *, same_heads: bool) -> PreTrainedModel:
    """The model in ``folder``, in evaluation mode, its weights frozen.

    Only safetensors weights are read, and no remote code is run.

    Raises:
        InputError: there is no such folder, it holds an unfinished or diverged run or no model, or the model has
            another vocabulary size, too few positions or, with ``same_heads``, other numbers of layers or heads.
    """
    path = str(_weights_folder(folder))
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        _check_fit(config.get_text_config(), student, folder, same_heads=same_heads)
    except InputError:
        raise
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(
            f"objective.teacher: cannot load {folder} ({reason}); give the folder of a causal language model with "
            "safetensors weights"
        ) from error
    try:
        teacher = load_model(path)
    except InputError as error:
        raise InputError(f"objective.teacher: {error}") from error
    return teacher.eval().requires_grad_(False)


def _weights_folder(folder: Path) -> Path:
    """``folder`` itself for a model in transformers' form, the last checkpoint of a finished run."""
    if not folder.is_dir():
        raise InputError(
            f"objective.teacher: there is no folder {folder}; give a finished run or a model folder (a relative path "
            "starts at the folder of the run that trains)"
        )
    if (folder / "config.json").is_file():
        return folder
    checkpoint = last_checkpoint(folder)
    if not (folder / RESULTS_FILE).exists() or checkpoint is None:
        raise InputError(
            f"objective.teacher: {folder} is neither a model folder (config.json is missing) nor a finished run "
            f"({RESULTS_FILE} or its checkpoint is missing); train the teacher to its end first"
        )
    status = pd.read_csv(folder / RESULTS_FILE)["status"][0]
    if status != "finished":
        raise InputError(f"objective.teacher: the run in {folder} is {status}; give one with finite weights")
    return checkpoint


def _check_fit(teacher: PreTrainedConfig, student: NormfreeConfig, folder: Path, *, same_heads: bool) -> None:
    if teacher.vocab_size != student.vocab_size:
        raise InputError(
            f"objective.teacher: {folder} has a vocabulary of {teacher.vocab_size} tokens, the student one of "
            f"{student.vocab_size}; both need the same tokenizer"
        )
    positions = getattr(teacher, "max_position_embeddings", None)
    if positions is not None and positions < student.n_positions:
        raise InputError(
            f"objective.teacher: {folder} has {positions} positions, fewer than the {student.n_positions} tokens of a "
            "sequence; give another teacher, or lower data.sequence_length"
        )
    theirs = teacher.num_hidden_layers, teacher.num_attention_heads
    if same_heads and theirs != (student.n_layer, student.n_head):
        raise InputError(
            f"objective.entropy_weight matches head with head, but the teacher in {folder} has {theirs[0]} layers of "
            f"{theirs[1]} heads and the student {student.n_layer} of {student.n_head}; set it to 0, or change one model"
        )
