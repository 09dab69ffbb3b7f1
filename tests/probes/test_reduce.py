"""Statistics summed over processes equal those of one process that saw everything."""

import torch

from normfree.probes import EntropyProbe
from tests.distributed.launch import together

from .small_models import batch_of, build

BATCHES = [("left", 12), ("none", 7)]
N_PROCESS = 2


def probe_batches(ranks):
    model = build("gpt2")
    with EntropyProbe(model, count_nonfinite=True) as probe, torch.no_grad():
        for rank in ranks:
            padding, n_token = BATCHES[rank]
            model(**batch_of(padding, n_token=n_token, seed=rank))
    return probe


def results_of(probe):
    return [probe.per_head(), probe.per_position(), probe.maximum(), probe.sink_share(), probe.rows()]


def one_process(folder):
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    probe = probe_batches([rank])
    probe.reduce()
    torch.save(results_of(probe), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_give_what_one_gives(tmp_path):
    ended = together(N_PROCESS, lambda: one_process(tmp_path), tmp_path)
    assert ended.codes == [0, 0], ended.output
    expected = results_of(probe_batches(range(N_PROCESS)))
    for rank in range(N_PROCESS):
        for mine, right in zip(torch.load(tmp_path / f"{rank}.pt"), expected, strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_one_process_alone_needs_no_reduction():
    probe = probe_batches([0])
    before = results_of(probe)
    probe.reduce()
    assert all(torch.equal(left, right) for left, right in zip(before, results_of(probe), strict=True))
