"""A run over two processes is the run of one process: the terms and the thresholds too."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from normfree.data import PackedData
from normfree.training import RunConfig, train
from tests.distributed.launch import together

from .test_entropy_regularization import metric, regularized, thresholds


def test_two_processes_train_like_one(data: PackedData, tiny_run: Callable[..., RunConfig], tmp_path: Path) -> None:
    run = regularized(
        tiny_run(steps=4, learning_rate=0.01, batch_size=8, micro_batch_size=2), weight=2.0, tolerance=0.1
    )
    alone = train(run, data, tmp_path / "alone")
    ended = together(2, lambda: train(run, data, tmp_path / "shared"), tmp_path)
    assert ended.codes == [0, 0], ended.output
    shared = train(run, data, tmp_path / "shared")
    for name in ("train_loss", "cross_entropy_nats", "entropy_penalty", "grad_norm"):
        np.testing.assert_allclose(metric(shared, name), metric(alone, name), rtol=1e-5)
    np.testing.assert_allclose(thresholds(shared), thresholds(alone), rtol=1e-5)
    assert (thresholds(shared) != 0.5).all()
