"""Entropies that two processes log of one training step: those of both their batches."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import normfree
from tests.probes.small_models import build
from tests.probes.training import examples, expected_row, rows_of, train

from .launch import together

ATOL = 2e-5


def assert_rows(row: dict[str, float], expected: dict[str, float]) -> None:
    assert row.keys() == expected.keys()
    for name in expected:
        assert np.isclose(row[name], expected[name], rtol=0, atol=ATOL), name


def test_trainer_with_two_processes(tmp_path: Path) -> None:
    def job() -> None:
        torch.set_num_threads(1)
        trainer, recorded = train(
            build("llama"),
            tmp_path,
            [normfree.EntropyCallback(every=2)],
            gradient_accumulation_steps=2,
            per_device_train_batch_size=2,
            max_steps=2,
        )
        rank = trainer.args.process_index
        ids = [[each.tolist() for each in batch.values()] for batch in recorded.batches[1]]
        names = list(recorded.batches[1][0])
        (tmp_path / f"{rank}.json").write_text(json.dumps([rows_of(trainer), names, ids]))
        recorded.models[1].save_pretrained(tmp_path / f"model-{rank}")

    ended = together(2, job, tmp_path)
    assert ended.codes == [0, 0], ended.output
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert found[0][0] == found[1][0]
    assert list(found[0][0]) == ["2"]
    batches = [
        dict(zip(names, (torch.tensor(each) for each in batch), strict=True))
        for _, names, all_ids in found
        for batch in all_ids
    ]
    assert len(batches) == 4
    assert not torch.equal(batches[0]["input_ids"], batches[2]["input_ids"])
    model = build("llama").from_pretrained(tmp_path / "model-0")
    assert_rows(found[0][0]["2"], expected_row(model, batches))


def test_monitor_with_two_processes(tmp_path: Path) -> None:
    def batch(rank: int) -> dict[str, torch.Tensor]:
        rows = examples(4, n_token=8 + 4 * rank, seed=rank)
        return {name: torch.stack([each[name] for each in rows]) for name in rows[0]}

    def job() -> None:
        torch.set_num_threads(1)
        torch.distributed.init_process_group("gloo")
        rank = torch.distributed.get_rank()
        model = DistributedDataParallel(build("llama"))
        with normfree.EntropyMonitor(model, every=1) as monitor:
            with monitor.step(0) as row:
                model(**batch(rank)).loss.backward()
            (tmp_path / f"{rank}.json").write_text(json.dumps(row))
        torch.distributed.destroy_process_group()

    ended = together(2, job, tmp_path)
    assert ended.codes == [0, 0], ended.output
    rows = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert rows[0] == rows[1]
    assert_rows(rows[0], expected_row(build("llama"), [batch(0), batch(1)]))


def test_monitor_of_a_sharded_model(tmp_path: Path) -> None:
    def batch(rank: int) -> dict[str, torch.Tensor]:
        rows = examples(2, seed=rank)
        return {name: torch.stack([each[name] for each in rows]) for name in rows[0]}

    def job() -> None:
        torch.set_num_threads(1)
        torch.distributed.init_process_group("gloo")
        rank = torch.distributed.get_rank()
        model = build("llama")
        for block in model.model.layers:
            fully_shard(block)
        fully_shard(model)
        monitor = normfree.EntropyMonitor(model)
        with monitor.step(0) as row:
            model(**batch(rank)).loss.backward()
        (tmp_path / f"{rank}.json").write_text(json.dumps(row))
        torch.distributed.destroy_process_group()

    ended = together(2, job, tmp_path)
    assert ended.codes == [0, 0], ended.output
    rows = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert rows[0] == rows[1]
    assert_rows(rows[0], expected_row(build("llama"), [batch(0), batch(1)]))
