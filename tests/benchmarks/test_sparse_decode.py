"""``normfree bench sparse-decode`` at sizes that take no time: bytes by hand, ratios of the same round."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from normfree import NormfreeConfig
from normfree.benchmarks import decode_models, sparse_decode
from normfree.spark.decode import decode_backends

Command = Callable[..., tuple[int, str, str]]
pytestmark = pytest.mark.skipif(decode_backends()["cpu"] is not None, reason="the kernels are not compiled")
FFN = ("sparse-decode", "ffn", "--width", 64, "--dense-inner", 128, "--rounds", 2)
MODEL = ("sparse-decode", "model", "--width", 64, "--dense-inner", 128, "--inner", 192, "--layers", 1, "--tokens", 300)
ONE_THREAD = "1 threads, process_time"


def found(command: Command, *arguments: object) -> dict[str, Any]:
    code, out, err = command("bench", *arguments, "--json")
    assert code == 0, err
    result: dict[str, Any] = json.loads(out)
    assert result["command"].startswith("normfree bench sparse-decode ")
    assert result["device"].startswith("CPU, ")
    return result


def test_a_feed_forward_network(normfree: Command) -> None:
    result = found(normfree, *FFN, "--dtype", "bf16", "--threads", "1,2")
    assert result["dtype"] == "bf16"
    assert torch.get_num_threads() == 1, "as before"
    for threads in (ONE_THREAD, "2 threads, perf_counter"):
        each = result[threads]
        # 8 % of 128 neurons
        assert each["shape"] == {"d_model": 64, "n_inner": 128, "r": 32, "active": 10, "layers_cycled": 6}
        # dense: two matrices of 128 · 64; sparse: 128 · 32 of the predictor, and of 10 neurons 32 in and 64 out
        ideal = 2 * 128 * 64 / (128 * 32 + 10 * 96)
        assert each["ideal"] == {"dense": round(ideal, 2), "gated": round(1.5 * ideal, 2)}
        milliseconds = each["milliseconds"]
        assert all(time > 0 for time in milliseconds.values())
        dense = {name for name in milliseconds if not name.startswith("spark")}
        assert each["times_faster"].keys() == {f"spark, {b}, than {name}" for b in ("cpu", "torch") for name in dense}
        for ratio in each["times_faster"].values():
            low, high = ratio["middle_80_percent"]
            assert 0 < low <= ratio["median"] <= high


def test_a_whole_model(normfree: Command) -> None:
    result = found(normfree, *MODEL, "--vocabulary", 100, "--rounds", 2)[ONE_THREAD]
    projections, unembedding = 64 * (2 * 2048 + 2 * 1024), 100 * 64
    # three matrices of 128 neurons, or two of 192, are as many weights; two norms and the final one
    assert result["parameters"] == dict.fromkeys(("dense", "spark"), projections + 3 * 128 * 64 + unembedding + 3 * 64)
    # float32; dense: keys and values of 300 tokens. spark: the predictor's half of all keys; the rest of keys, and
    # values, of at most 256 tokens for each of 8 heads, which 4 heads share: all 300. 15 of 192 neurons
    dense = projections + 3 * 128 * 64 + unembedding + 2 * 300 * 1024
    spark = projections + 192 * 32 + 15 * 96 + unembedding + 2 * 300 * 1024
    assert result["gigabytes_a_token"] == {"dense": round(4 * dense / 1e9, 3), "spark": round(4 * spark / 1e9, 3)}
    assert result["ideal"] == round(dense / spark, 2)
    assert result["tokens_a_second"].keys() == {f"{m}, {by}" for m in ("dense", "spark") for by in ("kernels", "torch")}
    assert all(speed > 0 for speed in result["tokens_a_second"].values())
    assert 0 < result["active_on_average"]["active_share"] < 0.25
    assert 200 < result["active_on_average"]["attended_keys"] <= 301


@pytest.mark.parametrize("arguments", [(*FFN, "--rounds", 1), (*MODEL, "--vocabulary", 100, "--rounds", 1)])
def test_tables(normfree: Command, arguments: tuple[object, ...]) -> None:
    code, out, err = normfree("bench", *arguments)
    assert (code, err) == (0, "")
    assert ONE_THREAD in out
    assert "by the bytes that are read: " in out


def test_the_middle_of_ten_rounds() -> None:
    slow = [float(i) for i in (10, 1, 9, 2, 8, 3, 7, 4, 6, 5)]
    assert sparse_decode._ratio(slow, [1.0] * 10) == {"median": 5.5, "middle_80_percent": [2.0, 9.0]}


def test_the_kernels_models_say_what_torchs_say() -> None:
    """What is timed as dense is the same function by either kernels."""
    torch.manual_seed(0)
    config = NormfreeConfig(
        vocab_size=50,
        n_positions=64,
        n_layer=2,
        n_head=4,
        n_kv_head=2,
        head_dim=16,
        n_embd=32,
        norm="rmsnorm",
        final_norm="rmsnorm",
        position="rotary",
        attention_bias="none",
        mlp_bias=False,
    )
    model = decode_models.built(config, torch.float32, decode_models.random_matrix(50, 32, dtype=torch.float32))
    ALL_ATTENTION_FUNCTIONS.register("by_kernel", decode_models.attention_by_kernel)
    logits = []
    for by_kernel in (True, False):
        torch.manual_seed(1)
        cache = decode_models.filled_cache(config, 10, torch.float32, torch.device("cpu"))
        decode_models.Linear.by_kernel = by_kernel
        model.config._attn_implementation = "by_kernel" if by_kernel else "sdpa"
        with torch.inference_mode():
            logits.append(model(input_ids=torch.tensor([[7]]), cache=cache, use_cache=True).logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-6)
    assert cache.get_seq_length() == 11


def test_a_cache_makes_more_room_when_it_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_models, "ROOM", 2)
    layer = decode_models.RoomyLayer()
    keys, values = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4)
    layer.fill(keys, values)
    for _ in range(5):
        key, value = torch.randn(1, 2, 1, 4), torch.randn(1, 2, 1, 4)
        keys, values = torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)
        held = layer.update(key, value)
        assert torch.equal(held[0], keys)
        assert torch.equal(held[1], values)


def test_a_ratio_keeps_its_digits_however_small_it_is() -> None:
    assert sparse_decode._ratio([1.0], [812.0]) == {"median": 0.00123, "middle_80_percent": [0.00123, 0.00123]}
