"""Compiles the programs of a job and splits their arrays into shares: ``python prepare.py FOLDER``.

Runs under the engine. ``job.json`` lists the programs; the i-th has its secret arrays in ``i/inputs.npz``, its public
ones in ``i/public.npz``, and gets ``i/executable.bin`` and ``i/shares-RANK.npz``.
"""

import json
import sys
from pathlib import Path

import decoder
import exchange
import numpy as np
import operations
import spu
from spu.utils import frontend


def function_of(program, names, public):
    """The program as a function of the secret arrays, in the order of ``names``."""
    if program["kind"] == "operation":
        options = {**program["options"], **public}
        return lambda *arrays: operations.OPERATIONS[program["operation"]](*arrays, **options)

    def run(x, *arrays):
        weights = dict(zip(names[1:], arrays, strict=True))
        if program["kind"] == "block":
            return decoder.block(x, program["layer"], weights, program["config"], public)
        return decoder.model(x, weights, program["config"], public)

    return run


def prepare(folder, job, program):
    """Writes what the parties need of one program into its folder."""
    with np.load(folder / "inputs.npz") as file:
        inputs = {name: file[name] for name in file.files}
    with np.load(folder / "public.npz") as file:
        public = {name: file[name] for name in file.files}
    names, arrays = list(inputs), list(inputs.values())
    secret = spu.Visibility.VIS_SECRET
    run = function_of(program, names, public)
    run.__name__ = "program"
    executable, _ = frontend.compile(
        frontend.Kind.JAX,
        run,
        arrays,
        {},
        names,
        [secret] * len(names),
        lambda outputs: [f"output{i}" for i in range(len(outputs))],
    )
    (folder / "executable.bin").write_bytes(executable.SerializeToString())
    io = spu.Io(job["n_party"], exchange.runtime_config(job))
    shares = {name: io.make_shares(array, secret) for name, array in inputs.items()}
    for rank in range(job["n_party"]):
        exchange.save_shares(folder / f"shares-{rank}.npz", {name: each[rank] for name, each in shares.items()})


def main(folder):
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    for i, program in enumerate(job["programs"]):
        prepare(folder / str(i), job, program)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
