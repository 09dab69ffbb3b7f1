"""The residual stream's statistics against float64 NumPy and SciPy on all activations at once."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from normfree import NormfreeConfig, NormfreeForCausalLM
from normfree.errors import InputError
from normfree.modeling.decoder_blocks import decoder_blocks
from normfree.probes.residual_stream import ResidualStreamProbe, StreamStatistics
from tests.coverage.tiny_models import tiny_model

N_LAYER, D, VOCABULARY, T = 3, 16, 60, 12
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "initializer_range": 0.4,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
LLAMA: dict[str, Any] = {
    "num_hidden_layers": N_LAYER,
    "num_attention_heads": 2,
    "hidden_size": D,
    "intermediate_size": 24,
    **SIZES,
}
MODELS: dict[str, tuple[str, Callable[[], PreTrainedModel]]] = {
    "normfree": (
        "model.blocks",
        lambda: NormfreeForCausalLM(
            NormfreeConfig(
                vocab_size=VOCABULARY, n_layer=N_LAYER, n_head=2, n_embd=D, n_positions=T, initializer_range=0.4
            )
        ),
    ),
    "gpt2": (
        "transformer.h",
        lambda: GPT2LMHeadModel(GPT2Config(n_layer=N_LAYER, n_head=2, n_embd=D, n_positions=T, **SIZES)),
    ),
    "llama": ("model.layers", lambda: LlamaForCausalLM(LlamaConfig(**LLAMA))),
    "gpt_neox": ("gpt_neox.layers", lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**LLAMA))),
    "bloom": (
        "transformer.h",
        lambda: BloomForCausalLM(BloomConfig(n_layer=N_LAYER, n_head=2, hidden_size=D, **SIZES)),
    ),
    "opt": (
        "model.decoder.layers",
        lambda: OPTForCausalLM(
            OPTConfig(
                num_hidden_layers=N_LAYER,
                num_attention_heads=2,
                hidden_size=D,
                ffn_dim=24,
                word_embed_proj_dim=D,
                **{**SIZES, "initializer_range": 0.02, "init_std": 0.4},
            )
        ),
    ),
}


def built(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return MODELS[name][1]().eval()


def reference(x: npt.NDArray[np.float64]) -> dict[str, float]:
    """Every statistic of activations [n_sequence, T, d] by its definition, with the Gram matrix built."""
    rms = np.sqrt((x**2).mean((0, 1)))
    magnitudes = np.sort(np.abs(x), axis=-1)
    units = x / np.linalg.norm(x, axis=-1, keepdims=True)
    gram = units @ units.transpose(0, 2, 1)
    off_diagonal = ~np.eye(x.shape[1], dtype=bool)
    return {
        "residual_rms": float(np.sqrt((x**2).mean())),
        "residual_kurtosis": float((rms**4).mean() / (rms**2).mean() ** 2),
        "residual_excess_kurtosis": float(stats.kurtosis(x.ravel())),
        "residual_max_over_median": float((magnitudes[..., -1] / magnitudes[..., (x.shape[-1] - 1) // 2]).mean()),
        "token_cosine_similarity": float(np.mean([each[off_diagonal].mean() for each in gram])),
    }


def statistics_of(probe: ResidualStreamProbe, layer: int) -> dict[str, float]:
    return {name: values[layer].item() for name, values in probe.by_layer().items() if "count" not in name}


def assert_close(found: dict[str, float], expected: dict[str, float], rtol: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=rtol, atol=rtol, err_msg=name)


@pytest.mark.parametrize("name", MODELS)
def test_every_statistic_is_that_of_the_models_own_hidden_states(name: str) -> None:
    model = built(name)
    tokens = torch.randint(0, VOCABULARY, (5, T))
    with ResidualStreamProbe(model) as probe, torch.no_grad():
        model(tokens[:3])
        model(tokens[3:])
    with torch.no_grad():
        # The last hidden state that transformers returns is behind the final norm.
        states = model(tokens, output_hidden_states=True).hidden_states[1:-1]
    assert probe.layers == tuple(f"{MODELS[name][0]}.{layer}" for layer in range(N_LAYER))
    assert probe.unreadable == {}
    assert len(states) == N_LAYER - 1
    for layer, state in enumerate(states):
        assert_close(statistics_of(probe, layer), reference(state.double().numpy()), rtol=1e-5)
    assert probe.tokens.tolist() == [5 * T] * N_LAYER
    assert probe.elements.tolist() == [5 * T * D] * N_LAYER


def test_the_last_layer_is_read_before_the_final_norm() -> None:
    model = built("normfree")
    tokens, seen = torch.randint(0, VOCABULARY, (2, T)), []
    model.model.final_norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with ResidualStreamProbe(model) as probe, torch.no_grad():
        model(tokens)
    assert_close(statistics_of(probe, -1), reference(seen[0].double().numpy()), rtol=1e-5)


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    n_token=st.integers(2, 9),
    d=st.integers(2, 12),
    power=st.floats(-36, 33),
    outlier=st.floats(0, 1e4),
)
def test_streamed_statistics_at_any_scale(
    seed: int, sizes: list[int], n_token: int, d: int, power: float, outlier: float
) -> None:
    draw = np.random.default_rng(seed)
    x = draw.standard_normal((sum(sizes), n_token, d))
    x[..., 0] += outlier
    x = (10.0**power * x).astype(np.float32)
    first, *others = (StreamStatistics.of(part) for part in torch.from_numpy(x).split(sizes))
    total = sum(others, first)
    expected = reference(x.astype(np.float64))
    found = {
        "residual_rms": (total.channel_squares.sum() / total.moments.n).sqrt().item(),
        "residual_kurtosis": (total.channel_squares.square().mean() / total.channel_squares.mean().square()).item(),
        "residual_excess_kurtosis": total.moments.excess_kurtosis().item(),
        "residual_max_over_median": (total.ratios / total.n_tokens).item(),
        "token_cosine_similarity": (total.similarities / total.n_sequences).item(),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-7, atol=1e-38 if "rms" in name else 1e-7, err_msg=name)


class Given(nn.Module):
    """A model of one block, which puts out what it is given."""

    def __init__(self) -> None:
        super().__init__()
        block = type(built("normfree").model.blocks[0])
        blocks: Any = nn.ModuleList([cast(Any, block).__new__(block)])
        self.blocks = blocks
        nn.Module.__init__(blocks[0])
        blocks[0].forward = lambda x: x

    def forward(self, x: Any) -> Any:
        return self.blocks[0](x)


def probed(x: Any) -> ResidualStreamProbe:
    model = Given().eval()
    with ResidualStreamProbe(model) as probe:
        model(x)
    return probe


def test_limits_that_can_be_seen() -> None:
    one_channel = torch.zeros(2, 5, 8)
    one_channel[..., 3] = 7
    assert probed(one_channel).kurtosis().item() == pytest.approx(8)
    assert probed(one_channel).token_cosine_similarity().item() == pytest.approx(1)
    assert probed(one_channel).max_over_median().item() == math.inf
    alike = torch.ones(2, 5, 8) * torch.tensor([1.0, -1.0] * 4)
    assert probed(alike).kurtosis().item() == pytest.approx(1)
    assert probed(alike).max_over_median().item() == 1
    orthogonal = torch.eye(8).expand(3, 8, 8)
    assert probed(orthogonal).token_cosine_similarity().item() == pytest.approx(0, abs=1e-12)
    opposite = torch.ones(1, 2, 8) * torch.tensor([[1.0], [-1.0]])
    assert probed(opposite).token_cosine_similarity().item() == pytest.approx(-1)


def test_one_token_or_a_zero_token_has_no_similarity() -> None:
    assert probed(torch.ones(4, 1, 8)).token_cosine_similarity().isnan()
    zero_token = torch.ones(2, 3, 8)
    zero_token[1, 2] = 0
    probe = probed(zero_token)
    assert probe.token_cosine_similarity().isnan()
    assert probe.max_over_median().isnan()
    assert probe.nan.item() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_as_it_is_and_computed_with_in_float64(dtype: torch.dtype) -> None:
    x = (300 * torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))).to(dtype)
    assert_close(statistics_of(probed(x), 0), reference(x.double().numpy()), rtol=1e-9)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_entries_are_counted_and_averaged_over_nowhere(bad: float) -> None:
    model = built("normfree")
    with torch.no_grad():
        model.model.blocks[1].ffn.down_proj.bias[3] = bad
    with ResidualStreamProbe(model) as probe, torch.no_grad():
        model(torch.randint(0, VOCABULARY, (2, T)))
    counts = probe.nan if math.isnan(bad) else probe.inf
    assert counts[:2].tolist() == [0, 2 * T]
    assert all(math.isfinite(value) for value in statistics_of(probe, 0).values())
    assert not any(math.isfinite(value) for value in statistics_of(probe, 1).values())
    assert not any(math.isfinite(value) for value in statistics_of(probe, 2).values())


def test_reading_changes_nothing_and_leaves_nothing() -> None:
    model, tokens = built("gpt2"), torch.randint(0, VOCABULARY, (2, T))
    with torch.no_grad():
        before = model(tokens).logits
        with ResidualStreamProbe(model) as probe:
            during = model(tokens).logits
        model(tokens)
    assert torch.equal(before, during)
    assert probe.tokens.tolist() == [2 * T] * N_LAYER
    assert not any(module._forward_hooks for module in model.modules())


def test_recomputation_under_gradient_checkpointing_is_not_counted() -> None:
    model, tokens = built("normfree").train(), torch.randint(0, VOCABULARY, (2, T))
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    with ResidualStreamProbe(model) as probe:
        model(tokens, labels=tokens).loss.backward()
    assert probe.tokens.tolist() == [2 * T] * N_LAYER


@pytest.mark.parametrize(
    ("output", "reason"),
    [({"state": 1}, "it puts out dict"), (torch.zeros(3, 4), "it puts out a tensor of 2 dimensions")],
)
def test_a_block_that_cannot_be_read_is_named(output: Any, reason: str) -> None:
    probe = probed(output)
    assert list(probe.unreadable) == ["blocks.0"]
    assert reason in probe.unreadable["blocks.0"]
    assert probe.rms().isnan().all()


def test_a_block_that_was_not_called_is_named() -> None:
    with ResidualStreamProbe(built("llama")) as probe:
        pass
    assert probe.unreadable == {f"model.layers.{layer}": "it has not been called" for layer in range(N_LAYER)}
    assert probe.kurtosis().isnan().all()
    assert probe.nan.tolist() == [0] * N_LAYER


def test_models_without_one_list_of_blocks_are_refused() -> None:
    with pytest.raises(InputError, match="Linear has none"):
        decoder_blocks(nn.Linear(2, 2))
    sizes: dict[str, Any] = {"vocab_size": 9, "d_model": 4, "d_kv": 2, "d_ff": 4, "num_layers": 1, "num_heads": 2}
    sizes["decoder_start_token_id"] = 0
    t5 = T5ForConditionalGeneration(T5Config(**sizes))
    with pytest.raises(InputError, match=r"has 2 \(encoder.block, decoder.block\)"):
        decoder_blocks(t5)


def read_batch(n_sequences: int) -> ResidualStreamProbe:
    model = built("normfree")
    with ResidualStreamProbe(model) as probe, torch.no_grad():
        model(torch.arange(n_sequences * T).view(n_sequences, T) % VOCABULARY)
    return probe


def test_reducing_a_group_of_one_process_changes_nothing(tmp_path: Path) -> None:
    probe = read_batch(3)
    before = {**probe.by_layer(), "tokens": probe.tokens}
    probe.reduce()  # outside of a distributed run
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        probe.reduce()
    finally:
        torch.distributed.destroy_process_group()
    for name, values in {**probe.by_layer(), "tokens": probe.tokens}.items():
        assert torch.equal(values, before[name]), name


def test_reducing_adds_up_what_the_processes_gather(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, other = read_batch(1), read_batch(4)
    others = iter([each.packed for each in other._statistics if each is not None])

    def all_gather(everyones: list[torch.Tensor], mine: torch.Tensor) -> None:
        everyones[0].copy_(next(others))
        everyones[1].copy_(mine)

    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.all_gather", all_gather)
    mine.reduce()
    model, tokens = built("normfree"), torch.arange(4 * T).view(4, T) % VOCABULARY
    with ResidualStreamProbe(model) as alone, torch.no_grad():
        model(tokens)
        model(tokens[:1])
    assert mine.tokens.tolist() == alone.tokens.tolist() == [5 * T] * N_LAYER
    for name, values in alone.by_layer().items():
        torch.testing.assert_close(mine.by_layer()[name], values, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("model_type", ["gemma3", "got_ocr2", "moss_transcribe_diarize", "phi4_multimodal"])
def test_the_blocks_of_a_model_with_an_image_or_audio_tower_are_its_language_models(model_type):
    model = tiny_model(model_type)
    text = "model.language_model" if model_type != "phi4_multimodal" else "model"
    assert list(decoder_blocks(model)) == [f"{text}.layers.{layer}" for layer in range(4)]
