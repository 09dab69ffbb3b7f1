from importlib.resources import files

import pytest

from normfree.errors import InputError
from normfree.report import PUBLISHED_NAMES, load_published, published_head_entropy


@pytest.mark.parametrize("name", PUBLISHED_NAMES)
def test_every_table_loads_and_is_described(name):
    assert len(load_published(name)) > 0
    readme = files("normfree.report").joinpath("published", "README.md").read_text(encoding="utf-8")
    assert f"`{name}.csv`" in readme


def test_every_file_has_a_name():
    stored = {path.name for path in files("normfree.report").joinpath("published").iterdir()}
    assert stored == {f"{name}.csv" for name in PUBLISHED_NAMES} | {"README.md"}


def test_table_2_of_the_paper():
    gpt2 = load_published("relu_revival_table2").query("model == 'GPT-2' and context_length == 128")
    assert gpt2["configuration"].tolist() == ["SM+LN+G", "SM+LN+R", "SM+G", "SM+R"]
    assert gpt2["eval_ppl"].tolist() == [2.688, 2.757, 3.197, 2.936]
    assert gpt2["delta_percent"].tolist() == [0.00, 2.53, 18.92, 9.20]


def test_head_entropy_is_a_whole_frame():
    frame = published_head_entropy()
    assert len(frame) == 4 * 12 * 12
    first = frame.query("configuration == 'SM+LN+G' and layer == 0")["entropy_nats"].tolist()
    assert first[:4] == [2.16, 2.91, 3.83, 3.33]
    assert set(frame.columns) == {"model", "context_length", "configuration", "seed", "layer", "head", "entropy_nats"}


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(InputError, match=r"did you mean 'relu_revival_table2'"):
        load_published("relu_revival_table")  # type: ignore[arg-type]
