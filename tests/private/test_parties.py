"""Parties as processes, with scripts of a few lines in the engine's place."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from normfree_private.parties import EngineError, free_ports, run_parties

SLEEPS = "import time; time.sleep(60)"
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('on', flush=True); time.sleep(60)"


def script(folder: Path, text: str) -> list[str]:
    """A party that leaves its process id in ``folder`` first."""
    record = f"import os, pathlib; pathlib.Path({str(folder)!r}, f'pid-{{os.getpid()}}').touch()\n"
    return [sys.executable, "-c", record + text]


def process_ids(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("pid-")) for path in folder.glob("pid-*")]


def is_alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_outputs_come_back_in_order(tmp_path: Path) -> None:
    commands = [script(tmp_path, f"print('party', {rank})") for rank in range(3)]
    assert run_parties(commands, tmp_path, timeout_seconds=60) == [f"party {rank}\n" for rank in range(3)]


def test_a_party_that_fails_ends_the_others_and_says_why(tmp_path: Path) -> None:
    commands = [script(tmp_path, SLEEPS), script(tmp_path, "raise ValueError('shares do not fit')")]
    with pytest.raises(EngineError, match=r"party 1 of 2 failed with exit code 1, .*ValueError: shares do not fit"):
        run_parties(commands, tmp_path, timeout_seconds=60)
    assert not any(is_alive(each) for each in process_ids(tmp_path))


def test_a_party_that_is_killed_in_the_middle_ends_the_others(tmp_path: Path) -> None:
    found: list[EngineError] = []

    def run() -> None:
        with pytest.raises(EngineError) as caught:
            run_parties([script(tmp_path, SLEEPS)] * 3, tmp_path, timeout_seconds=60)
        found.append(caught.value)

    thread = threading.Thread(target=run)
    thread.start()
    wait_for(lambda: len(process_ids(tmp_path)) == 3)
    os.kill(process_ids(tmp_path)[0], signal.SIGKILL)
    thread.join(30)
    assert "was killed by SIGKILL, the others were ended" in str(found[0])
    assert "\n" not in str(found[0])
    assert not any(is_alive(each) for each in process_ids(tmp_path))


def test_parties_that_take_too_long_are_ended(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="2 parties did not finish within 1 s"):
        run_parties([script(tmp_path, SLEEPS)] * 2, tmp_path, timeout_seconds=1)
    assert not any(is_alive(each) for each in process_ids(tmp_path))


def test_a_party_that_ignores_the_request_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normfree_private.parties._GRACE_SECONDS", 0.1)
    failing = "import pathlib, time\nwhile not pathlib.Path('party-0.out').read_text(): time.sleep(0.01)\nexit(3)"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EngineError, match="party 1 of 2 failed with exit code 3"):
        run_parties([script(tmp_path, STUBBORN), script(tmp_path, failing)], tmp_path, timeout_seconds=60)
    assert not any(is_alive(each) for each in process_ids(tmp_path))


def test_free_ports_differ_and_can_be_listened_on() -> None:
    ports = free_ports(3)
    assert len(set(ports)) == 3
    for port in ports:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", port))
