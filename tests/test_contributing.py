"""The recipes of CONTRIBUTING.md, followed in a copy of the package; its diagram is that of the import contract."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pandas as pd

import normfree

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
CHECK = """
import torch
from normfree import NormfreeConfig, NormfreeForCausalLM
from normfree.errors import InputError
from normfree.probes.optional import optional_probe

sizes = dict(vocab_size=20, n_layer=2, n_head=2, n_embd=8, n_positions=8)
torch.manual_seed(0)
models = {
    norm: NormfreeForCausalLM(NormfreeConfig(**sizes, norm=norm, final_norm=norm)) for norm in ("rmsnorm", "lp_norm")
}
models["lp_norm"].load_state_dict(models["rmsnorm"].state_dict())
tokens = torch.randint(20, (3, 8))
logits = [model(tokens).logits for model in models.values()]
torch.testing.assert_close(*logits)
models["lp_norm"].save_pretrained("saved")
assert NormfreeForCausalLM.from_pretrained("saved").config.lp_norm_p == 2.0
try:
    NormfreeConfig(lp_norm_p=3)
except InputError as error:
    assert "lp_norm_p" in str(error)
else:
    raise AssertionError("an option without its norm was taken")

model, outputs = models["lp_norm"], []
for block in model.model.blocks:
    block.ffn.register_forward_hook(lambda module, inputs, output: outputs.append(output.detach().double()))
probe = optional_probe("ffn_output_rms", model)
with probe:
    model(tokens)
expected = [output.square().mean().sqrt().item() for output in outputs]
torch.testing.assert_close([row.value for row in probe.layer_rows()], expected)

from normfree.cli import main
main()
"""


def test_the_diagram_is_the_contract_of_imports() -> None:
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
    layers = [set(re.findall(r"normfree\.(\w+)", layer)) for layer in contract[0]["layers"]]
    (diagram,) = re.findall(r"^```text\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    rooms = [set(re.split(r" · ", re.split(r" {3,}", line.strip())[0])) for line in diagram.splitlines()]
    ground = set().union(*layers[layers.index({"entropy"}) + 1 :])
    assert [*(layer for layer in layers if layer and not layer & ground), ground] == rooms


def test_a_norm_a_probe_and_a_study(preset_file: Path, tmp_path: Path) -> None:
    """The norm is RMSNorm at p = 2, the probe is what hooks see, and the study trains both and shows them."""
    package = tmp_path / "copy" / "normfree"
    shutil.copytree(Path(normfree.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    norm, option, name, probe, study = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    norms = package / "modeling" / "norms.py"
    source = norms.read_text(encoding="utf-8")
    for before, added in (
        ("@dataclass(kw_only=True)\nclass NormOptions", f"{norm}\n\n"),
        ("\n    def check_together", option),
        ("}\n\n\ndef build_norm", name),
    ):
        assert source.count(before) == 1, before
        source = source.replace(before, added + before)
    norms.write_text(source, encoding="utf-8")
    for path, content in (("probes/optional/ffn_output_rms.py", probe), ("studies/lp_norm.py", study)):
        assert f"`src/normfree/{path}`" in PAGE
        (package / path).write_text(content, encoding="utf-8")

    arguments = ["study", "lp-norm", "--preset", preset_file, "--cache-dir", tmp_path / "cache"]
    environment = os.environ | {"PYTHONPATH": str(package.parent), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", CHECK, *map(str, arguments)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "studies" / "lp-norm-tiny"
    assert pd.read_csv(folder / "results.csv")["configuration"].tolist() == ["p = 2", "p = 1", "p = 4"]
    for layers in folder.glob("runs/*/*/layers.parquet"):
        rows = pd.read_parquet(layers)
        read = rows[rows["name"] == "ffn_output_rms"]
        assert set(read["step"]) == {0, 2}
        assert set(read["layer"]) == {0, 1}
        assert (read["value"] > 0).all()
    assert (folder / "figures" / "ffn-output-rms.png").exists()
    assert "Lowest perplexity: p = " in (folder / "report.html").read_text(encoding="utf-8")
