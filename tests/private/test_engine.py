"""Costs measured in the engine itself: processes over loopback."""

from __future__ import annotations

from functools import reduce
from operator import add
from pathlib import Path

import pytest
import torch

from normfree import NormfreeConfig, NormfreeForCausalLM
from normfree_private.environment import Engine
from normfree_private.measurement import PROTOCOLS, Cost, Measurer, Settings
from normfree_private.model import block_cost, run_encrypted
from normfree_private.operations import Operation, block_steps
from normfree_private.parties import EngineError

pytestmark = pytest.mark.engine

SMALL = NormfreeConfig(n_layer=1, n_head=2, n_embd=16, n_positions=8, vocab_size=20, initializer_range=0.2)


def measurer(engine: Engine, protocol: str, folder: Path) -> Measurer:
    return Measurer(engine, Settings(PROTOCOLS[protocol], runs=1, timeout_seconds=120), folder)


@pytest.mark.parametrize("protocol", ["semi2k", "aby3"])
def test_operations_add_up_to_their_block(engine: Engine, protocol: str, tmp_path: Path) -> None:
    measure = measurer(engine, protocol, tmp_path)
    operations = [step.operation for step in block_steps(SMALL, 0, 8)]
    costs = measure.operations(operations)
    summed = reduce(add, (costs[each] for each in operations))
    whole = block_cost(measure, SMALL, 0, 8)
    assert summed.bytes_per_party == pytest.approx(whole.bytes_per_party, rel=0.1)
    assert summed.messages_per_party == pytest.approx(whole.messages_per_party, rel=0.1)
    assert len(whole.bytes_sent) == PROTOCOLS[protocol].n_party


def test_a_secret_product_opens_both_factors(engine: Engine, tmp_path: Path) -> None:
    # Beaver's multiplication: each party sends its share of x - a and of W - b, 8 bytes a number; then the product's
    # fraction bits are cut off, which takes no more than 8 bytes for each number of it.
    cost = measurer(engine, "semi2k", tmp_path).operations([Operation("linear", ((16, 32), (32, 24)))])
    (found,) = cost.values()
    assert found.bytes_sent[0] == found.bytes_sent[1]
    opened = 8 * (16 * 32 + 32 * 24)
    assert opened < found.bytes_per_party <= opened + 8 * 16 * 24


def test_a_whole_model_and_what_is_measured_again(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = NormfreeForCausalLM(SMALL).eval()
    tokens = torch.randint(20, (8,))
    run = run_encrypted(engine, Settings(PROTOCOLS["aby3"], runs=1), model, tokens)
    assert run.max_error < 0.02 * run.logit_std
    assert run.same_prediction == 1
    with torch.no_grad():
        loss = model(tokens.unsqueeze(0), labels=tokens.unsqueeze(0)).loss.item()
    assert run.plain_loss == pytest.approx(loss, abs=1e-5)
    assert run.encrypted_loss == pytest.approx(loss, abs=0.01)

    measure = measurer(engine, "semi2k", tmp_path)
    relu = Operation("relu", ((4, 4),))
    first = measure.operations([relu])
    monkeypatch.setattr("normfree_private.measurement.run_programs", pytest.fail)
    assert measure.operations([relu]) == first


def test_a_program_that_does_not_compile_is_one_line(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"prepare\.py failed with exit code 1: ") as caught:
        measurer(engine, "semi2k", tmp_path).operations([Operation("linear", ((4, 4), (5, 4)))])
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_costs_add_party_by_party() -> None:
    total = Cost((1, 2, 6), (1, 1, 4), 0.5) + Cost((10, 20, 30), (2, 2, 2), 0.25)
    assert total == Cost((11, 22, 36), (3, 3, 6), 0.75)
    assert (total.bytes_per_party, total.messages_per_party) == (23, 4)
