"""The contract of all probes, and of telemetry with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pandas as pd
import pytest
import torch

from normfree import NormfreeConfig, NormfreeForCausalLM
from normfree.errors import InputError
from normfree.probes.probe import LayerRow, Probe, WeightProbe, read_calls
from normfree.training.records import LAYERS_FILE, METRICS_FILE, RunRecords
from normfree.training.telemetry import Telemetry, recorded_probes

TOKENS = torch.arange(24).view(3, 8)
KINDS = range(4)
"""Positions in ``recorded_probes``."""


def model() -> NormfreeForCausalLM:
    torch.manual_seed(0)
    config = NormfreeConfig(
        vocab_size=50,
        n_layer=3,
        n_head=2,
        n_embd=8,
        n_positions=8,
        activation="learnable_leaky_relu",
        initializer_range=0.3,
    )
    return NormfreeForCausalLM(config)


class TokenCount(Probe):
    """A probe that somebody else has written."""

    def __init__(self, model: NormfreeForCausalLM) -> None:
        self._model = model
        self.reset()

    def reset(self) -> None:
        self.n = 0

    def _attach(self, stack: ExitStack) -> None:
        read_calls(stack, self._model.lm_head, lambda inputs, output: self._count(output))

    def _count(self, logits: torch.Tensor) -> None:
        assert not torch.is_grad_enabled()
        self.n += logits.shape[0] * logits.shape[1]

    def _reduce(self) -> None: ...

    def layer_rows(self) -> Iterator[LayerRow]:
        yield LayerRow(0, None, "token_count", float(self.n))


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_add_up_until_they_are_reset(kind: int) -> None:
    net = model()
    probe = recorded_probes(net)[kind]
    for _ in range(2):
        with probe, torch.no_grad():
            net(TOKENS)
        probe.reduce()  # outside of torch.distributed: a no-op
    twice = list(probe.layer_rows())
    probe.reset()
    with probe, torch.no_grad():
        net(TOKENS)
    once = list(probe.layer_rows())
    assert [row[:3] for row in once] == [row[:3] for row in twice]
    assert [row.value for row in once] == pytest.approx([row.value for row in twice])
    assert {row.layer for row in once} == {0, 1, 2}


@pytest.mark.parametrize("kind", KINDS)
def test_a_probe_is_attached_once_and_leaves_nothing(kind: int) -> None:
    net = model()
    probe = recorded_probes(net)[kind]
    name = type(probe).__name__
    with probe, pytest.raises(InputError, match=f"this {name} is already active"):
        probe.__enter__()
    with pytest.raises(KeyError), probe:
        raise KeyError
    probe.close()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    with probe, torch.no_grad():
        net(TOKENS)
    before = list(probe.layer_rows())
    with torch.no_grad():
        net(TOKENS + 1)
    assert list(probe.layer_rows()) == before


def steps(telemetry: Telemetry, net: NormfreeForCausalLM, n: int, micro_batches: int) -> None:
    telemetry.begin(0)
    for step in range(n):
        telemetry.begin_step(step)
        for _ in range(micro_batches):
            net(TOKENS, labels=TOKENS).loss.backward()
        telemetry.end_step()
        with torch.no_grad():
            net(TOKENS)  # evaluation
        telemetry.log(step + 1, {"train_loss": 2.0, "mine": 3.0} | telemetry.speed())
    telemetry.finish(n)


def test_telemetry_records_the_rows_of_any_probe(tmp_path: Path) -> None:
    net = model()
    telemetry = Telemetry(RunRecords(tmp_path), [TokenCount(net)], every=2, tokens_per_step=48)
    steps(telemetry, net, 3, micro_batches=2)
    layers = pd.read_parquet(tmp_path / LAYERS_FILE)
    assert layers[["step", "layer", "name", "value"]].to_numpy().tolist() == [
        [0, 0, "token_count", 48.0],
        [2, 0, "token_count", 48.0],
    ]
    assert layers["head"].isna().all()
    metrics = pd.read_parquet(tmp_path / METRICS_FILE)
    assert metrics["name"].tolist() == ["train_loss", "mine", "tokens_per_second"] * 3
    assert metrics["tokens"].tolist() == [48] * 3 + [96] * 3 + [144] * 3


def test_weights_are_recorded_before_a_step_and_at_the_end(tmp_path: Path) -> None:
    net = model()

    class Bias(WeightProbe):
        def read(self) -> Iterator[LayerRow]:
            yield LayerRow(0, 1, "bias", net.model.blocks[0].ffn.up_proj.bias[0].item())

    telemetry = Telemetry(RunRecords(tmp_path), [Bias()], every=1, tokens_per_step=24)
    telemetry.begin(0)
    for step in range(2):
        telemetry.begin_step(step)
        with torch.no_grad():
            net.model.blocks[0].ffn.up_proj.bias += 1
        telemetry.end_step()
    telemetry.finish(2)
    layers = pd.read_parquet(tmp_path / LAYERS_FILE)
    assert layers["step"].tolist() == [0, 1, 2]
    assert layers["value"].tolist() == [0.0, 1.0, 2.0]
    assert layers["head"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("failing", ["begin_step", "step"])
def test_after_an_error_nothing_is_attached(tmp_path: Path, failing: str) -> None:
    net = model()

    class Broken(TokenCount):
        def _attach(self, stack: ExitStack) -> None:
            super()._attach(stack)
            if failing == "begin_step":
                raise RuntimeError("broken")

    probes = [*recorded_probes(net), Broken(net)]
    telemetry = Telemetry(RunRecords(tmp_path), probes, every=1, tokens_per_step=24)
    if failing == "begin_step":
        with pytest.raises(RuntimeError, match="broken"):
            telemetry.begin_step(0)
    else:
        telemetry.begin_step(0)
        telemetry.close()
        telemetry.close()
    assert not any(module._forward_hooks for module in net.modules())
    with probes[0], torch.no_grad():
        net(TOKENS)
