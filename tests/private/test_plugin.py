"""Commands of plug-ins: found by metadata alone, imported when they run, missed in one line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

import normfree as core
from normfree.cli import plugins

Command = Callable[..., tuple[int, str, str]]


def install(folder: Path, package: str, entry: str, summary: str = "A summary.") -> None:
    """A distribution ``package`` in ``folder``, whose metadata declare the command ``entry``."""
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\nSummary: {summary}\n")
    (info / "entry_points.txt").write_text(f"[normfree.commands]\n{entry}\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    return folder


def test_the_plugin_declares_its_command() -> None:
    (entry,) = metadata.entry_points(group=plugins.GROUP, name="private-cost")
    assert entry.value == "normfree_private.command:private_cost"
    assert entry.dist is not None
    assert entry.dist.name == "normfree-private"
    assert set(plugins.KNOWN) == {"private-cost"}


def test_a_command_is_listed_with_its_summary_and_imported_when_it_runs(normfree: Command, site: Path) -> None:
    install(site, "third", "third-party = third_party:command", "What a third party measures.")
    (site / "third_party.py").write_text(
        "def command(name: str, twice: bool = False) -> None:\n"
        '    """Greets.\n\n    Example: normfree third-party x\n    """\n'
        "    print(name, twice)\n"
    )
    code, out, _ = normfree("--help")
    assert code == 0
    assert "\n  third-party " in out
    assert "What a third party measures." in out
    assert "third_party" not in sys.modules
    code, out, _ = normfree("third-party", "--help")
    assert code == 0
    assert out.startswith("Usage: normfree third-party [OPTIONS] ")
    assert "Greets." in out
    assert normfree("third-party", "x", "--twice") == (0, "x True\n", "")
    code, out, err = normfree("third-party")
    assert (code, out) == (2, "")
    assert "Missing argument" in err


def test_a_plugin_replaces_no_command(normfree: Command, site: Path) -> None:
    install(site, "rival", "verify = rival:command")
    code, out, _ = normfree("verify", "--help")
    assert code == 0
    assert "Check that finished runs" in out


@pytest.mark.parametrize(
    ("entry", "reason"),
    [("broken = no_such_module:command", "No module named"), ("broken = json:no_such_name", "no_such_name")],
)
def test_a_plugin_that_cannot_be_imported(normfree: Command, site: Path, entry: str, reason: str) -> None:
    install(site, "broken-plugin", entry)
    code, out, err = normfree("broken")
    assert (code, out) == (2, "")
    assert err.startswith("normfree: the plug-in broken-plugin cannot be imported (")
    assert reason in err
    assert err.count("\n") == 1
    assert normfree("--help")[0] == 0


def test_two_plugins_with_one_command(normfree: Command, site: Path) -> None:
    for package in ("one", "two"):
        install(site, package, "same = json:dumps")
    code, _, err = normfree("same")
    assert code == 2
    assert "several plug-ins have a command same: " in err
    assert err.count("\n") == 1


def test_without_the_plugin_one_line_says_what_to_install(normfree: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normfree.cli.plugins.metadata.entry_points", lambda **_: metadata.EntryPoints())
    for arguments in ((), ("cpu",), ("--help",)):
        code, out, err = normfree("private-cost", *arguments)
        assert (code, out) == (2, "")
        assert err == (
            "normfree: private-cost is a command of the plug-in normfree-private; run `make private`, or `pip install "
            "--editable packages/normfree-private`, in a checkout of Normfree\n"
        )
    code, out, _ = normfree("--help")
    assert code == 0
    assert "private-cost" not in out


def test_help_imports_no_plugin_and_no_heavy_library() -> None:
    code = """
import contextlib, io, sys
from normfree.cli import app
for words in (["--help"], ["private-cost", "--help"]):
    loaded = "normfree_private" in sys.modules
    with contextlib.redirect_stdout(io.StringIO()) as out:
        app(words, prog_name="normfree", standalone_mode=False)
    assert not loaded, words
    assert "What models cost under secure multi-party computation:" in out.getvalue(), out.getvalue()
heavy = {"torch", "transformers", "numpy", "pandas", "matplotlib"} & {name.partition(".")[0] for name in sys.modules}
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_core_has_no_trace_of_the_plugin() -> None:
    sources = Path(core.__file__).parent
    assert not (sources / "private").exists()
    assert [str(path) for path in sources.rglob("*.py") if "normfree_private" in path.read_text(encoding="utf-8")] == []
