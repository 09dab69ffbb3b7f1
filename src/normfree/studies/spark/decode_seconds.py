"""Seconds per generated token of a sparse model and of the dense one of its shape, timed in turns."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy

import pandas as pd
import torch
from transformers.cache_utils import DynamicCache

from normfree.modeling import NormfreeConfig, NormfreeForCausalLM
from normfree.spark import sparse_decode
from normfree.timing import Call, Clock, interleaved

N_ROUND = 15
MAX_STEPS = 64
"""Tokens that are generated before the cache is cut back."""


@torch.inference_mode()
def decode_seconds(model: NormfreeForCausalLM, dense: NormfreeConfig) -> pd.DataFrame:
    """round, context_length, dense_seconds, masked_seconds, sparse_seconds: for a token, one sequence at a time.

    Three models take turns: one of the configuration ``dense`` with random weights; ``model`` computing everything and
    multiplying by zero; and ``model`` inside :func:`normfree.sparse_decode`. A token is a forward pass with a cache,
    which holds half of the positions at first; ``context_length`` is the mean over the passes. On a CPU one thread is
    timed by the processor time that it takes, which other work on the machine does not lengthen.

    Raises:
        InputError: as :func:`normfree.sparse_decode`.
    """
    n_cached = max(model.config.n_positions // 2, 1)
    n_step = min(MAX_STEPS, model.config.n_positions - n_cached)
    with model.device:
        other = NormfreeForCausalLM(dense).type(model.dtype)
    with sparse_decode(deepcopy(model).eval()) as sparse, _clock(model.device) as clock:
        models = {"dense": other.eval(), "masked": model.eval(), "sparse": sparse}
        calls = {name: _generation(each, n_cached, n_step) for name, each in models.items()}
        seconds = interleaved(calls, N_ROUND, model.device, clock)
    a_token = {f"{name}_seconds": [each / n_step for each in calls] for name, calls in seconds.items()}
    return pd.DataFrame({"round": range(N_ROUND), "context_length": n_cached + (n_step - 1) / 2, **a_token})


def _generation(model: NormfreeForCausalLM, n_cached: int, n_step: int) -> Call:
    tokens = torch.randint(model.config.vocab_size, (1, n_cached + n_step), device=model.device)
    cache = DynamicCache()
    model(input_ids=tokens[:, :n_cached], cache=cache, use_cache=True, logits_to_keep=1)

    def generate() -> None:
        for token in tokens[:, n_cached:].split(1, dim=1):
            model(input_ids=token, cache=cache, use_cache=True, logits_to_keep=1)
        cache.crop(-n_step)

    return generate


@contextmanager
def _clock(device: torch.device) -> Iterator[Clock]:
    if device.type != "cpu":
        yield time.perf_counter
        return
    n_thread = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield time.thread_time
    finally:
        torch.set_num_threads(n_thread)
