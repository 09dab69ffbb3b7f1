"""Messages stand for rounds: with a delay on every link, a run takes about one delay longer for each message."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from normfree_private.environment import Engine
from normfree_private.measurement import PROTOCOLS, Program
from normfree_private.operations import Operation
from normfree_private.parties import free_ports, run_parties
from normfree_private.profile import parse_profiles
from tests.private.delayed_links import delayed_links

pytestmark = pytest.mark.engine

OPERATIONS = {
    "relu": Operation("relu", ((8, 32),)),
    "layernorm": Operation("layernorm", ((8, 32), (32,), (32,)), (("eps", 1e-5),)),
}
DELAY_SECONDS = 0.05


def run(engine: Engine, protocol: str, folder: Path, delay_seconds: float) -> list[tuple[float, float]]:
    """Seconds and messages of a party, of each operation: the fastest of two runs after the first."""
    n_party = PROTOCOLS[protocol].n_party
    programs = [Program.of(operation) for operation in OPERATIONS.values()]
    job = {
        "protocol": PROTOCOLS[protocol].name,
        "n_party": n_party,
        "field": "FM64",
        "fraction_bits": 18,
        "runs": 3,
        "timeout_seconds": 60,
        "programs": [dict(program.description) for program in programs],
    }
    folder.mkdir()
    (folder / "job.json").write_text(json.dumps(job))
    for i, program in enumerate(programs):
        (folder / str(i)).mkdir()
        inputs: dict[str, Any] = {**program.inputs}
        public: dict[str, Any] = {**program.public}
        np.savez(folder / str(i) / "inputs.npz", **inputs)
        np.savez(folder / str(i) / "public.npz", **public)
    subprocess.run(engine.command("prepare.py", folder), check=True, capture_output=True)
    ports = free_ports(2 * n_party)
    own, delayed = ports[:n_party], ports[n_party:]
    commands = [
        engine.command("party.py", folder, rank, *(own[i] if i == rank else delayed[i] for i in range(n_party)))
        for rank in range(n_party)
    ]
    with delayed_links(dict(zip(delayed, own, strict=True)), delay_seconds):
        printed = run_parties(commands, folder, timeout_seconds=60)
    profiles = [parse_profiles(text) for text in printed]
    found = []
    for start in range(0, 3 * len(programs), 3):
        seconds = min(max(each[start + i].seconds for each in profiles) for i in (1, 2))
        found.append((seconds, sum(each[start + 2].messages_sent for each in profiles) / n_party))
    return found


@pytest.mark.parametrize("protocol", ["semi2k", "aby3"])
def test_a_message_waits_for_one_delay(engine: Engine, protocol: str, tmp_path: Path) -> None:
    near = run(engine, protocol, tmp_path / "near", 0.0)
    far = run(engine, protocol, tmp_path / "far", DELAY_SECONDS)
    for (seconds, messages), (delayed_seconds, messages_again) in zip(near, far, strict=True):
        assert messages == pytest.approx(messages_again, rel=0.1)
        rounds = (delayed_seconds - seconds) / DELAY_SECONDS
        assert rounds == pytest.approx(messages, rel=0.25)
