"""Puts the results of a job together from all parties' shares: ``python reconstruct.py FOLDER``.

Runs under the engine. Writes ``i/output.npz`` for the i-th program, float32.
"""

import json
import sys
from pathlib import Path

import exchange
import numpy as np
import spu


def main(folder):
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    io = spu.Io(job["n_party"], exchange.runtime_config(job))
    for i in range(len(job["programs"])):
        own = folder / str(i)
        parts = [exchange.load_shares(own / f"output-{rank}.npz") for rank in range(job["n_party"])]
        np.savez(own / "output.npz", **{name: io.reconstruct([part[name] for part in parts]) for name in parts[0]})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
