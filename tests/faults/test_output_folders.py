"""Output folders: one that cannot be made is refused before any work, and each model has its own."""

import errno
import json
from pathlib import Path

import pytest

from normfree.cli.names import model_name, output_folder
from normfree.errors import InputError
from normfree.files import check_output_folder

PLACES: tuple[str, ...] = (
    "file",
    "file/below",
    "file/far/below",
    "loop/x",
    "loop",
    "x" * 300,
    "a/" + "x" * 300,
    "/proc/x",
    "/proc/x/y",
)
PLACES += ("/dev/null/x", "nul\0name", "/sys/x")
COMMANDS = {
    "entropy": ("nowhere",),
    "depth": ("nowhere",),
    "interpret": ("nowhere",),
    "prune-layers": ("nowhere", "--drop", "1"),
    "to-spark": ("nowhere",),
    "remove-norm": ("nowhere",),
    "finetune": ("nowhere", "--corpus", "installed-python"),
    "train": ("nowhere.yaml",),
    "study": ("relu-revival",),
    "private-cost": ("nowhere",),
}


@pytest.fixture
def places(tmp_path):
    (tmp_path / "file").write_text("years of work")
    (tmp_path / "loop").symlink_to("loop")
    return tmp_path


def left(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("place", PLACES)
def test_folders_that_cannot_be_made(place, places):
    before = left(places)
    with pytest.raises(InputError, match="give another output folder") as error:
        check_output_folder(places / place)
    assert "\n" not in str(error.value)
    assert left(places) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_them_before_any_work(command, places, normfree):
    before = left(places)
    for place in ("file", "file/below", "loop/x", "x" * 300, "/proc/x"):
        code, out, err = normfree(command, *COMMANDS[command], "--out", places / place)
        assert code == 2, err
        assert err.count("\n") == 1
        assert "give another output folder" in err
        assert out == ""
    assert left(places) == before


def test_a_benchmark_refuses_a_file_that_cannot_be_made(places, normfree):
    for place in ("file/x.json", "loop/x.json", "/proc/x.json"):
        code, _, err = normfree("bench", "entropy", "--out", places / place)
        assert code == 2, err
        assert err.count("\n") == 1
    (places / "folder").mkdir()
    code, _, err = normfree("bench", "entropy", "--out", places / "folder")
    assert code == 2
    assert "is a folder" in err


def test_a_cache_that_cannot_be_made(places, normfree, corpus_folder):
    for place in ("file", "file/cache", "loop/cache", "/proc/x"):
        code, _, err = normfree("depth", "nowhere", "--cache-dir", places / place)
        assert code == 2, err
        assert "give another place for tokens, with --cache-dir" in err


def test_a_folder_that_can_be_made_is_left_as_it_was(places):
    before = left(places)
    check_output_folder(places / "a" / "b" / "c")
    assert left(places) == before
    (places / "there").mkdir()
    (places / "there" / "x").write_text("kept")
    check_output_folder(places / "there")
    assert left(places) == before | {"there", "there/x"}


def test_a_full_disk_is_no_bad_folder(places, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.mkstemp", full)
    with pytest.raises(OSError, match="No space left") as error:
        check_output_folder(places / "a" / "b")
    assert not isinstance(error.value, InputError)
    assert not (places / "a").exists()


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOENT, errno.EUCLEAN, errno.EIO])
def test_whatever_the_system_calls_it(number, places, monkeypatch):
    def refuse(*_, **__):
        raise OSError(number, "some reason")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(InputError, match=r"cannot write into .*some reason"):
        check_output_folder(places / "a")


def test_each_model_has_a_folder_of_its_own(tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    models = ["a/runs/x/seed-0", "a/runs/y/seed-0", "b/runs/x/seed-0", "a/runs/x/seed-0/checkpoint-6", "m/a.gguf"]
    models += ["m/b.gguf", "n/a.gguf", "x--y", "x/y", "../other/x/seed-0", "../third/x/seed-0", "../x/seed-0"]
    models += ["z" * 200 + "/1", "z" * 200 + "/2", str(tmp_path / "x" / "seed-1")]
    for model in models:
        path = Path(model)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("") if path.suffix else path.mkdir(parents=True, exist_ok=True)
    models += ["org/model", "org--model", "org/model-2", "gpt2"]
    found = {model: output_folder(None, "entropy", [model]) for model in models}
    assert len({str(folder).lower() for folder in found.values()}) == len(models)
    assert all(folder.parent == Path("entropy") and folder.name[0] not in "-." for folder in found.values())
    assert found["a/runs/x/seed-0"] == Path("entropy/a--runs--x--seed-0")
    assert found["m/a.gguf"] == Path("entropy/m--a.gguf")
    assert found["org/model"] == Path("entropy/org--model")
    # However a model is written, it is the same.
    assert output_folder(None, "entropy", ["./a/../a/runs/x/seed-0/"]) == found["a/runs/x/seed-0"]
    assert output_folder(None, "entropy", [str(here / "m" / "a.gguf")]) == found["m/a.gguf"]
    several = [
        output_folder(None, "depth", pair) for pair in (models[:2], models[1:3], models[:3], ["gpt2", "org/model"])
    ]
    assert len(set(several)) == 4
    assert output_folder(Path("given"), "depth", models) == Path("given")
    assert not (here / "entropy").exists()


def test_names_in_titles_tell_runs_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for run in ("runs/x/seed-0/checkpoint-6", "runs/y/seed-0", "m/a.gguf"):
        Path(run).mkdir(parents=True)
    assert model_name("runs/x/seed-0", ["runs/x/seed-0"]) == "x/seed-0"
    assert model_name("runs/y/seed-0", ["runs/y/seed-0"]) == "y/seed-0"
    assert model_name("runs/x/seed-0/checkpoint-6", []) == "x/seed-0/checkpoint-6"
    assert model_name("m/a.gguf", []) == "a.gguf"
    assert model_name("org/model", []) == "org/model"


@pytest.mark.parametrize(
    ("command", "error", "code", "promise"),
    [
        ("train", ValueError("surrogates not allowed"), 1, None),
        ("train", RuntimeError("shapes cannot be multiplied"), 1, None),
        ("train", KeyError("x"), 1, None),
        ("train", MemoryError(), 1, "the same command resumes from the last checkpoint"),
        ("study", RuntimeError("DataLoader worker (pid 3) is killed"), 1, "resumes from the last checkpoint"),
        ("depth", RuntimeError("CUDA out of memory"), 1, "the same command begins again"),
        ("depth", ValueError("x"), 1, None),
        ("finetune", OSError(errno.ENOSPC, "No space left on device"), 1, "resumes from the last checkpoint"),
        ("entropy", OSError(errno.ENOSPC, "No space left on device"), 1, "the same command begins again"),
        ("entropy", OSError("a model that is not there"), 1, None),
        ("train", OSError(errno.ELOOP, "Too many levels of symbolic links"), 2, None),
        ("remove-norm", OSError(errno.EINVAL, "Invalid argument"), 2, None),
    ],
)
def test_only_what_can_be_resumed_is_promised(command, error, code, promise, normfree, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("normfree.cli.app", fail)
    ended, _, err = normfree(command)
    assert ended == code
    assert err.count("\n") == 1
    if promise is None:
        assert "resumes" not in err
        assert "begins again" not in err
    else:
        assert promise in err


def test_two_runs_do_not_write_over_each_other(tiny_run, data, normfree, tmp_path):
    from normfree.training import train

    folders = set()
    for name in ("x", "y"):
        train(tiny_run(), data, tmp_path / "runs" / name / "seed-0")
        code, out, err = normfree("entropy", f"runs/{name}/seed-0", "--sequences", 2, "--json")
        assert code == 0, err
        folders.add(json.loads(out)["folder"])
    assert folders == {"entropy/runs--x--seed-0", "entropy/runs--y--seed-0"}
    assert all((tmp_path / folder / "heads.csv").exists() for folder in folders)
