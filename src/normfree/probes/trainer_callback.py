"""Attention entropy in the log of transformers' Trainer, and of TRL's trainers."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from transformers.trainer_callback import CallbackHandler, TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from normfree.probes.entropy_row import Row
from normfree.probes.probed_steps import ProbesEntropy

UNDIVIDED = ("tp_size", "cp_size", "sp_size")
"""Sizes of accelerate's ParallelismConfig that divide the heads or the tokens of a sequence between processes."""


class EntropyCallback(ProbesEntropy, TrainerCallback):
    """Logs the attention entropy of every ``every``-th optimizer step, of any transformers Trainer or TRL trainer. ::

        trainer = Trainer(model, args, train_dataset=dataset, callbacks=[EntropyCallback(every=100)])

    The values reach ``state.log_history`` and every tracker of ``report_to`` as an entry of their own, at the step that
    they are of: ``entropy/mean``, ``entropy/L3``, ``entropy/L3H2`` (nats; layers and heads from 0),
    ``entropy/overloaded_share``, ``entropy/collapsed_share``, ``entropy/sink_share``, ``entropy/nan_scores`` and
    ``entropy/inf_scores``; :func:`normfree.probes.entropy_row.entropy_row` defines them.

    They are measured in the training step itself, over all its micro-batches and processes; only forward passes that
    compute gradients count, not evaluation, generation, a reference policy or recomputation. Losses, gradients and
    random numbers stay the same, bit for bit. Code compiled by ``torch.compile`` runs uncompiled in probed steps.
    Between probed steps nothing is attached anywhere, and the model is never changed.

    What cannot be read is named once in a warning; no error of the measurement reaches the training.

    Args:
        every: optimizer steps whose number, as the Trainer logs it, is a multiple of it are probed; with the Trainer's
            ``logging_first_step`` also the first.
        per_head: also log every head's entropy; without, the mean of each layer.
        alert_collapsed, alert_overloaded: warn when ``entropy/collapsed_share`` or ``entropy/overloaded_share`` rises
            above this share of the heads.
        on_alert: "warn", or "stop", which also ends the training after the step.

    Raises:
        InputError: a value of an argument that is not allowed.
    """

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._steps.abandon()  # a step that an exception has ended, such as one that took too much memory

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        step = state.global_step + 1
        is_first = step == 1 and args.logging_first_step
        if model is None or not (is_first or step % self.every == 0):
            return
        divided = [name for name in UNDIVIDED if (getattr(args.parallelism_config, name, None) or 1) > 1]
        if divided:
            self._steps.refuse(f"{divided[0]} > 1 divides attention between processes, which cannot be put together")
        else:
            self._steps.begin(model, step, is_compiled=args.torch_compile)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        if not self._steps.is_active:
            return control
        row = self._steps.finish()
        if row:
            _log(row, args, state, control)
        if self._steps.should_stop:
            control.should_training_stop = True
        return control

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._steps.abandon()


def _log(row: Row, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
    """Does what ``Trainer.log`` does, as an entry of its own.

    The ``log`` of TRL's trainers also empties the averages that they log next time, which are theirs to keep; and
    logging by ``control.should_log`` would shorten the Trainer's own averages of the loss.
    """
    logs: dict[str, Any] = dict(row)
    if state.epoch is not None:
        logs["epoch"] = state.epoch
    state.log_history.append({**logs, "step": state.global_step})
    handler = _calling_handler()
    if handler is not None:
        should_log = control.should_log
        handler.on_log(args, state, control, logs)
        control.should_log = should_log  # the log event clears it, and this step's own is still to come


def _calling_handler() -> CallbackHandler | None:
    """The CallbackHandler whose event this is: transformers gives callbacks neither it nor the Trainer."""
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, CallbackHandler):
            return caller
        frame = frame.f_back
    return None
