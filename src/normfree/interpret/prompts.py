"""Pairs of prompts for patching, made from text by induction or read from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from normfree.data import Beginning
from normfree.data.records import parse_json
from normfree.errors import InputError
from normfree.files import read_regular
from normfree.interpret.patching import PromptPairs

PROMPTS = ("clean", "corrupted")
ANSWERS = ("answer", "wrong_answer")
FIELDS = (*PROMPTS, *ANSWERS)
NO_BEGINNING = Beginning()


def induction_pairs(sequences: torch.Tensor, n: int, *, n_beginning: int = 0, seed: int = 0) -> PromptPairs:
    """``n`` prompts of the form ... A B ... A, whose answer is B.

    A prompt is half of a sequence, then one of its tokens A that occurs in it once; the answer is the token B after A.
    In the corrupted prompt, B is replaced by a token C from elsewhere in the sequences, the wrong answer (the induction
    task of Olsson et al., "In-context Learning and Induction Heads", 2022, on text).

    Args:
        sequences: int64 [m, T], T at least 8; each gives at most one pair.
        n: pairs.
        n_beginning: tokens that every sequence begins with, which are never A.
        seed: of the choices of A and C.

    Raises:
        InputError: fewer than ``n`` sequences have a token that occurs once in their first half.
    """
    generator = np.random.default_rng(seed)
    vocabulary = np.unique(sequences.numpy())
    found: list[tuple[Any, ...]] = []
    for sequence in sequences[:, : sequences.shape[1] // 2].numpy():
        tokens, counts = np.unique(sequence, return_counts=True)
        places = np.flatnonzero(np.isin(sequence[:-1], tokens[counts == 1]))
        places = places[places >= n_beginning]
        others = np.setdiff1d(vocabulary, tokens)
        if len(places) and len(others) and len(found) < n:
            place = int(generator.choice(places))
            changed = sequence.copy()
            changed[place + 1] = generator.choice(others)
            prompts = (np.append(each, sequence[place]) for each in (sequence, changed))
            found.append((*prompts, sequence[place + 1], changed[place + 1]))
    if len(found) < n:
        raise InputError(
            f"{len(sequences)} sequences of {sequences.shape[1]} tokens give {len(found)} induction prompts, not {n}; "
            "give more or longer sequences, or prompts of your own with --prompts"
        )
    return PromptPairs(*(torch.from_numpy(np.asarray(each, dtype=np.int64)) for each in zip(*found, strict=True)))


def read_prompts(path: Path, tokenizer: PreTrainedTokenizerBase, beginning: Beginning = NO_BEGINNING) -> PromptPairs:
    """Pairs from a file of JSON lines with the texts ``clean``, ``corrupted``, ``answer`` and ``wrong_answer``.

    ``beginning`` is put before prompts that do not have it.

    Raises:
        InputError: the file cannot be read, a line has another form, prompts differ in their number of tokens, or an
            answer is not one token.
    """
    try:
        lines = read_regular(path).decode("utf-8").splitlines()
    except OSError as error:
        raise InputError(f"cannot read prompts from {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"cannot read prompts from {path}: byte {error.start} is not UTF-8") from error
    rows: dict[str, list[list[int]]] = {name: [] for name in FIELDS}
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        content = parse_json(line, where, "give one object a line")
        if not isinstance(content, dict) or any(not isinstance(content.get(name), str) for name in FIELDS):
            raise InputError(f"{where}: each line is an object with the texts {', '.join(FIELDS)}")
        for name in FIELDS:
            if not _is_text(content[name]):
                raise InputError(f"{where}: {name} has a NUL or half of a surrogate pair, which no tokenizer reads")
            token_ids = tokenizer(content[name], add_special_tokens=False)["input_ids"]
            rows[name].append(beginning.before(token_ids) if name in PROMPTS else token_ids)
        for name in ANSWERS:
            if len(rows[name][-1]) != 1:
                raise InputError(f"{where}: {name} {content[name]!r} is {len(rows[name][-1])} tokens; give one token")
        length = len(rows["clean"][0])
        for name in PROMPTS:
            if len(rows[name][-1]) != length:
                raise InputError(
                    f"{where}: {name} has {len(rows[name][-1])} tokens and the first prompt {length}; give all the same"
                )
    if not rows["clean"]:
        raise InputError(f"{path} has no prompts; give one object a line with {', '.join(FIELDS)}")
    prompts = [torch.tensor(rows[name], dtype=torch.int64) for name in PROMPTS]
    return PromptPairs(*prompts, *(torch.tensor(rows[name], dtype=torch.int64)[:, 0] for name in ANSWERS))


def _is_text(text: str) -> bool:
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)
