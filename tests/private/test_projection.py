from __future__ import annotations

import pytest

from normfree.errors import InputError
from normfree_private.projection import NETWORKS, Network, parse_network


def test_delay_and_bandwidth_add_up() -> None:
    # 10 messages of 20 ms, and 25 MB = 200 Mbit through 100 Mbit/s
    assert Network("WAN", 100, 20).seconds(bytes_sent=25e6, messages=10) == pytest.approx(0.2 + 2.0)
    assert Network("no delay", 1000, 0).seconds(bytes_sent=125e6, messages=1e6) == pytest.approx(1.0)
    assert Network("no bytes", 1, 0.5).seconds(bytes_sent=0, messages=7) == pytest.approx(3.5e-3)


def test_the_default_networks() -> None:
    assert [str(network) for network in NETWORKS] == [
        "LAN: 1000 Mbit/s, 0.5 ms one way",
        "WAN: 100 Mbit/s, 20 ms one way",
    ]


def test_networks_from_the_command_line() -> None:
    assert parse_network("campus=2500,0.1") == Network("campus", 2500, 0.1)
    assert parse_network("ideal=1,0").delay_ms == 0


@pytest.mark.parametrize(
    "text", ["WAN", "WAN=", "WAN=100", "=100,20", "WAN=0,20", "WAN=100,-1", "WAN=1,2,3", "W=inf,1"]
)
def test_what_is_no_network(text: str) -> None:
    with pytest.raises(InputError, match="not of the form NAME=MBIT_PER_SECOND,DELAY_MS"):
        parse_network(text)
