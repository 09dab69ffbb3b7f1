"""The Python snippets of docs/neighbours.md, run as they are; those of libraries that are not installed are skipped."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from normfree import NormfreeForCausalLM
from normfree.removal import remove_norms, to_stock

from .removal.models import constant_std_of

PAGE = (Path(__file__).parents[1] / "docs" / "neighbours.md").read_text(encoding="utf-8")
SNIPPETS = {
    section.partition("\n")[0]: "".join(re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL))
    for section in re.split(r"^#+ ", PAGE, flags=re.MULTILINE)[1:]
}


@pytest.fixture
def model() -> NormfreeForCausalLM:
    return constant_std_of("gpt2")


@pytest.fixture
def names(model: NormfreeForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the page's first snippet defines, in a folder with both exports of a norm removal."""
    monkeypatch.chdir(tmp_path)
    remove_norms(model).save_pretrained("removal/norm-free")
    to_stock(model).save_pretrained("removal/stock")
    return run("Other libraries", {})


def run(section: str, names: dict[str, Any]) -> dict[str, Any]:
    exec(compile(SNIPPETS[section], section, "exec"), names)
    return names


def test_both_exports_have_the_logits_of_the_model(model: NormfreeForCausalLM, names: dict[str, Any]) -> None:
    expected = model(names["tokens"]).logits
    for export in ("norm_free", "stock"):
        torch.testing.assert_close(names[export](names["tokens"]).logits, expected, rtol=1e-4, atol=1e-4)


def test_peft(names: dict[str, Any]) -> None:
    pytest.importorskip("peft")
    run("Training: Trainer, TRL, PEFT, accelerate, Lightning", names)
    names["stock"].eval()
    with torch.no_grad(), names["normfree"].EntropyProbe(names["stock"]) as probe:
        names["stock"](names["tokens"])
    assert names["row"]["entropy/L1"] == pytest.approx(probe.per_head()[1].mean().item(), rel=0.05)


def test_transformer_lens(names: dict[str, Any]) -> None:
    pytest.importorskip("transformer_lens")
    run("TransformerLens", names)
    torch.testing.assert_close(names["logits"], names["stock"](names["tokens"]).logits, rtol=1e-4, atol=1e-4)
    pattern = names["cache"]["pattern", 0].double()
    with names["normfree"].EntropyProbe(names["stock"]) as probe:
        names["stock"](names["tokens"])
    entropy = -torch.xlogy(pattern, pattern).sum(-1).mean((0, 2))
    torch.testing.assert_close(probe.per_head()[0].double(), entropy, rtol=0, atol=1e-5)


CHECK = """
with torch.no_grad():
    stream = norm_free(tokens, output_hidden_states=True).hidden_states
assert written.shape == stream[1].shape
assert probe.unreadable == {}
with normfree.EntropyProbe(norm_free) as alone:
    norm_free(tokens)
torch.testing.assert_close(probe.per_head(), alone.per_head(), rtol=0, atol=0)
"""


def test_nnsight(names: dict[str, Any]) -> None:
    """In a process of its own: nnsight gives every object a method ``save``, which breaks torch's export to ONNX."""
    if importlib.util.find_spec("nnsight") is None:
        pytest.skip("nnsight is not installed")
    Path("script.py").write_text(SNIPPETS["Other libraries"] + SNIPPETS["nnsight"] + CHECK, encoding="utf-8")
    ended = subprocess.run([sys.executable, "script.py"], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_the_onnx_graph_of_a_norm_free_model_has_no_norm(names: dict[str, Any]) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    run("ONNX", names)
    operations = [node.op_type for node in names["program"].model.graph]
    assert "Softmax" in operations
    assert not [each for each in operations if "Norm" in each or each in ("ReduceMean", "Sqrt", "Reciprocal")]
    shorter = names["tokens"][:, :6]
    (logits,) = onnxruntime.InferenceSession("norm-free.onnx").run(None, {"input_ids": shorter.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), names["norm_free"](shorter).logits, rtol=0, atol=1e-5)
    program = torch.onnx.export(
        names["Logits"](names["stock"].eval()), (names["tokens"],), dynamic_shapes=names["length"]
    )
    assert program is not None
    kinds = [node.op_type for node in program.model.graph]
    assert kinds.count("LayerNormalization") == 2 * names["stock"].config.n_layer + 1
