"""examples/attention_entropy.py runs as it is, without a network."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "attention_entropy.py"


def test_example_prints_the_entropy_of_every_head(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE)])
    names = runpy.run_path(str(EXAMPLE), run_name="__main__")
    printed = capsys.readouterr().out.splitlines()
    shares = np.array([[float(word) for word in line.split()[2:]] for line in printed if line.startswith("layer")])

    model = names["tiny_random_model"]().eval()
    model.set_attn_implementation("eager")
    input_ids = torch.tensor([list(EXAMPLE.read_bytes())[:256]])
    with torch.no_grad():
        attentions = model(input_ids, output_attentions=True).attentions
    p = np.stack([each[0].double().numpy() for each in attentions])
    entropy = -np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0)), 0.0).sum(-1).mean(-1)
    np.testing.assert_allclose(shares, entropy / np.log(np.arange(1, 257)).mean(), atol=0.0051)
    assert float(printed[-2].split()[2]) == pytest.approx(entropy.mean(), abs=6e-4)
    assert float(printed[-1].split()[-2]) == pytest.approx(100 * p[..., 0].mean(), abs=0.06)
