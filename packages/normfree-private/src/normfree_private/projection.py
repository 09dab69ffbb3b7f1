"""Network time of what was sent: a formula, not a measurement."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

from normfree.errors import InputError


@dataclass(frozen=True)
class Network:
    """A link between each two parties: Mbit/s in each direction (10⁶ bits), and one-way delay in ms."""

    name: str
    bandwidth_mbit_s: float
    delay_ms: float

    def seconds(self, *, bytes_sent: float, messages: float) -> float:
        """messages · delay + 8 · bytes / bandwidth, both of one party, which waits for an answer to each message.

        Without computation, and without overlap of the two terms.
        """
        return messages * self.delay_ms / 1e3 + 8 * bytes_sent / (self.bandwidth_mbit_s * 1e6)

    def __str__(self) -> str:
        return f"{self.name}: {self.bandwidth_mbit_s:g} Mbit/s, {self.delay_ms:g} ms one way"


NETWORKS = (Network("LAN", 1000.0, 0.5), Network("WAN", 100.0, 20.0))


def parse_network(text: str) -> Network:
    """``NAME=MBIT_PER_SECOND,DELAY_MS``, such as ``WAN=100,20``.

    Raises:
        InputError: it is not of that form, the bandwidth is not positive, or the delay is negative.
    """
    name, equals, numbers = text.partition("=")
    try:
        bandwidth, delay = (float(number) for number in numbers.split(","))
    except ValueError:
        bandwidth = delay = float("nan")
    if not (name and equals and bandwidth > 0 and delay >= 0 and isfinite(bandwidth) and isfinite(delay)):
        raise InputError(
            f"--network {text!r} is not of the form NAME=MBIT_PER_SECOND,DELAY_MS with a positive bandwidth and a "
            "one-way delay, e.g. --network WAN=100,20"
        )
    return Network(name, bandwidth, delay)
