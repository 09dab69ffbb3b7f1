"""Probes: they read a running transformers model and leave what it computes as it is."""

from normfree.probes.entropy_probe import EntropyProbe
from normfree.probes.monitor import EntropyMonitor
from normfree.probes.recorder import EntropyRecorder

__all__ = ["EntropyMonitor", "EntropyProbe", "EntropyRecorder"]
