"""Disks, files and machines that fail: the last good state stays, is found, and one line says what happened."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from normfree.training import loop, records
from normfree.training.checkpoint import Checkpointed
from normfree.training.run_folder import checkpoints, damage, last_checkpoint
from tests.forked import normfree

from .crash import Ended, Kill, in_child
from .test_kill_and_resume import state_of

Command = Callable[[Path], tuple[object, ...]]
FULL = "No space left on device"


def last_line(ended: Ended) -> str:
    assert "Traceback" not in ended.output
    line = ended.output.strip().splitlines()[-1]
    assert line.startswith("normfree: "), ended.output
    return line


@pytest.fixture(scope="module")
def whole(run_content: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is left by the command that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "run.yaml").write_text(yaml.safe_dump(run_content))
    (folder / "done").mkdir()
    out = ("--out", folder / "done" / "run", "--cache-dir", folder / "done" / "cache")
    assert in_child(normfree("train", folder / "run.yaml", *out), folder / "done").code == 0
    return folder / "done"


@pytest.fixture(scope="module")
def killed(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed") / "stopped"
    folder.mkdir()
    shutil.copytree(whole / "cache", folder / "cache")
    command = ("train", whole.parent / "run.yaml", "--out", folder / "run", "--cache-dir", folder / "cache")
    ended = in_child(normfree(*command), folder, Kill(before=("os.rename", ".checkpoint-11")))
    assert ended.code == -signal.SIGKILL
    return folder


@pytest.fixture
def stopped(killed: Path, tmp_path: Path) -> Path:
    """What is left by the command when it is killed after its tenth step; checkpoints 8 and 10 are there."""
    folder = tmp_path / "stopped"
    shutil.copytree(killed, folder)
    assert [each.name for each in checkpoints(folder / "run")] == ["checkpoint-8", "checkpoint-10"]
    return folder


def assert_goes_on(command: tuple[object, ...], folder: Path, whole: Path) -> Ended:
    """The same command ends like one that nothing happened to."""
    ended = in_child(normfree(*command), folder)
    assert ended.code == 0, ended.output
    assert "Traceback" not in ended.output
    found, expected = state_of(folder), state_of(whole)
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    return ended


# --- a disk that is full -------------------------------------------------------------------------------------------


def full_for_files_above(n_bytes: int, job: Callable[[], None]) -> Callable[[], None]:
    """The job, in a process whose files cannot grow beyond a size: the system refuses the write as on a full disk."""

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))
        job()

    return limited


def test_a_disk_that_fills_up_while_a_checkpoint_is_written(train_command: Command, stopped: Path, whole: Path) -> None:
    """RLIMIT_FSIZE between the sizes of the telemetry's tables and of the weights."""
    weights = (whole / "run" / "checkpoint-11" / "model.safetensors").stat().st_size
    tables = max((whole / "run" / name).stat().st_size for name in ("metrics.parquet", "layers.parquet"))
    assert tables < weights
    command = train_command(stopped)
    ended = in_child(full_for_files_above(weights - 1, normfree(*command)), stopped)
    assert ended.code == 1
    assert "cannot write" in last_line(ended)
    assert "checkpoint-11" in last_line(ended)
    assert "checkpoint-10 is the last good one; make room and give the same command again to resume" in last_line(ended)
    assert [each.name for each in checkpoints(stopped / "run")] == ["checkpoint-8", "checkpoint-10"]
    assert_goes_on(command, stopped, whole)


@pytest.mark.parametrize("name", ["optimizer.pt", "trainer_state.json"])
def test_no_space_for_any_file_of_a_checkpoint(
    train_command: Command, stopped: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The device file that is always full takes the file's place."""
    save = Checkpointed.save

    def save_next_to_it(self: Checkpointed, folder: Path) -> None:
        (folder / name).symlink_to("/dev/full")
        save(self, folder)

    monkeypatch.setattr(Checkpointed, "save", save_next_to_it)
    command = train_command(stopped)
    ended = in_child(normfree(*command), stopped)
    assert ended.code == 1, ended.output
    assert "checkpoint-10 is the last good one" in last_line(ended)
    monkeypatch.undo()
    assert_goes_on(command, stopped, whole)


def no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, FULL)


def test_a_disk_that_fills_up_while_telemetry_is_written(
    train_command: Command, stopped: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pq.ParquetWriter, "write_table", no_space)
    command, before = train_command(stopped), pd.read_parquet(stopped / "run" / records.METRICS_FILE)
    ended = in_child(normfree(*command), stopped)
    assert ended.code == 1
    assert f"{FULL}; once that is fixed, the same command resumes from the last checkpoint" in last_line(ended)
    pd.testing.assert_frame_equal(pd.read_parquet(stopped / "run" / records.METRICS_FILE), before)
    monkeypatch.undo()
    assert_goes_on(command, stopped, whole)


def test_a_disk_that_fills_up_while_tokens_are_packed(train_command: Command, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "full"
    folder.mkdir()
    n_bytes = next((whole / "cache").glob("*/train.npy")).stat().st_size
    command = train_command(folder)
    ended = in_child(full_for_files_above(n_bytes - 1, normfree(*command)), folder)
    assert ended.code == 1
    last_line(ended)
    assert not (folder / "run").exists()
    assert list((folder / "cache").iterdir()) == []
    assert_goes_on(command, folder, whole)


# --- files that are not as they were written -----------------------------------------------------------------------


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("name", "harm", "says"),
    [
        ("model.safetensors", truncated, "model.safetensors has"),
        ("optimizer.pt", flipped, "optimizer.pt is not as it was written: its SHA-256 differs"),
        ("rng_state.pth", Path.unlink, "rng_state.pth is missing"),
        ("checkpoint.json", truncated, "checkpoint.json is not as it was written"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(
    train_command: Command, stopped: Path, whole: Path, name: str, harm: Callable[[Path], None], says: str
) -> None:
    harm(stopped / "run" / "checkpoint-10" / name)
    found = last_checkpoint(stopped / "run")
    assert found is not None
    assert found.name == "checkpoint-8"
    ended = assert_goes_on(train_command(stopped), stopped, whole)
    assert f"checkpoint-10 cannot be used and is passed over: {says}" in ended.output


def test_a_checkpoint_of_another_run_is_passed_over(train_command: Command, stopped: Path, whole: Path) -> None:
    manifest = stopped / "run" / "checkpoint-10" / "checkpoint.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "run": "0123456789abcdef"}))
    ended = assert_goes_on(train_command(stopped), stopped, whole)
    assert "checkpoint-10 cannot be used and is passed over: it belongs to another run" in ended.output


def test_a_checkpoint_of_another_program_is_passed_over(train_command: Command, stopped: Path, whole: Path) -> None:
    checkpoint = stopped / "run" / "checkpoint-10"
    (checkpoint / "checkpoint.json").unlink()
    (checkpoint / "config.json").write_text('{"model_type": "gpt2"}')
    ended = assert_goes_on(train_command(stopped), stopped, whole)
    assert "it is of another program (model type gpt2)" in ended.output


def test_a_run_whose_checkpoints_are_all_damaged_begins_again(
    train_command: Command, stopped: Path, whole: Path
) -> None:
    for checkpoint in checkpoints(stopped / "run"):
        truncated(checkpoint / "optimizer.pt")
    ended = assert_goes_on(train_command(stopped), stopped, whole)
    assert ended.output.count("cannot be used and is passed over") >= 2


def test_a_checkpoint_of_before_there_were_manifests_is_used(
    train_command: Command, stopped: Path, whole: Path
) -> None:
    (stopped / "run" / "checkpoint-10" / "checkpoint.json").unlink()
    assert damage(stopped / "run" / "checkpoint-10") is None
    assert "passed over" not in in_child(normfree(*train_command(stopped)), stopped).output


@pytest.mark.parametrize(
    ("name", "harm"),
    [("train.npy", truncated), ("eval.npy", flipped), ("tokenizer/tokenizer.json", flipped), ("data.json", flipped)],
)
def test_damaged_tokens_are_packed_again(
    train_command: Command, stopped: Path, whole: Path, name: str, harm: Callable[[Path], None]
) -> None:
    (path,) = (stopped / "cache").glob(f"*/{name}")
    harm(path)
    assert_goes_on(train_command(stopped), stopped, whole)


@pytest.mark.parametrize("name", ["metrics.parquet", "layers.parquet"])
def test_damaged_telemetry_stops_the_run_before_it_is_written_over(
    train_command: Command, stopped: Path, name: str
) -> None:
    path = stopped / "run" / name
    truncated(path)
    before = path.read_bytes()
    ended = in_child(normfree(*train_command(stopped)), stopped)
    assert ended.code == 2
    assert f"{name} cannot be read: it is missing or damaged" in last_line(ended)
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["results.csv", "sequence_losses.parquet", "head_entropy.parquet"])
def test_damaged_results(train_command: Command, whole: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(whole, folder)
    (folder / "run" / name).write_bytes(b"")
    ended = in_child(normfree(*train_command(folder)), folder)
    assert ended.code == 2
    assert f"{name} cannot be read" in last_line(ended)
    # What the message says does mend it: the last checkpoint is measured again.
    (folder / "run" / "results.csv").unlink()
    assert_goes_on(train_command(folder), folder, whole)


# --- places, machines and corpora ----------------------------------------------------------------------------------


def as_nobody(job: Callable[[], None]) -> Callable[[], None]:
    """The job without root's rights, for whom no folder is read-only."""

    def demoted() -> None:
        if os.getuid() == 0:
            os.setuid(65534)
        job()

    return demoted


def test_a_read_only_output_folder(whole: Path, run_file: Path, small_corpus: Path, tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents[:2], small_corpus, whole, *whole.parents[:1]):
        folder.chmod(folder.stat().st_mode | 0o055)
    (tmp_path / "locked").mkdir(mode=0o555)
    command = ("train", run_file, "--out", tmp_path / "locked" / "run", "--cache-dir", whole / "cache")
    ended = in_child(as_nobody(normfree(*command)), tmp_path)
    assert ended.code == 2, ended.output
    assert "Permission denied" in last_line(ended)
    assert list((tmp_path / "locked").iterdir()) == []


def test_an_output_folder_that_is_a_file(train_command: Command, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("years of work")
    ended = in_child(normfree(*train_command(tmp_path)), tmp_path)
    assert ended.code == 2
    assert "run is a file; give another output folder" in last_line(ended)
    assert (tmp_path / "run").read_text() == "years of work"


def test_a_data_loader_worker_that_dies(
    train_command: Command, stopped: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop has no workers; with one in place, its death ends the run and loses nothing."""

    def die(self: Any, indices: list[int]) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(loop, "WORKERS", 1)
    monkeypatch.setattr("normfree.data.packed_sequences.PackedSequences.__getitems__", die)
    command = train_command(stopped)
    ended = in_child(normfree(*command), stopped)
    assert ended.code == 1
    assert "DataLoader worker" in last_line(ended)
    assert "the same command resumes from the last checkpoint" in last_line(ended)
    monkeypatch.undo()
    assert_goes_on(command, stopped, whole)


def test_a_clock_that_goes_backwards(
    train_command: Command, stopped: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An hour with every reading, and checkpoints that seem to come from the future."""
    now, calls = time.time(), iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: now - 3600 * next(calls))
    os.utime(stopped / "run" / "checkpoint-8", (now + 86400, now + 86400))
    assert_goes_on(train_command(stopped), stopped, whole)


def test_a_corpus_that_changed(run_content: dict[str, Any], small_corpus: Path, tmp_path: Path, whole: Path) -> None:
    corpus = shutil.copytree(small_corpus, tmp_path / "corpus")
    content = {**run_content, "data": {**run_content["data"], "corpus": f"directory:{corpus}"}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))

    def command(config: Path, out: str, cache: str = "cache") -> Ended:
        words = ("train", config, "--out", tmp_path / out, "--cache-dir", tmp_path / cache)
        return in_child(normfree(*words), tmp_path)

    assert command(tmp_path / "run.yaml", "run").code == 0
    first = (tmp_path / "run" / "results.csv").read_text()
    (corpus / "new.py").write_text("def new(): return 'a new document'\n" * 30)
    # The tokens it was trained on are still in the cache: it is the same run, here and elsewhere.
    assert command(tmp_path / "run.yaml", "run").code == 0
    assert command(tmp_path / "run" / "config.yaml", "again").code == 0
    assert (tmp_path / "again" / "results.csv").read_text() == first
    # Without them it is refused, and nothing is written.
    ended = command(tmp_path / "run" / "config.yaml", "elsewhere", cache="empty")
    assert ended.code == 2
    assert "has changed since they were made" in last_line(ended)
    assert not (tmp_path / "elsewhere").exists()


def test_a_rewritten_fingerprint_cannot_lead_out_of_the_cache(whole: Path, tmp_path: Path) -> None:
    content = yaml.safe_load((whole / "run" / "config.yaml").read_text())
    content["provenance"]["corpus_fingerprint"] = "../../secrets"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    command = ("train", tmp_path / "config.yaml", "--out", tmp_path / "run", "--cache-dir", tmp_path / "cache")
    ended = in_child(normfree(*command), tmp_path)
    assert ended.code == 2
    assert "is not 16 hexadecimal digits" in last_line(ended)


def test_the_random_numbers_of_a_checkpoint_are_all_there(whole: Path) -> None:
    """What is read back with ``torch.load(weights_only=True)``."""
    state = torch.load(whole / "run" / "checkpoint-11" / "scheduler.pt", weights_only=True)
    assert state["last_epoch"] == 11
