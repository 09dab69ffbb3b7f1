"""Runs programs in the engine's in-memory simulator: ``python simulate.py ENGINE_FOLDER FOLDER``.

It runs under the engine. ``jobs.json`` in FOLDER lists (name, protocol, parties, program); ``NAME.npz`` has the secret
arrays and ``NAME.public.npz`` the public ones. Writes ``PROTOCOL-NAME.npy``.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])

import exchange  # type: ignore[import-not-found]
import numpy as np
import prepare  # type: ignore[import-not-found]
from spu.utils import simulation  # type: ignore[import-not-found]


def main(folder):
    for name, protocol, n_party, program in json.loads((folder / "jobs.json").read_text()):
        with np.load(folder / f"{name}.npz") as file:
            inputs = {key: file[key] for key in file.files}
        with np.load(folder / f"{name}.public.npz") as file:
            public = {key: file[key] for key in file.files}
        run = prepare.function_of(program, list(inputs), public)
        config = exchange.runtime_config({"protocol": protocol, "field": "FM64", "fraction_bits": 18})
        simulator = simulation.Simulator(n_party, config)

        def program_function(*arrays, run=run):
            return run(*arrays)

        result = simulation.sim_jax(simulator, program_function)(*inputs.values())
        np.save(folder / f"{protocol}-{name}.npy", np.asarray(result))


if __name__ == "__main__":
    main(Path(sys.argv[2]))
