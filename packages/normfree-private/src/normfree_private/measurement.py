"""One program under secure computation: compiled once, run by one process a party; and what the parties sent."""

from __future__ import annotations

import hashlib
import json
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from normfree.errors import InputError, unknown_name
from normfree.files import write_text
from normfree_private.environment import ENGINE_FOLDER, Engine
from normfree_private.export import Arrays
from normfree_private.operations import Operation
from normfree_private.parties import EngineError, free_ports, run_parties
from normfree_private.profile import parse_profiles

_BATCH = 8
"""Programs that one set of processes runs: starting them takes longer than most programs."""
FIELDS = {"fm64": 64, "fm128": 128}
"""Rings of the shares, and their bits."""


@dataclass(frozen=True)
class Protocol:
    """A protocol of the engine: its name there, its number of parties, and what it assumes.

    has_setup: its first run prepares the later ones, and is not counted.
    """

    name: str
    n_party: int
    assumption: str
    has_setup: bool = False


PROTOCOLS = {
    "semi2k": Protocol("SEMI2K", 2, "two semi-honest parties and a trusted dealer; online cost only"),
    "aby3": Protocol("ABY3", 3, "three semi-honest parties, no two of which collude"),
    "cheetah": Protocol(
        "CHEETAH",
        2,
        "two semi-honest parties, no dealer; homomorphic encryption and oblivious transfer",
        has_setup=True,
    ),
}


@dataclass(frozen=True)
class Settings:
    """How a program runs: the ring, the bits behind the binary point, the runs that count, the time limit of all."""

    protocol: Protocol
    field: str = "fm64"
    fraction_bits: int = 18
    runs: int = 3
    timeout_seconds: int = 600

    def __post_init__(self) -> None:
        if self.field not in FIELDS:
            raise unknown_name("field", self.field, FIELDS)
        if not 1 <= self.fraction_bits <= FIELDS[self.field] // 2 - 1:
            raise InputError(
                f"fraction bits {self.fraction_bits} leave no room in {self.field}; "
                f"give 1 to {FIELDS[self.field] // 2 - 1}"
            )
        if self.runs < 1 or self.timeout_seconds < 1:
            raise InputError(f"runs ({self.runs}) and timeout ({self.timeout_seconds} s) must be at least 1")


@dataclass(frozen=True)
class Cost:
    """Cost of one run: bytes and messages that each party sends, and seconds over loopback (median of the runs).

    Sums over the parties repeat exactly; which of three parties sends which message is drawn at random.
    """

    bytes_sent: tuple[int, ...]
    messages_sent: tuple[int, ...]
    seconds: float

    @property
    def bytes_per_party(self) -> float:
        """Bytes that a party sends, mean over the parties."""
        return sum(self.bytes_sent) / len(self.bytes_sent)

    @property
    def messages_per_party(self) -> float:
        """Messages that a party sends, mean over the parties."""
        return sum(self.messages_sent) / len(self.messages_sent)

    def __add__(self, other: Cost) -> Cost:
        """The cost of both, one after the other."""
        return Cost(
            tuple(a + b for a, b in zip(self.bytes_sent, other.bytes_sent, strict=True)),
            tuple(a + b for a, b in zip(self.messages_sent, other.messages_sent, strict=True)),
            self.seconds + other.seconds,
        )


@dataclass(frozen=True)
class Program:
    """What the engine compiles: a description (an operation, a block or a model), secret and public arrays by name."""

    description: Mapping[str, Any]
    inputs: Arrays
    public: Arrays

    @classmethod
    def of(cls, operation: Operation) -> Program:
        """One operation on arrays of its shapes."""
        description = {"kind": "operation", "operation": operation.kind, "options": dict(operation.options)}
        draw = np.random.default_rng(0)
        inputs = {f"input{i}": _normal(draw, shape) for i, shape in enumerate(operation.shapes)}
        return cls(description, inputs, {name: _normal(draw, shape) for name, shape in operation.public})


def run_programs(
    engine: Engine, settings: Settings, programs: Sequence[Program], *, wants_outputs: bool = False
) -> list[tuple[Cost, Arrays]]:
    """Runs each program ``settings.runs`` times, one program after the other, and once before if there is a setup.

    Sharing the inputs is not counted: their owner does it.

    Returns:
        For each program its cost, and its output arrays, which are empty without ``wants_outputs``.

    Raises:
        EngineError: a process of the engine failed.
    """
    protocol = settings.protocol
    timeout_seconds = settings.timeout_seconds * len(programs)
    job = {
        "protocol": protocol.name,
        "n_party": protocol.n_party,
        "field": settings.field.upper(),
        "fraction_bits": settings.fraction_bits,
        "runs": protocol.has_setup + settings.runs,
        "timeout_seconds": timeout_seconds,
        "programs": [dict(program.description) for program in programs],
    }
    with tempfile.TemporaryDirectory(prefix="normfree-private-") as name:
        folder = Path(name)
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        own = [folder / str(i) for i in range(len(programs))]
        for each, program in zip(own, programs, strict=True):
            each.mkdir()
            np.savez(each / "inputs.npz", **_named(program.inputs))
            np.savez(each / "public.npz", **_named(program.public))
        _run_script(engine, "prepare.py", folder, timeout_seconds)
        ports = free_ports(protocol.n_party)
        commands = [engine.command("party.py", folder, rank, *ports) for rank in range(protocol.n_party)]
        printed = run_parties(commands, folder, timeout_seconds=timeout_seconds)
        costs = _costs(printed, len(programs), settings)
        if not wants_outputs:
            return [(cost, {}) for cost in costs]
        _run_script(engine, "reconstruct.py", folder, timeout_seconds)
        return [(cost, _load(each / "output.npz")) for cost, each in zip(costs, own, strict=True)]


@dataclass(frozen=True)
class Measurer:
    """Measures costs, each only once: they are kept in ``cache_folder``.

    A cost cannot depend on values, or it would reveal them; so any arrays of the right shapes do.
    """

    engine: Engine
    settings: Settings
    cache_folder: Path

    def operations(self, operations: Iterable[Operation]) -> dict[Operation, Cost]:
        """The cost of each operation.

        Raises:
            EngineError: the engine failed; what was measured until then is kept.
        """
        different = list(dict.fromkeys(operations))
        return dict(zip(different, self.programs([Program.of(each) for each in different]), strict=True))

    def programs(self, programs: Sequence[Program]) -> list[Cost]:
        """The cost of each program, told apart by their descriptions and by the shapes of their arrays.

        Raises:
            EngineError: the engine failed; what was measured until then is kept.
        """
        paths = [self.cache_folder / f"{self._key(program)}.json" for program in programs]
        missing = [i for i, path in enumerate(paths) if not path.is_file()]
        for batch in (missing[start : start + _BATCH] for start in range(0, len(missing), _BATCH)):
            measured = run_programs(self.engine, self.settings, [programs[i] for i in batch])
            for i, (cost, _) in zip(batch, measured, strict=True):
                write_text(paths[i], json.dumps({"program": dict(programs[i].description), "cost": asdict(cost)}))
        found = [json.loads(path.read_text(encoding="utf-8"))["cost"] for path in paths]
        return [Cost(tuple(each["bytes_sent"]), tuple(each["messages_sent"]), each["seconds"]) for each in found]

    def _key(self, program: Program) -> str:
        settings = asdict(self.settings)
        del settings["timeout_seconds"]
        arrays = (program.inputs, program.public)
        shapes = [{name: each.shape for name, each in own.items()} for own in arrays]
        what = [self.engine.version, _sources(), settings, dict(program.description), shapes]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]


def _sources() -> str:
    """A digest of the functions that are measured."""
    texts = [(ENGINE_FOLDER / name).read_bytes() for name in ("operations.py", "decoder.py")]
    return hashlib.sha256(b"".join(texts)).hexdigest()


def _costs(printed: Sequence[str], n_program: int, settings: Settings) -> list[Cost]:
    """The costs of the programs, from what each party printed."""
    n_setup = int(settings.protocol.has_setup)
    n_run = n_setup + settings.runs
    try:
        profiles = [parse_profiles(text) for text in printed]
    except ValueError as error:
        raise EngineError(f"the engine's profile cannot be read: {error}") from error
    expected = n_program * n_run
    if any(len(each) != expected for each in profiles):
        raise EngineError(f"the engine printed {[len(each) for each in profiles]} profiles, not {expected} for a party")
    costs = []
    for start in range(0, expected, n_run):
        counted = [each[start + n_setup : start + n_run] for each in profiles]
        slowest = [max(each[run].seconds for each in counted) for run in range(settings.runs)]
        last = [each[-1] for each in counted]
        bytes_sent, messages_sent = zip(*((each.bytes_sent, each.messages_sent) for each in last), strict=True)
        costs.append(Cost(bytes_sent, messages_sent, median(slowest)))
    return costs


def _run_script(engine: Engine, script: str, folder: Path, timeout_seconds: int) -> None:
    command = engine.command(script, folder)
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=timeout_seconds, check=False)
    except subprocess.TimeoutExpired as error:
        raise EngineError(
            f"{script} did not finish within {timeout_seconds} s; give more time with --timeout"
        ) from error
    if answer.returncode:
        reason = next(iter(answer.stderr.strip().splitlines()[-1:]), "no message")
        raise EngineError(f"{script} failed with exit code {answer.returncode}: {reason}")


def _load(path: Path) -> Arrays:
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def _named(arrays: Arrays) -> dict[str, Any]:
    """Keyword arguments for ``np.savez``, typed so that no name is taken for one of its own parameters."""
    return dict(arrays)


def _normal(draw: np.random.Generator, shape: tuple[int, ...]) -> Any:
    return draw.normal(scale=0.1, size=shape).astype(np.float32)
