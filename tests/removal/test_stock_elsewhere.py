"""The stock export of each family in other tools, in processes that never import normfree. Those that are not
installed are skipped (`make neighbours` installs them all).
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from normfree import NormfreeForCausalLM, to_stock
from normfree.data import PackedData

from ..interpret.test_downstream import ROOT, expected_log_likelihoods
from .models import FAMILIES, constant_std_with, tokens

BEGIN = """
import json, sys
import torch
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer

def logits(folder, tokens):
{body}

folder = Path(sys.argv[1])
tokens = torch.load(folder / "tokens.pt")
found = {{place.name: logits(str(place), tokens) for place in sorted(folder.iterdir()) if place.is_dir()}}
torch.save(found, folder / "logits.pt")
assert "normfree" not in sys.modules
"""
BODIES = {
    "transformers": """
    assert AutoTokenizer.from_pretrained(folder)("def x").input_ids
    return AutoModelForCausalLM.from_pretrained(folder)(tokens).logits.detach()
""",
    "transformer_lens": """
    from transformer_lens.model_bridge import TransformerBridge
    bridge = TransformerBridge.boot_transformers(folder, device="cpu")
    with torch.no_grad():
        found, cache = bridge.run_with_cache(tokens)
    assert cache["pattern", 0].shape[-2:] == (tokens.shape[1], tokens.shape[1])
    return found
""",
    "nnsight": """
    from nnsight import LanguageModel
    traced = LanguageModel(folder, device_map="cpu", dispatch=True)
    with torch.no_grad(), traced.trace(tokens):
        found = traced.output.logits.save()
    return found.detach()
""",
}
LM_EVAL = """
import json, sys
import lm_eval.evaluator
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

lm_eval.evaluator.add_env_info = lambda _: None  # a list of the installed packages: slow
manager = TaskManager(include_path=sys.argv[2], include_defaults=False)
found = {}
for place in sys.argv[3:]:
    arguments = f"pretrained={sys.argv[1]}/{place},dtype=float32"
    results = simple_evaluate("hf", model_args=arguments, tasks=["python_syntax"], task_manager=manager, device="cpu")
    samples = sorted(results["samples"]["python_syntax"], key=lambda sample: sample["doc_id"])
    found[place] = [[request[0][0] for request in sample["resps"]] for sample in samples]
json.dump(found, open(sys.argv[1] + "/found.json", "w"))
assert "normfree" not in sys.modules
"""


@pytest.fixture(scope="module")
def models(data: PackedData) -> dict[str, NormfreeForCausalLM]:
    vocab_size = data.statistics["vocab_size"]
    return {
        family: constant_std_with({**options, "vocab_size": vocab_size, "n_positions": 512}).float()
        for family, options in FAMILIES.items()
    }


@pytest.fixture(scope="module")
def folder(models: dict[str, NormfreeForCausalLM], data: PackedData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the stock export of each family, and tokens."""
    folder = tmp_path_factory.mktemp("exports")
    for family, model in models.items():
        to_stock(model).save_pretrained(folder / family)
        data.tokenizer.save_pretrained(folder / family)
    torch.save(tokens(), folder / "tokens.pt")
    return folder


def run(code: str, *arguments: object) -> None:
    """Runs a program without the network."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": f"{arguments[0]}/datasets"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600, env=os.environ | offline)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("tool", BODIES)
def test_logits(tool: str, models: dict[str, NormfreeForCausalLM], folder: Path) -> None:
    if importlib.util.find_spec(tool) is None:
        pytest.skip(f"{tool} is not installed")
    run(BEGIN.format(body=BODIES[tool].strip("\n")), folder)
    found = torch.load(folder / "logits.pt")
    for family, model in models.items():
        with torch.no_grad():
            torch.testing.assert_close(found[family], model(tokens()).logits, rtol=1e-4, atol=1e-4)


def test_lm_eval_scores(models: dict[str, NormfreeForCausalLM], data: PackedData, folder: Path) -> None:
    """Log-likelihoods of a local task are those of the model's logits."""
    run(LM_EVAL, folder, ROOT / "examples" / "lm_eval", *models)
    found = json.loads((folder / "found.json").read_text())
    for family, model in models.items():
        expected = torch.from_numpy(expected_log_likelihoods(model, data))
        torch.testing.assert_close(torch.tensor(found[family], dtype=torch.float64), expected, rtol=1e-4, atol=1e-3)
