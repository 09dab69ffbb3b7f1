"""Telemetry by the events of transformers' Trainer."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from normfree.training.telemetry import Telemetry, all_finite


class TelemetryCallback(TrainerCallback):
    """Calls ``telemetry`` when the Trainer trains, and has it written before each checkpoint."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._telemetry.begin(state.global_step)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._telemetry.begin_step(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._telemetry.end_step()
        if control.should_save:
            if all_finite(kwargs["model"]):
                self._telemetry.records.flush()
            else:
                control.should_save = False  # the last good checkpoint is the one to resume from

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        self._telemetry.log(state.global_step, logs or {})
        if control.should_save:
            self._telemetry.records.flush()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._telemetry.finish(state.global_step)
