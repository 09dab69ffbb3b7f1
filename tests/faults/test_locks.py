"""Two processes never write into one folder; a dead one stands in nobody's way."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from filelock import FileLock

from normfree.errors import InputError
from normfree.locks import LOCK_FILE, OWNER_FILE, locked, sweep
from tests.forked import normfree

from .crash import in_child

Command = Callable[[Path], tuple[object, ...]]


@contextmanager
def another_process_in(folder: Path) -> Iterator[int]:
    """A process that holds ``folder``; gives its number."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        with locked(folder):
            os.write(write, b".")
            time.sleep(60)
        os._exit(0)
    os.read(read, 1)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def assert_told_and_stopped(command: tuple[object, ...], folder: Path, says: str) -> None:
    ended = in_child(normfree(*command), folder)
    assert ended.code == 2, ended.output
    assert [line for line in ended.output.splitlines() if line.startswith("normfree: ")] == [
        ended.output.strip().splitlines()[-1]
    ]
    assert says in ended.output
    assert "Traceback" not in ended.output


def test_the_second_process_is_told_who_has_the_run_and_stops(train_command: Command, tmp_path: Path) -> None:
    with another_process_in(tmp_path / "run") as pid:
        assert_told_and_stopped(train_command(tmp_path), tmp_path, f"run is in use by process {pid} on ")
        assert not (tmp_path / "run" / "config.yaml").exists()
    assert in_child(normfree(*train_command(tmp_path)), tmp_path).code == 0


def test_the_second_process_is_told_who_has_the_study_and_stops(tmp_path: Path) -> None:
    command = ("study", "relu-revival", "--out", tmp_path / "study", "--cache-dir", tmp_path / "cache")
    with another_process_in(tmp_path / "study") as pid:
        assert_told_and_stopped(command, tmp_path, f"study is in use by process {pid} on ")
    assert not (tmp_path / "cache").exists()


def test_two_processes_that_claim_a_fresh_folder_at_once(tmp_path: Path) -> None:
    """Twelve processes rush to one folder again and again: never are two inside."""
    inside, children = tmp_path / "inside", []
    for number in range(12):
        pid = os.fork()
        if pid == 0:
            end = time.monotonic() + 0.4
            while time.monotonic() < end:
                try:
                    with locked(tmp_path / "fresh"):
                        os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
                        time.sleep(0.001 * (number % 3))
                        inside.unlink()
                except InputError:
                    time.sleep(0.002)
                except BaseException:
                    (tmp_path / f"{number}.error").write_text(traceback.format_exc())
            os._exit(0)
        children.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    assert codes == [0] * 12
    assert [path.read_text() for path in tmp_path.glob("*.error")] == []
    assert not (tmp_path / "fresh" / OWNER_FILE).exists()


@pytest.mark.parametrize("error", [FileNotFoundError, FileExistsError])
def test_a_folder_that_another_process_takes_away_is_made_again(
    error: type[OSError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its mkdir raises FileExistsError if the folder goes between its two checks."""
    acquire = FileLock.acquire

    def after_it_is_gone(lock: FileLock, **options: Any) -> Any:
        monkeypatch.setattr(FileLock, "acquire", acquire)
        (tmp_path / "run").rmdir()
        raise error

    monkeypatch.setattr(FileLock, "acquire", after_it_is_gone)
    with locked(tmp_path / "run"):
        assert (tmp_path / "run" / OWNER_FILE).exists()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_nothing_was_written_into_is_taken_away(tmp_path: Path) -> None:
    with locked(tmp_path / "new" / "run"):
        assert (tmp_path / "new" / "run" / OWNER_FILE).exists()
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path / "run"):
        (tmp_path / "run" / "kept").touch()
    assert sorted(each.name for each in (tmp_path / "run").iterdir()) == [LOCK_FILE, "kept"]


def leave_an_owner(folder: Path, **changes: Any) -> None:
    """What a process that was killed leaves: this one, but for ``changes``."""
    folder.mkdir()
    owner = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process_start": psutil.Process().create_time(),
        "slurm_job": None,
        "since": "2026-01-01 00:00:00",
    }
    (folder / OWNER_FILE).write_text(json.dumps({**owner, **changes}))


def dead_process() -> int:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


def test_a_dead_process_is_taken_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    leave_an_owner(tmp_path / "run", pid=dead_process())
    with locked(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / OWNER_FILE).read_text())["pid"] == os.getpid()
    assert "which is dead" in caplog.text


def test_the_name_of_a_dead_process_is_swept_out_of_a_finished_folder(tmp_path: Path) -> None:
    leave_an_owner(tmp_path / "dead", pid=dead_process())
    (tmp_path / "dead" / "results.csv").touch()
    sweep(tmp_path / "dead")
    assert sorted(each.name for each in (tmp_path / "dead").iterdir()) == [LOCK_FILE, "results.csv"]
    leave_an_owner(tmp_path / "living")
    sweep(tmp_path / "living")
    assert (tmp_path / "living" / OWNER_FILE).exists()


def test_a_process_whose_number_was_given_again_is_taken_over(tmp_path: Path) -> None:
    leave_an_owner(tmp_path / "run", process_start=psutil.Process().create_time() - 3600)
    with locked(tmp_path / "run"):
        pass


def test_a_living_process_is_believed_where_the_file_system_has_no_locks(tmp_path: Path) -> None:
    leave_an_owner(tmp_path / "run")
    with pytest.raises(InputError, match=f"in use by process {os.getpid()} on "), locked(tmp_path / "run"):
        pass
    assert (tmp_path / "run" / OWNER_FILE).exists()


def test_of_another_machine_nothing_is_known_and_the_way_out_is_told(tmp_path: Path) -> None:
    leave_an_owner(tmp_path / "run", host="node-7")
    with (
        pytest.raises(InputError, match=r"on node-7 .* delete .*\.lock\.json and give the same command again"),
        locked(tmp_path / "run"),
    ):
        pass
    (tmp_path / "run" / OWNER_FILE).unlink()
    with locked(tmp_path / "run"):
        pass


def test_a_requeued_slurm_job_goes_on_after_itself_on_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    leave_an_owner(tmp_path / "run", host="node-7", slurm_job="4711")
    with locked(tmp_path / "run"):
        pass
    (tmp_path / "run").rename(tmp_path / "other")
    leave_an_owner(tmp_path / "run", host="node-7", slurm_job="4712")
    with pytest.raises(InputError, match="on node-7"), locked(tmp_path / "run"):
        pass


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"pid": "x"}', "{}"])
def test_a_damaged_owner_file_keeps_nobody_out(tmp_path: Path, content: str) -> None:
    leave_an_owner(tmp_path / "run")
    host = {"host": socket.gethostname()}
    text = json.dumps({**json.loads(content), **host}) if content.startswith("{") and content != "{" else content
    (tmp_path / "run" / OWNER_FILE).write_text(text)
    with locked(tmp_path / "run"):
        pass
