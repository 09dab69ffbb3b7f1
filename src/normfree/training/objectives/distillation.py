"""Distillation of a finished model into the one that trains (Hinton, Vinyals & Dean 2015)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import kl_div
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from normfree.data import Beginning, PackedData, load_tokenizer
from normfree.errors import InputError
from normfree.modeling import NormfreeConfig
from normfree.modeling.loading import load_model
from normfree.probes import EntropyRecorder
from normfree.training.objectives.objective import Objective, ObjectiveOptions, Term
from normfree.training.run_folder import CONFIG_FILE, RESULTS_FILE, last_checkpoint

KL = "distillation_kl_nats"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
ENTROPY_MISMATCH = "entropy_mismatch_nats_squared"


class DistillationOptions(ObjectiveOptions):
    """(1 - ``weight``) · cross-entropy + ``weight`` · temperature² · KL + ``entropy_weight`` · entropy mismatch.

    teacher: the folder of a finished run, or of a causal language model in transformers' form, with safetensors
        weights and the student's tokenizer. A relative path starts at the folder of the run that trains.
    weight: the share of the KL divergence (see :func:`forward_kl`).
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
        self.cross_entropy_weight = 1 - options.weight
        self.reads_logits, self.reads_entropy = True, options.reads_entropy
        self.term_names = (KL, ENTROPY_MISMATCH) if options.reads_entropy else (KL,)

    def to(self, device: torch.device) -> None:
        super().to(device)
        self.teacher.to(device)

    def terms(self, input_ids: Tensor, logits: Tensor | None, entropy: Tensor | None) -> dict[str, Term]:
        assert logits is not None, "reads_logits asks for them"
        teacher_logits, teacher_entropy = self._ask_teacher(input_ids)
        temperature = self.options.temperature
        divergence = forward_kl(logits[:, :-1], teacher_logits[:, :-1], temperature)
        terms = {KL: Term(divergence, self.options.weight * temperature**2)}
        if teacher_entropy is not None:
            assert entropy is not None, "reads_entropy asks for it"
            mismatch = (entropy - teacher_entropy).square().mean()
            terms[ENTROPY_MISMATCH] = Term(mismatch, self.options.entropy_weight)
        return terms

    @torch.no_grad()
    def _ask_teacher(self, input_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Its logits [batch, T, vocab_size] and, where they are matched, its entropies [batch, n_layer, n_head]."""
        if not self.reads_entropy:
            return self.teacher(input_ids=input_ids, use_cache=False).logits, None
        with EntropyRecorder(self.teacher) as recorded:
            logits: Tensor = self.teacher(input_ids=input_ids, use_cache=False).logits
        return logits, recorded.per_head()


def forward_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Mean over predicted tokens of KL(teacher ‖ student) in nats, of softmax(logits / temperature).

    Its gradient falls with 1/temperature², which is why losses multiply it by temperature² (Hinton et al., Section 2).

    Args:
        student, teacher: logits [batch, n_token, vocab_size]; computed in float32.
        temperature: above 0.

    Returns:
        A float32 scalar.
    """
    log_p_student = (student.float() / temperature).log_softmax(dim=-1)
    log_p_teacher = (teacher.float() / temperature).log_softmax(dim=-1)
    return kl_div(log_p_student, log_p_teacher, reduction="none", log_target=True).sum(dim=-1).mean()


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
        teacher = load_model(path, local_files_only=True)
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
