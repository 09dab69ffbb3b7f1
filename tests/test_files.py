from pathlib import Path

import pytest

from normfree.files import folder_written_whole


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
