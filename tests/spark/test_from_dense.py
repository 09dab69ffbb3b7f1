"""What a sparse model keeps of the dense one it starts from, and the command that makes it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from normfree import NormfreeConfig, NormfreeForCausalLM
from normfree.data import PackedData
from normfree.errors import InputError
from normfree.spark import to_spark
from normfree.training import RunConfig, RunResult, train
from tests.modeling import reference

SIZES: dict[str, Any] = {"vocab_size": 19, "n_positions": 32, "n_layer": 2, "n_head": 4, "n_embd": 32}
Command = Callable[..., tuple[int, str, str]]


def dense(**options: Any) -> NormfreeForCausalLM:
    return reference.perturb(NormfreeForCausalLM(NormfreeConfig(**{**SIZES, **options}))).eval()


@pytest.mark.parametrize("options", [{}, {"norm": "none", "activation": "relu", "tie_word_embeddings": False}])
def test_a_dense_network_is_cut_and_nothing_is_lost(options: dict[str, Any]) -> None:
    model = dense(**options)
    spark = to_spark(model, ffn_active=0.5, ffn_predictor_dim=20, attention_active=9, attention_predictor_dim=3)
    assert spark.num_parameters() == model.num_parameters()
    sizes = spark.config.spark_sizes
    assert (sizes.ffn_active, sizes.ffn_predictor_dim) == (64, 20)
    assert (sizes.attention_active, sizes.attention_predictor_dim) == (9, 3)
    before, after = model.state_dict(), spark.state_dict()
    for layer in range(2):
        ffn = f"model.blocks.{layer}.ffn"
        pieces = [after.pop(f"{ffn}.predictor_proj.weight"), after.pop(f"{ffn}.up_proj.weight")]
        assert torch.equal(torch.cat(pieces, dim=1), before.pop(f"{ffn}.up_proj.weight"))
        assert torch.equal(after.pop(f"{ffn}.predictor_proj.bias"), before.pop(f"{ffn}.up_proj.bias"))
    assert after.keys() == before.keys()
    for name, weight in before.items():
        assert torch.equal(after[name], weight), name
    with torch.no_grad():
        assert spark(torch.zeros(1, 5, dtype=torch.long)).logits.isfinite().all()
        spark.model.blocks[0].ffn.up_proj.weight.zero_()
    assert model.model.blocks[0].ffn.up_proj.weight.any()  # a copy, not a view


def test_a_gated_network_keeps_a_part_of_each_factor() -> None:
    model = dense(ffn="gated", n_inner=48)
    spark = to_spark(model, attention=False, topk="exact")
    ours, theirs = spark.model.blocks[1].ffn, model.model.blocks[1].ffn
    assert torch.equal(ours.predictor_proj.weight, theirs.gate_proj.weight[:, :16])
    assert torch.equal(ours.predictor_proj.bias, theirs.gate_proj.bias)
    assert torch.equal(ours.up_proj.weight, theirs.up_proj.weight[:, 16:])
    assert (spark.config.attention, spark.config.topk) == ("softmax", "exact")
    assert model.num_parameters() - spark.num_parameters() == 2 * (32 * 48 + 48)


def test_attention_alone_keeps_every_weight() -> None:
    model = dense().double()
    spark = to_spark(model, ffn=False)
    assert spark.dtype == torch.float64
    assert not spark.training
    assert spark.config._attn_implementation == "eager"
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), spark.parameters(), strict=True))


@pytest.mark.parametrize(
    ("model_options", "options", "message"),
    [
        ({}, {"ffn": False, "attention": False}, "to_spark has nothing to do"),
        ({"ffn": "spark"}, {}, "the model's ffn is spark already"),
        ({"attention": "spark"}, {}, "the model's attention is spark already"),
        ({}, {"ffn": False, "ffn_active": 0.1}, "ffn_active means nothing for ffn 'dense'"),
        ({}, {"ffn_active": 1000}, "ffn_active is 1000; as a count it must be 1 to 128"),
        ({"activation": "leaky_relu"}, {}, "activation leaky_relu means nothing with ffn 'spark'"),
    ],
)
def test_what_cannot_be_converted_is_one_line(
    model_options: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as raised:
        to_spark(dense(**model_options), **options)
    assert str(raised.value).startswith(message)


def test_a_run_starts_from_what_the_command_made(
    normfree: Command, plain_run: RunResult, tiny_run: Callable[..., RunConfig], data: PackedData, tmp_path: Path
) -> None:
    options = ("--ffn-active", "0.25", "--attention-active", "4", "--topk", "exact")
    code, out, err = normfree("to-spark", plain_run.folder, "--out", tmp_path / "spark", *options, "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["parameters"] == told["dense_parameters"]
    recipe: dict[str, Any] = {"steps": 3, "attn_implementation": "eager"}
    start = tiny_run(**recipe).model_copy(update={"model": {}, "start_from": str(tmp_path / "spark")})
    result = train(start, data, tmp_path / "sparse")
    assert result.row["status"] == "finished"
    config = NormfreeConfig.from_pretrained(tmp_path / "sparse" / "checkpoint-3")
    assert (config.ffn, config.attention, config.topk) == ("spark", "spark", "exact")
    assert (config.spark_sizes.ffn_active, config.spark_sizes.attention_active) == (16, 4)

    code, _, err = normfree("to-spark", plain_run.folder, "--out", tmp_path / "spark")
    assert code == 2
    assert "exists and is not empty" in err
    code, _, err = normfree("to-spark", plain_run.folder, "--out", tmp_path / "new", "--ffn-active", "many")
    assert code == 2
    assert err.count("\n") == 1
    assert "--ffn-active is 'many'" in err
    assert not (tmp_path / "new").exists()
