"""Progress of training: the whole work in tokens, and the steps of the run that trains."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from types import TracebackType

from normfree.columns import EVAL_LOSS, TRAIN_LOSS
from normfree.progress import Stage, display, duration, stage
from normfree.training.callback import Callback, RunState
from normfree.training.training_plan import TrainingPlan

ESTIMATED_AFTER = 10.0
"""Seconds of training after which a line says how long all of it will take; shorter work is over by then."""


class StudyProgress:
    """A context manager that shows the progress of one or more runs, counted in tokens.

    Lines say what a run takes before it begins, and the time of all of it from the first steps. Where there is no
    terminal, each evaluation prints a line too.
    """

    def __init__(self, total_tokens: float, description: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._total = total_tokens
        self._description = description
        self._clock = clock
        self._skipped_tokens = 0.0
        self._first: tuple[float, float] | None = None
        self._runs: list[RunProgress] = []
        self._is_estimated = False
        self._plans: set[tuple[int, int]] = set()

    def __enter__(self) -> StudyProgress:
        self._whole = stage(self._description, self._total, unit="tokens")
        self._done = 0.0
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for run in self._runs:
            run.close()  # still open after an exception
        self._whole.close()

    def skip(self, tokens: float) -> None:
        """Takes tokens that were trained on earlier out of the work ahead."""
        self._skipped_tokens += tokens
        self._total -= tokens
        self._whole.update(total=self._total)

    def repeat(self, tokens: float) -> None:
        """Adds tokens that are trained on again, by a run that went back to a checkpoint, to the work ahead."""
        self._total += tokens
        self._whole.update(total=self._total)

    def show(self, done_tokens: float, total_tokens: float, note: str) -> None:
        """Sets the work to ``done_tokens`` of ``total_tokens``, both with the tokens of :meth:`skip`."""
        self._done, self._total = done_tokens - self._skipped_tokens, total_tokens - self._skipped_tokens
        self._whole.update(done=self._done, total=self._total, note=note)
        self._estimate()

    def advance(self, tokens: float) -> None:
        """``tokens`` more were trained on."""
        self._done += tokens
        self._whole.advance(tokens)
        self._estimate()

    def run(self, description: str, tokens: float) -> RunProgress:
        """The callback that shows one run while it trains."""
        self._runs.append(RunProgress(self, description, tokens))
        return self._runs[-1]

    def say_plan(self, description: str, plan: TrainingPlan) -> None:
        """A line for the plan of a run, unless an earlier run had the same steps and tokens."""
        if (plan.steps, plan.tokens) not in self._plans:
            self._plans.add((plan.steps, plan.tokens))
            display().say(f"{description}: {plan}")

    def _estimate(self) -> None:
        """Says once how long the work takes. The first step is slower than the others, and is left out."""
        if self._is_estimated or self._done <= 0:
            return
        now = self._clock()
        if self._first is None:
            self._first = now, self._done
            return
        seconds, tokens = now - self._first[0], self._done - self._first[1]
        if seconds < ESTIMATED_AFTER or tokens <= 0:
            return
        self._is_estimated = True
        left = max(0.0, self._total - self._done) * seconds / tokens
        display().say(
            f"{self._description}: {tokens / seconds:,.0f} tokens a second in the first steps, about {duration(left)} "
            "for all"
        )


class RunProgress(Callback):
    """Shows one run of a :class:`StudyProgress` while it trains."""

    def __init__(self, study: StudyProgress, description: str, tokens: float) -> None:
        self._study = study
        self._description = description
        self._tokens = tokens
        self._reached: float | None = None
        self._notes: dict[str, str] = {}
        self._stage: Stage | None = None

    def begin(self, run: RunState) -> None:
        self.close()  # a run that went back to a checkpoint begins again
        if run.plan is not None:
            self._study.say_plan(self._description, run.plan)
        self._per_step = self._tokens / run.n_steps
        self._stage = stage(self._description, run.n_steps, done=run.step, unit="steps")
        resumed = run.step * self._per_step
        if self._reached is None:
            self._study.skip(resumed)
        else:
            self._study.repeat(self._reached - resumed)
        self._reached = resumed

    def end_step(self, run: RunState) -> None:
        assert self._stage is not None, "begin() comes first"
        assert self._reached is not None, "begin() comes first"
        self._stage.advance()
        self._reached += self._per_step
        self._study.advance(self._per_step)

    def log(self, run: RunState, entries: Mapping[str, float]) -> None:
        if TRAIN_LOSS in entries:
            self._notes["train"] = f"loss {entries[TRAIN_LOSS]:.3f}"
        if EVAL_LOSS in entries:
            loss = entries[EVAL_LOSS]
            self._notes["eval"] = f"eval {loss:.3f}"
            if not display().console.is_terminal:
                display().say(
                    f"{self._description}: step {run.step}/{run.n_steps}, "
                    f"evaluation loss {loss:.4f} (perplexity {math.exp(min(loss, 700.0)):.2f})"
                )
        if self._stage is not None:
            self._stage.update(note="  ".join(self._notes.values()))

    def finish(self, run: RunState) -> None:
        self.close()

    def close(self) -> None:
        """Shows the run no longer. Safe to call at any time."""
        if self._stage is not None:
            self._stage.close()
            self._stage = None
