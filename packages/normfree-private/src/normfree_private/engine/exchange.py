"""The files that the engine's processes hand each other: shares of arrays, as npz. Runs under the engine."""

import numpy as np
import spu
from spu import libspu


def runtime_config(job):
    """The engine's settings for ``job``: protocol, ring, fraction bits; all else as the engine has it."""
    return spu.RuntimeConfig(
        protocol=spu.parse_protocol_kind(job["protocol"]),
        field=spu.parse_field_type(job["field"]),
        fxp_fraction_bits=job["fraction_bits"],
    )


def save_shares(path, shares):
    """Writes one party's shares, by name."""
    arrays = {}
    for name, share in shares.items():
        arrays[f"{name}|meta"] = np.frombuffer(share.meta, dtype=np.uint8)
        for i, chunk in enumerate(share.share_chunks):
            arrays[f"{name}|{i}"] = np.frombuffer(chunk, dtype=np.uint8)
    np.savez(path, **arrays)


def load_shares(path):
    """What :func:`save_shares` wrote."""
    shares = {}
    with np.load(path) as arrays:
        for entry in arrays.files:
            name, _, part = entry.rpartition("|")
            if part != "meta":
                continue
            share = libspu.Share()
            share.meta = arrays[entry].tobytes()
            n_chunk = sum(other.rpartition("|")[0] == name for other in arrays.files) - 1
            share.share_chunks = [arrays[f"{name}|{i}"].tobytes() for i in range(n_chunk)]
            shares[name] = share
    return shares
