"""GGUF files: the logits of the model that was written; files that cannot be read rightly are refused."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from normfree.data import load_tokenizer
from normfree.errors import InputError
from normfree.modeling.gguf import open_gguf
from normfree.modeling.loading import load_model
from tests.modeling.gguf_files import BUILD, SIZES, VOCABULARY, built, write_gguf

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(built("llama"), tmp_path_factory.mktemp("gguf") / "model.gguf")


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    tokens = torch.randint(0, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(1))
    return model(input_ids=tokens, use_cache=False).logits


@pytest.mark.parametrize("kind", BUILD)
def test_logits_are_those_of_the_model_that_was_written(kind: str, tmp_path: Path) -> None:
    model = built(kind)
    loaded = load_model(str(write_gguf(model, tmp_path / "model.gguf")))
    assert type(loaded) is type(model)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
    assert not loaded.is_quantized
    loaded.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits(load_model(str(tmp_path / "saved"))), logits(loaded))


@pytest.mark.parametrize(("kind", "projection"), [("llama", "q_proj"), ("llama", "k_proj"), ("gemma3", "q_proj")])
def test_dequantized_weights_are_those_of_the_file(kind: str, projection: str, tmp_path: Path) -> None:
    path = write_gguf(built(kind), tmp_path / "model.gguf", quantized=gguf.GGMLQuantizationType.Q8_0)
    file = open_gguf(path)
    assert file.quantization == "Q8_0, dequantized to float32"
    loaded = load_model(str(path))
    weight = loaded.get_parameter(f"model.layers.1.self_attn.{projection}.weight")
    stored = next(each for each in gguf.GGUFReader(path).tensors if each.name == f"blk.1.attn_{projection[0]}.weight")
    expected = gguf.dequantize(stored.data, stored.tensor_type)
    if kind == "llama":
        head_dim = SIZES["hidden_size"] // SIZES["num_attention_heads"]
        pairs = expected.reshape(-1, head_dim // 2, 2, expected.shape[-1])
        expected = np.concatenate([pairs[:, :, 0], pairs[:, :, 1]], axis=1).reshape(expected.shape)
    np.testing.assert_array_equal(weight.detach().numpy(), expected)
    assert weight.dtype == torch.float32


def test_weights_that_are_not_quantized_say_nothing(whole: Path) -> None:
    assert open_gguf(whole).quantization is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"left_out": "model.norm.weight"}, "1 tensor missing"),
        ({"left_out": "model.layers.3.self_attn.k_proj.weight"}, "1 tensor missing"),
        ({"more_tensors": {"rope_freqs.weight": np.ones(4, np.float32)}}, "leaves out 1 of its tensors .rope_freqs"),
        ({"more_tensors": {"blk.0.attn_q.bias": np.ones(32, np.float32)}}, "leaves out 1 of its tensors .blk.0.attn_q"),
        ({"extra": {"ARCH.rope.scaling.type": "linear"}}, "llama.rope.scaling.type is 'linear'"),
        ({"extra": {"ARCH.rope.scaling.factor": 4.0}}, "llama.rope.scaling.factor is 4.0"),
        ({"extra": {"ARCH.attention.sliding_window": 8}}, "llama.attention.sliding_window is 8"),
        ({"extra": {"ARCH.expert_count": 4}}, "llama.expert_count is 4"),
        ({"extra": {"general.type": "adapter"}}, "of type 'adapter'"),
        ({"extra": {"split.count": 2}}, "one part of several"),
    ],
)
def test_what_the_reader_passes_over_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_gguf(built("llama"), tmp_path / "model.gguf", **options)
    with pytest.raises(InputError, match=message) as caught:
        load_model(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.999])
def test_a_file_cut_short(whole: Path, share: float, tmp_path: Path) -> None:
    content = whole.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match=r"cut short|is no GGUF file"):
        load_model(str(tmp_path / "cut.gguf"))


@pytest.mark.parametrize(
    ("begin", "message"),
    [
        (b"GGML" + struct.pack("<I", 3), "is no GGUF file"),
        (b"GGUF" + struct.pack(">I", 3), "is big-endian"),
        (b"GGUF" + struct.pack("<I", 1), "is GGUF version 1"),
        (b"GGUF" + struct.pack("<I", 9), "is GGUF version 9"),
    ],
)
def test_files_of_other_kinds(whole: Path, begin: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "other.gguf").write_bytes(begin + whole.read_bytes()[8:])
    with pytest.raises(InputError, match=message):
        load_model(str(tmp_path / "other.gguf"))


def test_no_file_no_supported_architecture_one_part(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no file"):
        load_model(str(tmp_path / "nowhere.gguf"))
    content = whole.read_bytes()
    (tmp_path / "other.gguf").write_bytes(content.replace(b"llama", b"bloop"))
    with pytest.raises(InputError, match="of architecture 'bloop'"):
        load_model(str(tmp_path / "other.gguf"))
    (tmp_path / "model-00001-of-00002.gguf").write_bytes(content)
    with pytest.raises(InputError, match="one part of several"):
        load_model(str(tmp_path / "model-00001-of-00002.gguf"))


def test_without_the_package(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(InputError, match=r"pip install 'normfree\[gguf\]'"):
        load_model(str(whole))


def test_the_tokenizer_of_the_file(whole: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(whole))
    assert len(tokenizer) == VOCABULARY
    assert tokenizer.decode(tokenizer("def f(x):\n   1")["input_ids"]) == "def f(x):\n   1"
    # SmolLM's tokenizer sets digits apart before it merges: three spaces before one are one token
    smollm = load_tokenizer(str(write_gguf(built("llama"), tmp_path / "s.gguf", pre="smollm")))
    assert len(smollm("   1")["input_ids"]) == 2
    assert len(tokenizer("   1")["input_ids"]) == 3
    with pytest.raises(InputError, match="words like 'unheard-of'"):
        load_tokenizer(str(write_gguf(built("llama"), tmp_path / "u.gguf", pre="unheard-of")))


def test_only_the_file_itself_is_read(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a file of the same name in the working directory nor a tokenizer in the same folder."""
    other, here = tmp_path / "other", tmp_path / "here"
    for folder in (other, here):
        folder.mkdir()
    model = built("llama")
    write_gguf(model, other / "model.gguf", n_token=280)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    write_gguf(model, here / "model.gguf")
    load_tokenizer(str(whole)).save_pretrained(other)
    monkeypatch.chdir(here)
    assert load_model("../other/model.gguf").lm_head.weight.abs().sum() > 0
    assert len(load_tokenizer("../other/model.gguf")) == 280
