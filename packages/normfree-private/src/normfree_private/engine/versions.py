"""Prints the versions of the engine as JSON. Runs under the engine."""

import importlib.metadata
import json
import platform

import jax
import spu

print(
    json.dumps(
        {"spu": importlib.metadata.version(spu.__name__), "jax": jax.__version__, "python": platform.python_version()}
    )
)
