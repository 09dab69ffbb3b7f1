"""The parser, against what SPU 0.9.5 printed of two runs of a LayerNorm on [16, 32] under ABY3 (party 0)."""

from __future__ import annotations

from pathlib import Path

import pytest

from normfree_private.profile import RunProfile, parse_profiles

PROFILE = (Path(__file__).parent / "profile-aby3.txt").read_text()


def test_each_run_of_a_real_profile() -> None:
    assert parse_profiles(PROFILE) == [
        RunProfile(0.097199036, bytes_sent=39112, bytes_received=41608, messages_sent=59, messages_received=63),
        RunProfile(0.057220609, bytes_sent=39112, bytes_received=45000, messages_sent=59, messages_received=58),
    ]


def test_primitives_of_a_run_add_up_to_its_link_details() -> None:
    first = PROFILE.split("Link details")[0]
    sent = [int(line.split("send bytes ")[1].split()[0]) for line in first.splitlines() if "- pphlo." in line]
    assert parse_profiles(PROFILE)[0].bytes_sent == sum(sent)


def test_other_output_is_no_run() -> None:
    assert parse_profiles("") == []
    assert parse_profiles("[info] listening on 127.0.0.1:4000\nsend bytes 12\n") == []


def test_halves_of_a_run_are_refused() -> None:
    lines = PROFILE.splitlines()
    link = next(line for line in lines if "Link details" in line)
    time = next(line for line in lines if "[Profiling]" in line)
    with pytest.raises(ValueError, match="link details without a run"):
        parse_profiles(link)
    with pytest.raises(ValueError, match="the last run has no link details"):
        parse_profiles(time)
    with pytest.raises(ValueError, match="a run without link details"):
        parse_profiles(f"{time}\n{time}\n{link}")
