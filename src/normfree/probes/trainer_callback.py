"""Attention entropy in the log of transformers' and TRL's trainers."""

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
    """Logs the attention entropy of every ``every``-th optimizer step, in any transformers or TRL trainer. ::

        trainer = Trainer(model, args, train_dataset=dataset, callbacks=[EntropyCallback(every=100)])

    Each probed step has an entry of its own in ``state.log_history`` and every tracker of ``report_to``, with
    ``entropy/mean``, ``entropy/L3``, ``entropy/L3H2`` (nats; layers and heads from 0), ``entropy/overloaded_share``,
    ``entropy/collapsed_share``, ``entropy/sink_share``, ``entropy/nan_scores`` and ``entropy/inf_scores``
    (:func:`normfree.probes.entropy_row.entropy_row`).

    They are measured in the training step itself, over all its micro-batches and processes. Only forward passes that
    compute gradients count: not evaluation, generation, a reference policy or recomputation. Losses, gradients and
    random numbers stay the same, bit for bit. Code compiled by ``torch.compile`` runs uncompiled in probed steps.
    Nothing is attached between probed steps, and the model is never changed.

    Unreadable layers are named once in a warning; no error of the measurement reaches the training.

    Args:
        every: optimizer steps whose number, as the Trainer logs it, is a multiple of it are probed, and the first with
            the Trainer's ``logging_first_step``.
        per_head: log every head's entropy, not only each layer's mean.
        alert_collapsed, alert_overloaded: warn when ``entropy/collapsed_share`` or ``entropy/overloaded_share`` rises
            above this share of the heads.
        on_alert: "warn", or "stop", which also ends the training after the step.

    Raises:
        InputError: a value of an argument that is not allowed.
    """

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._steps.abandon()  # a step that ended in an exception, such as out of memory

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
    """Logs as ``Trainer.log`` does, without its side effects.

    ``log`` of TRL's trainers empties their running averages, and ``control.should_log`` would shorten the Trainer's
    average of the loss.
    """
    logs: dict[str, Any] = dict(row)
    if state.epoch is not None:
        logs["epoch"] = state.epoch
    state.log_history.append({**logs, "step": state.global_step})
    handler = _calling_handler()
    if handler is not None:
        should_log = control.should_log
        handler.on_log(args, state, control, logs)
        control.should_log = should_log  # cleared by the log event, but the step's own entry comes later


def _calling_handler() -> CallbackHandler | None:
    """The CallbackHandler that calls; transformers gives callbacks neither it nor the Trainer."""
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, CallbackHandler):
            return caller
        frame = frame.f_back
    return None
