from pathlib import Path

import pytest

from normfree.files import folder_written_whole, remove_unfinished


def test_a_folder_takes_its_place_whole(tmp_path: Path) -> None:
    place = tmp_path / "deep" / "export"
    with folder_written_whole(place) as temporary:
        (temporary / "a").write_text("one")
        assert not place.exists()
    assert [path.name for path in place.parent.iterdir()] == ["export"]
    with folder_written_whole(place) as temporary:
        (temporary / "b").write_text("two")
        assert (place / "a").read_text() == "one", "the former one stays until then"
    assert [path.name for path in place.iterdir()] == ["b"]
    assert [path.name for path in place.parent.iterdir()] == ["export"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_folder_that_was_not_finished_is_not_there(tmp_path: Path, error: type[BaseException]) -> None:
    def write_half() -> None:
        with folder_written_whole(tmp_path / "export") as temporary:
            (temporary / "half").write_text("of it")
            raise error

    with pytest.raises(error):
        write_half()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_swept_away_and_nothing_else(tmp_path: Path) -> None:
    for name in (".export.ab12_xyz/new/half.txt", ".table.ab12_xyz.csv", "run/.deep.ab12_xyz/old/half.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    kept = (".hidden.settings/mine.txt", ".lock", "run/model.safetensors", "export/new/mine.txt")
    for name in kept:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    remove_unfinished(tmp_path)
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()} == set(kept)
