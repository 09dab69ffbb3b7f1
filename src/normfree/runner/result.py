"""Studies from Python: running one, loading one, and its results as an object for notebooks."""

from __future__ import annotations

import html
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.console import Console
from transformers.utils import logging

from normfree.columns import EVAL_LOSS
from normfree.errors import InputError, RunFailedError
from normfree.files import DEFAULT_CACHE_DIR, check_output_folder
from normfree.locks import locked
from normfree.processes import check_alone
from normfree.progress import shown_on
from normfree.report import FIGURES_FOLDER, formatted, table_notes
from normfree.runner.catalog import Found, find_study
from normfree.runner.driver import failure_summary
from normfree.runner.execution import DEFAULT_RETRIES, Execution, study_command
from normfree.runner.executors import Executor, make_executor
from normfree.runner.opening import OpenCollection, OpenStudy, begin, open_folder
from normfree.runner.presets import Preset, load_preset
from normfree.runner.reporting import REPORT_FILE
from normfree.runner.run_frames import eval_curve_frame, head_entropy_frame, layer_entropy_frame
from normfree.training.run_folder import RESULTS_FILE

LINE_WIDTH = 110


class StudyResult:
    """The finished runs of a study, read from its folder; made by :func:`run_study` and :func:`load_study`.

    A notebook shows the table. Results are read once: load the study again after more runs have finished.

    Attributes:
        name: the study's.
        folder: the study's folder.
        failures: reasons of permanent failures, by run folder below the study's; empty for a study that was loaded.
    """

    def __init__(self, opened: OpenStudy | OpenCollection, failures: Mapping[str, str] | None = None) -> None:
        self._opened = opened
        self._pages = [each.page for each in opened.members]
        self.name = opened.name
        self.folder = opened.path
        self.failures = dict(failures or {})

    @property
    def table(self) -> pd.DataFrame:
        """The report's table: a row a configuration (see :func:`normfree.report.perplexity_table`)."""
        return self._opened.tables["table"]

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """``table``, and ``tuned_table`` (configurations at their own best learning rates) if the baseline has one."""
        return self._opened.tables

    @property
    def results(self) -> pd.DataFrame:
        """What ``results.csv`` holds: a row a run; of a collection, its table."""
        return self._opened.runs

    @property
    def report(self) -> Path | None:
        """The page ``report.html``, opened by any browser; None before :meth:`write_report` has written it."""
        path = self.folder / REPORT_FILE
        return path if path.exists() else None

    @property
    def figures(self) -> dict[str, Path]:
        """The report's figures: PNG files by name, each with a PDF of the same name next to it.

        Figures of a collection's studies are named ``STUDY/FIGURE``.
        """
        found = {path.stem: path for path in sorted((self.folder / FIGURES_FOLDER).glob("*.png"))}
        for study in self.studies.values():
            found |= {f"{study.folder.name}/{name}": path for name, path in study.figures.items()}
        return found

    @cached_property
    def studies(self) -> dict[str, StudyResult]:
        """The studies of a collection by their folders' names; none of a study."""
        if isinstance(self._opened, OpenStudy):
            return {}
        return {each.path.name: StudyResult(each) for each in self._opened.members}

    @cached_property
    def head_entropy(self) -> pd.DataFrame:
        """Entropy of every head in nats: final weights, evaluation tokens. As :mod:`normfree.plot` takes it."""
        return pd.concat([head_entropy_frame(page.results) for page in self._pages], ignore_index=True)

    @cached_property
    def layer_entropy(self) -> pd.DataFrame:
        """Entropy of every layer over training in nats. As :mod:`normfree.plot` takes it."""
        return pd.concat([layer_entropy_frame(page.results) for page in self._pages], ignore_index=True)

    @cached_property
    def eval_curve(self) -> pd.DataFrame:
        """Evaluation loss over training, in nats per token. As :mod:`normfree.plot` takes it."""
        return pd.concat([eval_curve_frame(page.results) for page in self._pages], ignore_index=True)

    def write_report(self) -> Path:
        """Writes ``results.csv``, ``figures/`` and ``report.html`` into the study's folder; returns the page's path.

        Raises:
            InputError: no run of the baseline is finished.
        """
        return self._opened.write()

    def __repr__(self) -> str:
        presets = dict.fromkeys(page.folder.preset_name for page in self._pages)
        n_runs = sum(len(page.results) for page in self._pages)
        best = self.table.loc[self.table[EVAL_LOSS].notna()].nsmallest(1, EVAL_LOSS)
        parts = [f"preset {', '.join(presets)}", f"{len(self.table)} configurations, {n_runs} runs"]
        parts += [f"lowest loss {row['eval_loss']:.3f} nats ({row['configuration']})" for _, row in best.iterrows()]
        parts += [f"failed runs: {len(self.failures)}"] if self.failures else []
        parts += ["no report yet"] if self.report is None else []
        return f"StudyResult({self.name}: {'; '.join(parts)}; {self.folder})"

    def _repr_html_(self) -> str:
        parts = [f"<p><b>{html.escape(self.name)}</b></p>"]
        for name, table in self.tables.items():
            if name != "table":
                parts.append("<p>Each configuration at its own best learning rate:</p>")
            notes = "".join(f"<li>{html.escape(note)}</li>" for note in table_notes(table))
            parts.append(f"{formatted(table).to_html(index=False, border=0, escape=True)}<ul>{notes}</ul>")
        if self.failures:
            parts.append(f"<p>{html.escape(failure_summary(self.failures))}</p>")
        report = "no report yet" if self.report is None else f"report: <code>{html.escape(str(self.report))}</code>"
        return f"<div>{''.join(parts)}<p>{report}</p></div>"


def load_study(path: str | Path, study: str | Path | None = None) -> StudyResult:
    """The study or collection in a folder that :func:`run_study` or ``normfree study`` has written; only reads.

    If a file of your own defines the study, name it as ``study``: its code is run, and code is never run because a
    folder names it.

    Raises:
        InputError: there is none, it is damaged, or no run of its baseline is finished; or a file defines the study,
            and it is not given or cannot be used.
    """
    result = StudyResult(open_folder(Path(path), study))
    _ = result.table  # a study that has nothing to show is refused here, not at the first attribute
    return result


def run_study(
    name: str | Path,
    preset: str | Path = "cpu",
    *,
    seeds: Iterable[int] | None = None,
    out: str | Path | None = None,
    tokens: int | None = None,
    steps: int | None = None,
    corpus: str | None = None,
    tokenizer: str | None = None,
    changes: Mapping[str, Any] | None = None,
    only: Sequence[str] | None = None,
    tune_lr: bool = False,
    workers: int | None = None,
    executor: Executor | None = None,
    retries: int = DEFAULT_RETRIES,
    device: str | None = None,
    cache_dir: str | Path = DEFAULT_CACHE_DIR,
    progress: bool | Console = True,
) -> StudyResult:
    """Trains the configurations of a study, compares them, and writes tables, figures and a report. ::

        normfree.run_study("relu-revival", preset="smoke", seeds=(0,), out="studies/smoke")

    The same call resumes a study that was stopped, by an interrupted notebook cell for instance. Random states are
    restored afterwards; no signal handler is installed.

    Args:
        name: of a study or collection; an unknown one lists them all. Or the path of a file of your own that defines a
            study (see :func:`normfree.runner.find_study`); its code is run.
        preset: the size: a preset's name, or a YAML file of the same form.
        seeds: default: the preset's.
        out: the study's folder; default ``studies/NAME-PRESET``.
        tokens: training budget of each run; or in optimizer ``steps``.
        corpus, tokenizer: as ``--corpus`` and ``--tokenizer`` of the command.
        changes: any values of the preset by dotted name, such as ``{"model.n_layer": 4}``.
        only: labels to train, with the baseline (in a collection, each study trains those it has); default: all.
        tune_lr: also give each configuration its own learning rate, from a short sweep.
        workers: processes that train runs at the same time; default: this process, one run after the other.
        executor: trains the runs instead, from :func:`normfree.runner.make_executor`.
        retries: how often a run that failed on workers is tried again.
        device: of training, also of workers: ``cpu``, ``cuda`` or ``cuda:N`` (no workers); default: CUDA if available.
        cache_dir: where tokenized corpora are kept.
        progress: print a line every half minute and at each evaluation; or the console to show progress on.

    Returns:
        The study. Runs that failed, where others could be compared, are in its ``failures``.

    Raises:
        InputError: an argument, the corpus or the folder cannot be used. Then nothing is written.
        RunFailedError: runs failed, and without them there is nothing to compare.
    """
    check_alone("a study", "leave the launcher out, and give workers to train several runs at once")
    if executor is not None and workers is not None:
        raise InputError("an executor has its own number of workers; give executor or workers, not both")
    engine, labels = executor or make_executor("local", {}, workers), tuple(only) if only else None
    wanted = dict(changes or {}) | _options(tokens=tokens, steps=steps, corpus=corpus, tokenizer=tokenizer)
    how = (checked_seeds(seeds), tune_lr, labels, engine, retries, device)
    execution = Execution(_console(progress), Path(cache_dir), *how)
    return _carry_out(find_study(name), str(preset), None if out is None else Path(out), wanted, execution)


def _carry_out(
    found: Found, preset: str, folder: Path | None, changes: dict[str, Any], execution: Execution
) -> StudyResult:
    name, console = found.study.name, execution.console
    folder = folder or Path("studies") / f"{name}-{Path(preset).stem}"
    if not (folder / RESULTS_FILE).exists():  # a finished study is read, and may be read-only
        check_output_folder(folder)

    def changed(preset: Preset) -> Preset:
        return preset.with_changes(**changes)

    begin(found, folder, preset, changed)  # a folder that is refused is not even locked
    reference = name if found.file is None else f"{found.file}:{name}"
    execution = replace(execution, command=study_command(reference, preset, folder, changes, execution))
    with execution.on_device(), locked(folder), _undisturbed(), shown_on(console):
        begun = begin(found, folder, preset, changed)
        described = load_preset(preset).description
        console.print(f"Study {name}, preset {Path(preset).stem}: {described}", highlight=False, soft_wrap=True)
        failures = begun.run(execution)
        try:
            begun.write()
        except InputError as error:
            if not failures:
                raise
            console.print(f"No report: {error}", highlight=False, soft_wrap=True)
            raise RunFailedError(f"{failure_summary(failures)}; the same command tries again") from error
    return StudyResult(begun, failures)


def _options(**given: int | str | None) -> dict[str, Any]:
    """Values of the preset by dotted name."""
    if given["tokens"] is not None and given["steps"] is not None:
        raise InputError("a budget is in tokens or in steps; give one of them")
    sections = {"tokens": "recipe", "steps": "recipe", "corpus": "data", "tokenizer": "data"}
    return {f"{sections[name]}.{name}": value for name, value in given.items() if value is not None}


def checked_seeds(seeds: Iterable[int] | None) -> list[int] | None:
    """The seeds of a study; None for the preset's.

    Raises:
        InputError: they are not different whole numbers from 0.
    """
    if seeds is None:
        return None
    chosen = list(seeds) if isinstance(seeds, Iterable) else []
    whole = [int(each) for each in chosen if isinstance(each, (int, np.integer)) and not isinstance(each, bool)]
    if not whole or len(set(whole)) < len(chosen) or min(whole) < 0:
        raise InputError(f"seeds must be different numbers from 0, such as 0,1,2; given: {seeds!r}")
    return whole


def _console(progress: bool | Console) -> Console:
    """Lines and no bars: a notebook or a log file would show a bar once for each of its moves."""
    if isinstance(progress, Console):
        return progress
    return Console(
        quiet=not progress, force_terminal=False, force_jupyter=False, force_interactive=False, width=LINE_WIDTH
    )


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Restores random number generators, which each run seeds, and the verbosity of transformers on exit."""
    python, numpy, verbosity = random.getstate(), np.random.get_state(), logging.get_verbosity()
    logging.set_verbosity_error()  # its warnings would break up the progress lines
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        logging.set_verbosity(verbosity)
