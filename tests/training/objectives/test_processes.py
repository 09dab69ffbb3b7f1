"""A run over two processes is the run of one process: the terms and the thresholds too."""

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as mp

from normfree.data import PackedData
from normfree.training import RunConfig, train
from normfree.training.run_folder import CONFIG_FILE

from .test_entropy_regularization import metric, regularized, thresholds

N_PROCESS = 2


def one_process(rank: int, port: int, run: RunConfig, data: PackedData, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(N_PROCESS),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    )
    while rank > 0 and not (folder / CONFIG_FILE).exists():
        time.sleep(0.05)
    train(run, data, folder)


def test_two_processes_train_like_one(data: PackedData, tiny_run: Callable[..., RunConfig], tmp_path: Path) -> None:
    run = regularized(
        tiny_run(steps=4, learning_rate=0.01, batch_size=8, micro_batch_size=2), weight=2.0, tolerance=0.1
    )
    alone = train(run, data, tmp_path / "alone")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(one_process, args=(port, run, data, tmp_path / "together"), nprocs=N_PROCESS)
    together = train(run, data, tmp_path / "together")
    for name in ("train_loss", "cross_entropy_nats", "entropy_penalty", "grad_norm"):
        np.testing.assert_allclose(metric(together, name), metric(alone, name), rtol=1e-5)
    np.testing.assert_allclose(thresholds(together), thresholds(alone), rtol=1e-5)
    assert (thresholds(together) != 0.5).all()
