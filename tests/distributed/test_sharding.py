"""A sharded model computes what a whole one does, wherever its norms stand; what cannot be sharded is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState

from normfree import NormfreeConfig, NormfreeForCausalLM
from normfree.data import PackedData
from normfree.errors import InputError
from normfree.modeling.decoder_blocks import decoder_blocks
from normfree.processes import process_index
from normfree.training import RunConfig, train
from normfree.training.distributed import (
    load_whole_optimizer_state,
    own_part,
    shard,
    whole,
    whole_model_state,
    whole_optimizer_state,
)

from .launch import together

ARCHITECTURES: list[dict[str, Any]] = [
    {},
    {"norm_placement": "post"},
    {"norm_placement": "mix", "n_post_layer": 1},
    {"norm_placement": "sandwich"},
    {"norm_placement": "deepnorm"},
    {"norm_placement": "hybrid"},
    {"norm_placement": "hybrid_star"},
    {"norm": "dyt", "final_norm": "dyt", "tie_word_embeddings": False},
    {"norm": "derf", "final_norm": "derf"},
    {"norm": "none", "final_norm": "none", "activation": "learnable_leaky_relu"},
    {"norm": "rmsnorm", "position": "rotary", "ffn": "gated", "activation": "silu", "parallel_residual": True},
    {"ffn": "spark", "attention": "spark", "qk_norm": "rmsnorm"},
]


def steps(model: NormfreeForCausalLM, tokens: torch.Tensor) -> tuple[list[float], torch.optim.Optimizer]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(2):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, optimizer


def built_for_cuda(check_available: bool = False) -> torch.device | None:
    """What PyPI's torch says where there is no GPU."""
    return None if check_available else torch.device("cuda")


def compare() -> None:
    """Losses, weights and optimizer states after two steps, on the same tokens in both processes."""
    PartialState(cpu=True)
    if not torch.accelerator.is_available():
        torch.accelerator.current_accelerator = built_for_cuda  # this process ends with the test
    for options in ARCHITECTURES:
        torch.manual_seed(0)
        config = NormfreeConfig(vocab_size=50, n_layer=2, n_head=2, n_embd=16, n_positions=8, **options)
        plain = NormfreeForCausalLM(config)
        sharded = copy.deepcopy(plain)
        tokens = torch.randint(0, 50, (3, 8))
        losses, optimizer = steps(plain, tokens)
        shard(sharded)
        n_held = sum(own_part(each).numel() for each in sharded.parameters())
        assert n_held < 0.6 * plain.num_parameters(), options
        sharded_losses, sharded_optimizer = steps(sharded, tokens)
        torch.testing.assert_close(sharded_losses, losses)
        weights = dict(plain.named_parameters())
        for name, weight in sharded.named_parameters():
            torch.testing.assert_close(whole(weight), weights[name], msg=f"{options} {name}: {{}}".format)
        expected = optimizer.state_dict()["state"]
        state = whole_optimizer_state(sharded_optimizer)
        saved = whole_model_state(sharded)
        if process_index() > 0:
            assert (state["state"], saved) == ({}, {})
        else:
            torch.testing.assert_close(state["state"], expected)
            assert saved.keys() == {name for name, _ in plain.named_parameters()} | {
                name for name, _ in plain.named_buffers() if name in plain.state_dict()
            }
        # The state of one process, shared out, is the sharded one.
        before = [own_part(each["exp_avg"]).clone() for each in sharded_optimizer.state.values()]
        load_whole_optimizer_state(sharded_optimizer, optimizer.state_dict())
        after = [own_part(each["exp_avg"]) for each in sharded_optimizer.state.values()]
        torch.testing.assert_close(after, before)


def test_every_architecture_can_be_sharded(tmp_path: Path) -> None:
    ended = together(2, compare, tmp_path)
    assert ended.codes == [0, 0], ended.output


def shares() -> None:
    """What two processes hold together is the model, and each holds about half of every block."""
    PartialState(cpu=True)
    model = NormfreeForCausalLM(NormfreeConfig(vocab_size=50, n_layer=3, n_head=2, n_embd=16, n_positions=8))
    sizes = [sum(each.numel() for each in block.parameters()) for block in decoder_blocks(model).values()]
    shard(model)
    for block, size in zip(decoder_blocks(model).values(), sizes, strict=True):
        assert abs(sum(own_part(each).numel() for each in block.parameters()) - size / 2) < size / 20
    held = torch.tensor(sum(own_part(each).numel() for each in model.parameters()))
    torch.distributed.all_reduce(held)
    assert held == model.num_parameters()


def test_a_process_holds_its_share(tmp_path: Path) -> None:
    ended = together(2, shares, tmp_path)
    assert ended.codes == [0, 0], ended.output


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": {"norm": "none", "activation": "learnable_leaky_relu", "slope_sharing": "global"}},
            r"one slope for all layers \(model.slope_sharing global\)",
        ),
        ({"objective": {"kind": "entropy_regularization"}}, "an objective that learns parameters of its own"),
    ],
)
def test_what_cannot_be_sharded_is_refused(
    data: PackedData,
    tiny_run: Callable[..., RunConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    message: str,
) -> None:
    content = tiny_run(sharding="full").model_dump(mode="json")
    content["model"] |= changes.pop("model", {})
    run = RunConfig.model_validate({**content, **changes})
    monkeypatch.setattr("normfree.training.recipe.Recipe.is_sharded", True)
    with pytest.raises(InputError, match=f"recipe.sharding full does not go with {message}.*; set recipe.sharding to"):
        train(run, data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_one_process_has_nothing_to_share(data: PackedData, tiny_run: Callable[..., RunConfig], tmp_path: Path) -> None:
    run = tiny_run(sharding="full", steps=2)
    assert not run.recipe.is_sharded
    assert train(run, data, tmp_path / "run").row["status"] == "finished"


@pytest.mark.parametrize("name", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_a_launcher_that_shards_in_its_own_way_is_refused(
    tiny_run: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "true")
    with pytest.raises(InputError, match="asks for FSDP or DeepSpeed; leave that out, and set"):
        tiny_run().recipe.check(16)
