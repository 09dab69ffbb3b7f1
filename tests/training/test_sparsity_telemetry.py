"""The sparsity that telemetry records, against the first batch of a run by hand."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import set_seed

from normfree import NormfreeForCausalLM
from normfree.data import PackedData
from normfree.training import RunConfig, train
from normfree.training.records import LAYERS_FILE


@pytest.mark.parametrize("checkpointing", [False, True])
def test_active_neurons_and_attended_keys_are_recorded(
    tiny_run: Callable[..., RunConfig], data: PackedData, tmp_path: Path, checkpointing: bool
) -> None:
    options = {"activation": "relu", "attention": "spark", "attention_active": 3, "topk": "exact"}
    run = tiny_run(model=options, attn_implementation="eager", gradient_checkpointing=checkpointing)
    seen: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen.append(inputs[0])

    train(run, data, tmp_path / "run")
    layers = pd.read_parquet(tmp_path / "run" / LAYERS_FILE)
    shares = layers[layers["name"] == "active_share"]
    assert sorted(set(shares["step"])) == [0, 2, 4]
    assert shares["head"].isna().all()
    assert shares["value"].between(0.2, 0.8).all()
    keys = layers.loc[layers["name"] == "attended_keys", "value"]
    assert keys.tolist() == pytest.approx([np.mean([1, 2] + 14 * [3])] * 6)

    # at the start, any batch has about half of the neurons above zero
    set_seed(run.seed)
    model = NormfreeForCausalLM(run.build_model_config(data.statistics["vocab_size"])).eval()
    hook = model.model.blocks[1].ffn.down_proj.register_forward_pre_hook(keep)
    with torch.no_grad():
        model(torch.from_numpy(np.asarray(data.eval.tokens[:16], dtype=np.int64)))
    hook.remove()
    expected = (seen[0] > 0).double().mean().item()
    first = shares.loc[(shares["step"] == 0) & (shares["layer"] == 1), "value"].item()
    assert first == pytest.approx(expected, abs=0.02)
