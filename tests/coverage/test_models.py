"""Every causal LM architecture of transformers is read right or refused, and docs/models.md says which.

``make test`` takes the most used architectures and the hardest ones, ``make nightly`` all of them.
"""

import pytest
import transformers
from huggingface_hub.errors import StrictDataclassError

from normfree import EntropyProbe
from tests.coverage.sweep import (
    FAULTY,
    NO_ATTENTION,
    READ,
    REFUSED,
    TOLERANCE,
    YES,
    Row,
    batch_of,
    examine,
)
from tests.coverage.table import PAGE, cells_of, page, read_page
from tests.coverage.tiny_models import UNBUILT, model_types, tiny_model
from tests.nightly import NIGHTLY

USED = [
    *("bloom", "falcon", "gemma2", "gemma3_text", "gpt2", "gpt_neo", "gpt_neox", "gpt_oss", "gptj", "llama", "mistral"),
    *("mixtral", "mpt", "olmo2", "opt", "phi3", "qwen2", "qwen3", "deepseek_v3"),
]
HARD = ["deepseek_v32", "diffllama", "gemma4_text", "hrm_text", "longcat_flash", "qwen3_next"]


def test_the_sample_is_of_25():
    assert len({*USED, *HARD} & set(model_types())) == 25


@pytest.mark.parametrize("model_type", model_types() if NIGHTLY else sorted(USED + HARD))
def test_right_or_refused_as_the_page_says(model_type):
    row = examine(model_type)
    assert row.faults == []
    assert row.status not in (READ,) or row.agreement_nats <= TOLERANCE
    version, rows = read_page(PAGE.read_text(encoding="utf-8"))
    if version == transformers.__version__:
        assert cells_of(row) == rows[model_type], f"{PAGE} is out of date: run make models"


def test_the_page_names_every_model_type():
    version, rows = read_page(PAGE.read_text(encoding="utf-8"))
    if version == transformers.__version__:
        assert sorted(rows) == model_types()
    assert not rows.keys() & UNBUILT.keys()


@pytest.mark.parametrize("model_type", sorted(UNBUILT))
def test_what_is_not_built_cannot_be(model_type):
    """A reason is dropped once its architecture can be built and reads tokens."""
    with pytest.raises((AttributeError, ImportError, TypeError, ValueError, StrictDataclassError)):
        tiny_model(model_type)(**batch_of("none"))


def test_what_is_silently_wrong_is_a_fault(monkeypatch):
    right = EntropyProbe.per_head
    monkeypatch.setattr(EntropyProbe, "per_head", lambda probe: right(probe) + 1.5e-5)
    row = examine("llama")
    assert row.status == FAULTY
    assert "nats off" in row.faults[0]


def test_what_is_raised_raw_is_a_fault(monkeypatch):
    def fail(*_, **__):
        raise KeyError("a layer")

    monkeypatch.setattr("tests.coverage.sweep.prune_layers", fail)
    row = examine("llama")
    assert row.prune_layers == FAULTY
    assert row.faults == ["prune_layers: raises KeyError: 'a layer'"]


def test_a_page_is_read_back_as_it_was_written():
    refusal = "from_hf cannot convert a BForCausalLM; allowed: CForCausalLM"
    rows = [
        Row("b", "BForCausalLM", REFUSED, "it is (not) read", depth=YES, prune_layers=YES, from_hf=refusal),
        Row("a-1", "AForCausalLM", READ, agreement_nats=2e-7, depth="no list", prune_layers="last layers only"),
        Row("c", "CModel", NO_ATTENTION, "it is (not) read", from_hf=YES, remove_norm=YES, depth=YES, prune_layers=YES),
    ]
    for row in rows:
        row.from_hf = row.from_hf or "x"
        row.remove_norm = row.remove_norm or "x"
    version, read = read_page(page(rows))
    assert version == transformers.__version__
    assert read == {row.model_type: cells_of(row) for row in rows}
    assert read["b"][3] == ("no", "from_hf cannot convert this architecture")
