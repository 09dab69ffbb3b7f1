"""What the repository says of itself in several places is the same: versions, bounds, pins, and the matrix of CI.

``make lock`` writes the pinned versions.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import normfree

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
RUNTIME = [Requirement(line) for line in PROJECT["dependencies"]]
EXTRAS = {name: [Requirement(line) for line in lines] for name, lines in PROJECT["optional-dependencies"].items()}


def pinned(name: str) -> dict[str, list[Version]]:
    """Versions of each package; more than one where environment markers select between them."""
    versions: dict[str, list[Version]] = {}
    for line in (ROOT / "constraints" / name).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            requirement = Requirement(line)
            (specifier,) = requirement.specifier
            assert specifier.operator == "==", line
            versions.setdefault(canonicalize_name(requirement.name), []).append(Version(specifier.version))
    return versions


def lowest(requirement: Requirement) -> Version:
    (bound,) = [each.version for each in requirement.specifier if each.operator == ">="]
    return Version(bound)


def test_the_lock_pins_what_pyproject_allows() -> None:
    locked = pinned("locked.txt")
    for requirement in [*RUNTIME, *(each for extra in EXTRAS.values() for each in extra)]:
        versions = locked[canonicalize_name(requirement.name)]
        assert all(version in requirement.specifier for version in versions), requirement


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    """A bound below what other requirements allow would never be tested."""
    oldest = pinned("oldest.txt")
    wrong = {
        requirement.name: (str(requirement.specifier), versions)
        for requirement in [*RUNTIME, *EXTRAS["dev"]]
        if (versions := oldest[canonicalize_name(requirement.name)]) != [lowest(requirement)]
    }
    assert not wrong


@pytest.mark.parametrize("extra", sorted(EXTRAS.keys() - {"dev", "docs", "neighbours", "ray", "slurm"}))
def test_tests_have_what_optional_features_need(extra: str) -> None:
    development = {(each.name, str(each.specifier)) for each in EXTRAS["dev"]}
    assert {(each.name, str(each.specifier)) for each in EXTRAS[extra]} <= development


@pytest.mark.parametrize("name", ["locked.txt", "oldest.txt"])
def test_no_index_is_named(name: str) -> None:
    text = (ROOT / "constraints" / name).read_text(encoding="utf-8")
    assert "://" not in text
    assert not re.search(r"^-", text, re.MULTILINE)
    assert "+" not in text, "local versions are on no public index"


def test_the_changelog_has_the_version() -> None:
    newest = re.search(r"^## (\S+)(?: \(\d{4}-\d{2}-\d{2}\))?$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest.group(1) in ("Unreleased", normfree.__version__)
    assert f"\nversion: {normfree.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_hooks_are_the_versions_that_make_check_uses() -> None:
    locked = pinned("locked.txt")
    hooks = [hook for repo in loaded(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    for line in {line for hook in hooks for line in hook.get("additional_dependencies", [])}:
        requirement = Requirement(line)
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", line
        if requirement.name in locked:
            assert [Version(specifier.version)] == locked[requirement.name], line


def test_ci_runs_each_python_and_both_ends_of_the_range_of_torch() -> None:
    matrix = loaded(".github/workflows/tests.yml")["jobs"]["test"]["strategy"]["matrix"]
    classified = [match[1] for each in PROJECT["classifiers"] if (match := re.search(r"Python :: (3\.\d+)$", each))]
    assert matrix["python"] == classified
    (torch,) = (each for each in RUNTIME if each.name == "torch")
    assert [Version(each) for each in matrix["torch"]] == [lowest(torch), *pinned("locked.txt")["torch"]]


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_jobs_run_targets_of_the_makefile(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    jobs = loaded(str(path.relative_to(ROOT))).get("jobs", {})
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert {command.split()[1] for command in commands if command.startswith("make ")} <= targets


def loaded(path: str) -> dict[str, Any]:
    content = yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content
