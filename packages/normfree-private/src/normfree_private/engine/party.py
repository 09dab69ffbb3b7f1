"""One party: ``python party.py FOLDER RANK PORT...``, a port a party. Runs under the engine.

Runs each program of the job on its shares as often as ``job.json`` says. The engine prints the profile of each run to
standard output; the shares of the i-th program's last result go to ``i/output-RANK.npz``. The party ends when its
standard input does: nobody waits for it any more.
"""

import json
import os
import sys
import threading
from pathlib import Path

import exchange
import spu
from spu import libspu


def end_with_input():
    """Waits for the end of standard input, and ends the process."""
    # Not sys.stdin: its lock, held by a thread, makes the interpreter abort when it is done.
    while os.read(0, 1):
        pass
    os._exit(1)


def main(folder, rank, ports):
    threading.Thread(target=end_with_input, daemon=True).start()
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    description = libspu.link.Desc()
    for i, port in enumerate(ports):
        description.add_party(f"party{i}", f"127.0.0.1:{port}")
    # A party waits for the slowest; how long a run may take as a whole is the caller's decision.
    description.recv_timeout_ms = description.http_timeout_ms = 1000 * job["timeout_seconds"]
    link = libspu.link.create_brpc(description, rank)
    config = exchange.runtime_config(job)
    config.enable_pphlo_profile = config.enable_hal_profile = True
    runtime = spu.Runtime(link, config)
    for i in range(len(job["programs"])):
        run(folder / str(i), rank, runtime, link, job["runs"])
    link.stop_link()


def run(folder, rank, runtime, link, n_run):
    """Runs one program ``n_run`` times, and waits for the other parties before each run and after the last."""
    executable = spu.Executable()
    executable.ParseFromString((folder / "executable.bin").read_bytes())
    for name, share in exchange.load_shares(folder / f"shares-{rank}.npz").items():
        runtime.set_var(name, share)
    for _ in range(n_run):
        link.barrier()
        runtime.run(executable)
    shares = {name: runtime.get_var(name) for name in executable.output_names}
    exchange.save_shares(folder / f"output-{rank}.npz", shares)
    for name in [*executable.input_names, *executable.output_names]:
        runtime.del_var(name)
    link.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), [int(port) for port in sys.argv[3:]])
