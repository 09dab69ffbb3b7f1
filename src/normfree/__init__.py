"""Normfree: what normalization, activations and sparsity do to a transformer language model."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING

from normfree import registration

if TYPE_CHECKING:
    from normfree import plot as plot
    from normfree.entropy import attention_entropy as attention_entropy
    from normfree.entropy import entropy_bands as entropy_bands
    from normfree.measurement import Measurement as Measurement
    from normfree.measurement import measure as measure
    from normfree.modeling import NormfreeConfig as NormfreeConfig
    from normfree.modeling import NormfreeForCausalLM as NormfreeForCausalLM
    from normfree.modeling import from_hf as from_hf
    from normfree.probes import EntropyMonitor as EntropyMonitor
    from normfree.probes import EntropyProbe as EntropyProbe
    from normfree.probes.trainer_callback import EntropyCallback as EntropyCallback
    from normfree.removal import remove_norms as remove_norms
    from normfree.removal import to_stock as to_stock
    from normfree.runner import StudyResult as StudyResult
    from normfree.runner import load_study as load_study
    from normfree.runner import run_study as run_study
    from normfree.spark import sparse_decode as sparse_decode
    from normfree.spark.topk import statistical_topk as statistical_topk

# A public name is one line here and, for type checkers, its import above.
_ROOMS = {
    "EntropyCallback": "probes.trainer_callback",
    "EntropyMonitor": "probes",
    "EntropyProbe": "probes",
    "Measurement": "measurement",
    "NormfreeConfig": "modeling",
    "NormfreeForCausalLM": "modeling",
    "StudyResult": "runner",
    "attention_entropy": "entropy",
    "entropy_bands": "entropy",
    "from_hf": "modeling",
    "load_study": "runner",
    "measure": "measurement",
    "plot": "plot",
    "remove_norms": "removal",
    "run_study": "runner",
    "sparse_decode": "spark",
    "statistical_topk": "spark.topk",
    "to_stock": "removal",
}
__all__ = [*_ROOMS]
__version__ = "0.2.0"

if not TYPE_CHECKING:  # to a type checker, a name that is not imported above is an error

    def __getattr__(name: str) -> object:
        """A public name, or a module such as ``normfree.modeling``, imported when it is first used (PEP 562)."""
        if name in _ROOMS and name != _ROOMS[name]:
            value = getattr(importlib.import_module(f"normfree.{_ROOMS[name]}"), name)
        elif not name.startswith("_") and importlib.util.find_spec(f"normfree.{name}") is not None:
            value = importlib.import_module(f"normfree.{name}")
        else:
            raise AttributeError(f"module 'normfree' has no attribute {name!r}")
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *_ROOMS})


registration.install()
