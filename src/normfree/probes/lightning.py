"""Attention entropy in the log of Lightning's Trainer: ``pip install "normfree[lightning]"``."""

from __future__ import annotations

from typing import Any

from normfree.probes.probed_steps import ProbesEntropy

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as missing:
    raise ImportError("Lightning is not installed; install it with: pip install lightning") from missing


class EntropyCallback(ProbesEntropy, Callback):
    """Logs the attention entropy of every ``every``-th optimizer step of a Lightning Trainer. ::

        from normfree.probes.lightning import EntropyCallback

        Trainer(callbacks=[EntropyCallback(every=100)]).fit(module, loader)

    Arguments, names, values and guarantees are those of :class:`normfree.EntropyCallback`; "stop" sets
    ``Trainer.should_stop``. Values also reach ``Trainer.callback_metrics``, for other callbacks to monitor. Loggers get
    each probed step once, whatever ``log_every_n_steps`` is, numbered from 0 as Lightning does.

    Raises:
        InputError: a value of an argument that is not allowed.
    """

    _begun_at: int | None = None
    """``global_step`` before the optimizer step that the latest batches are part of; None: no batch yet."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._steps.abandon()
        self._begun_at = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        before, self._begun_at = self._begun_at, trainer.global_step
        if before == trainer.global_step:
            return  # another batch of the same optimizer step
        # a module with several optimizers takes several steps a batch
        latest = trainer.global_step if before is None else before + 1
        if (trainer.global_step + 1) // self.every > latest // self.every:
            self._steps.begin(pl_module, trainer.global_step + 1)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._steps.is_active or trainer.global_step == self._begun_at:
            return
        row = self._steps.finish()
        if row:
            # Through log_dict, Lightning would drop the row between multiples of log_every_n_steps, and repeat it
            # with every later step of the epoch.
            pl_module.log_dict(row, on_step=True, on_epoch=False, logger=False)
            for logger in trainer.loggers:
                logger.log_metrics(row, step=trainer.global_step - 1)
        if self._steps.should_stop:
            trainer.should_stop = True

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._steps.abandon()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._steps.abandon()
