"""What follows a loss that is no number: the run halts, or goes around the batches that led there."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler

from normfree import NormfreeForCausalLM
from normfree.data import PackedData
from normfree.errors import RunFailedError
from normfree.training import RunConfig, RunResult, train
from normfree.training.nonfinite import REWINDS
from normfree.training.order import Rewind, TrainingOrder, load_rewinds
from normfree.training.records import METRICS_FILE
from normfree.training.run_folder import last_checkpoint
from tests.training.test_telemetry import BatchLog
from tests.training.test_trainer import StopAt, assert_same

EVERY_STEP = {"steps": 8, "save_steps": 2, "logging_steps": 1, "telemetry_steps": 1}


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the loss NaN on batches whose first token sequence is one of those given, whenever they are trained on."""
    plain = NormfreeForCausalLM.forward

    def put(*sequences: torch.Tensor) -> None:
        def forward(self: Any, input_ids: Any = None, *arguments: Any, **options: Any) -> Any:
            outputs = plain(self, input_ids, *arguments, **options)
            if self.training and any(torch.equal(input_ids[0], each) for each in sequences):
                outputs.loss = outputs.loss * math.nan
            return outputs

        monkeypatch.setattr(NormfreeForCausalLM, "forward", forward)

    return put


def batches_of(run: RunConfig, data: PackedData, folder: Path) -> list[torch.Tensor]:
    log = BatchLog()
    train(run, data, folder, callbacks=(log,))
    return log.batches


def loss_of(folder: Path) -> pd.Series:
    metrics = pd.read_parquet(folder / METRICS_FILE)
    return metrics[metrics["name"] == "train_loss"].set_index("step")["value"]


def test_halt_stops_before_the_update_and_keeps_the_last_good_checkpoint(
    data: PackedData, tiny_run: Callable[..., RunConfig], tmp_path: Path, poison: Callable[..., None]
) -> None:
    order = batches_of(tiny_run(**EVERY_STEP), data, tmp_path / "plain")
    poison(order[4][0])
    run = tiny_run(**EVERY_STEP, on_nonfinite="halt")
    for _ in range(2):  # the same command halts at the same step
        with pytest.raises(
            RunFailedError,
            match=r"step 5: the loss is not finite; stopped, as recipe.on_nonfinite asks for; checkpoint-4 is the last",
        ):
            train(run, data, tmp_path / "run")
        assert loss_of(tmp_path / "run").index.tolist() == [1, 2, 3, 4]
    pd.testing.assert_series_equal(loss_of(tmp_path / "run"), loss_of(tmp_path / "plain").loc[:4])
    assert not (tmp_path / "run" / "results.csv").exists()


def test_rewind_goes_around_the_batches_that_led_there(
    data: PackedData,
    tiny_run: Callable[..., RunConfig],
    tmp_path: Path,
    poison: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    order = batches_of(tiny_run(**{**EVERY_STEP, "steps": 12}), data, tmp_path / "plain")
    poison(order[5][0], order[9][0])
    run = tiny_run(**EVERY_STEP, on_nonfinite="rewind")
    seen = batches_of(run, data, tmp_path / "run")
    # Step 6 is bad: back to 4, without batches 4 and 5. Then batch 9, of step 8, is: back to 6, without 8 and 9.
    expected = [*order[:6], order[6], order[7], order[8], order[9], order[10], order[11]]
    assert len(seen) == len(expected)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(seen, expected, strict=True))
    assert load_rewinds(tmp_path / "run") == [Rewind(6, 4, 16, 8), Rewind(8, 6, 24, 8)]
    assert "step 6: the loss is not finite; back to step 4, without the 8 sequences that led there" in caplog.text
    metrics = pd.read_parquet(tmp_path / "run" / METRICS_FILE)
    assert metrics[metrics["name"] == REWINDS][["step", "value"]].to_numpy().tolist() == [[5, 1], [7, 2]]
    assert loss_of(tmp_path / "run").index.tolist() == list(range(1, 9))
    assert loss_of(tmp_path / "run").notna().all()


@pytest.mark.parametrize("stop", [3, 5, 7])
def test_a_rewound_run_that_was_stopped_ends_like_one_never_stopped(
    data: PackedData, tiny_run: Callable[..., RunConfig], tmp_path: Path, poison: Callable[..., None], stop: int
) -> None:
    order = batches_of(tiny_run(**EVERY_STEP), data, tmp_path / "plain")
    poison(order[5][0])
    run = tiny_run(**EVERY_STEP, on_nonfinite="rewind", model={"embedding_dropout": 0.1})
    whole = train(run, data, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(run, data, tmp_path / "stopped", callbacks=(StopAt(stop),))
    again = train(run, data, tmp_path / "stopped")
    assert_same(whole, again)
    assert load_rewinds(whole.folder) == load_rewinds(again.folder)


def test_rewinds_are_bounded(
    data: PackedData, tiny_run: Callable[..., RunConfig], tmp_path: Path, poison: Callable[..., None]
) -> None:
    order = batches_of(tiny_run(**{**EVERY_STEP, "steps": 12}), data, tmp_path / "plain")
    poison(*(batch[0] for batch in order[3:]))
    run = tiny_run(**EVERY_STEP, on_nonfinite="rewind", max_rewinds=2)
    with pytest.raises(
        RunFailedError, match=r"after 2 rewinds already \(recipe.max_rewinds\); checkpoint-2 is the las"
    ):
        train(run, data, tmp_path / "run")
    checkpoint = last_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    assert NormfreeForCausalLM.from_pretrained(checkpoint).num_parameters() > 0


def test_a_watched_run_without_a_mishap_is_the_plain_run(
    plain_run: RunResult, data: PackedData, tiny_run: Callable[..., RunConfig], tmp_path: Path
) -> None:
    assert_same(plain_run, train(tiny_run(on_nonfinite="rewind"), data, tmp_path / "watched"))


def test_without_rewinds_the_order_is_that_of_accelerates_sampler() -> None:
    order, reference = TrainingOrder(23, 8, seed=5), SeedableRandomSampler(range(23), data_seed=5)
    assert order.steps_per_epoch == 2
    for epoch in range(3):
        reference.set_epoch(epoch)
        assert order.step(2 * epoch) + order.step(2 * epoch + 1) == list(reference)[:16]


@pytest.mark.parametrize(("n", "size"), [(1, 8), (1, 2), (2, 2), (4, 2), (2, 4)])
def test_processes_share_every_step(monkeypatch: pytest.MonkeyPatch, n: int, size: int) -> None:
    order = TrainingOrder(35, 8, seed=5)
    monkeypatch.setenv("WORLD_SIZE", str(n))
    shares = []
    for rank in range(n):
        monkeypatch.setenv("RANK", str(rank))
        shares.append(list(order.micro_batches(5, size)))
    together = [sequence for batches in zip(*shares, strict=True) for batch in batches for sequence in batch]
    assert together == [*order.step(5), *order.step(6), *order.step(7)], "to the end of the epoch"


def test_skipped_sequences_are_left_out_over_epochs() -> None:
    """Against the whole order written out, with the skipped pieces cut from it."""
    plain = TrainingOrder(23, 8, seed=5)
    whole = [sequence for step in range(12) for sequence in plain.step(step)]
    rewinds = [plain.rewind(4, 2), plain.rewind(5, 4)]
    assert rewinds == [Rewind(4, 2, 16, 16), Rewind(5, 4, 32, 8)]
    # After the first cut the 32nd sequence is the 48th of the whole order.
    expected = whole[:16] + whole[32:48] + whole[56:]
    skipping = TrainingOrder(23, 8, 5, rewinds)
    assert [sequence for step in range(8) for sequence in skipping.step(step)] == expected[:64]
