"""The sparse layers against float64 NumPy, their number of parameters, and the model that has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.special import erf, softmax
from torch import nn

from normfree import EntropyProbe, NormfreeConfig, NormfreeForCausalLM, sparse_decode
from normfree.errors import InputError
from normfree.modeling.activations import ACTIVATIONS
from normfree.modeling.feed_forward import FEED_FORWARDS
from normfree.probes import EntropyRecorder
from normfree.probes.sparsity_probe import SparsityProbe
from normfree.spark.sparse_attention import rotate_parts
from tests.modeling import reference
from tests.spark import numpy_topk

Array = NDArray[np.float64]
SIZES: dict[str, Any] = {"vocab_size": 19, "n_positions": 32, "n_layer": 2, "n_head": 4, "n_embd": 32}
SPARK: dict[str, Any] = {"ffn": "spark", "ffn_active": 0.25, "attention": "spark", "attention_active": 5}
ROTARY: dict[str, Any] = {"position": "rotary", "n_kv_head": 2, "norm": "none"}


def build(**options: Any) -> NormfreeForCausalLM:
    return reference.perturb(NormfreeForCausalLM(NormfreeConfig(**{**SIZES, **options})), std=0.1).eval()


def gelu(x: Array) -> Array:
    return x * (1 + erf(x / np.sqrt(2))) / 2


def threshold_of_20(scores: Array, topk: str) -> Array:
    """The threshold that keeps 20 of 128 neurons."""
    if topk == "statistical":
        return numpy_topk.statistical_threshold(scores, 20 / 128)
    return numpy_topk.exact_threshold(scores, 20)


@pytest.mark.parametrize("topk", ["statistical", "exact"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_feed_forward_network_is_that_of_the_equation(topk: str, bias: bool) -> None:
    config = NormfreeConfig(**SIZES, ffn="spark", ffn_active=20, ffn_predictor_dim=12, topk=topk, mlp_bias=bias)
    layer = FEED_FORWARDS["spark"](config, 0).double()
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    w = {name: each.detach().numpy() for name, each in layer.named_parameters()}
    nn_in = x.numpy()
    scores = nn_in[..., :12] @ w["predictor_proj.weight"].T + w.get("predictor_proj.bias", 0)
    threshold = threshold_of_20(scores, topk)
    neurons = gelu(numpy_topk.soft_threshold(scores, threshold)) * (nn_in[..., 12:] @ w["up_proj.weight"].T)
    expected = neurons @ w["down_proj.weight"].T + w.get("down_proj.bias", 0)
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("topk", ["statistical", "exact"])
@pytest.mark.parametrize("bias", [True, False])
def test_without_a_predictor_the_whole_input_chooses(topk: str, bias: bool) -> None:
    config = NormfreeConfig(**SIZES, ffn="topk", ffn_active=20, topk=topk, mlp_bias=bias)
    layer = FEED_FORWARDS["topk"](config, 0).double()
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    w = {name: each.detach().numpy() for name, each in layer.named_parameters()}
    scores = x.numpy() @ w["up_proj.weight"].T + w.get("up_proj.bias", 0)
    threshold = threshold_of_20(scores, topk)
    neurons = gelu(numpy_topk.soft_threshold(scores, threshold))
    assert ((neurons != 0).sum(-1) == 20).all() or topk == "statistical"
    expected = neurons @ w["down_proj.weight"].T + w.get("down_proj.bias", 0)
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=1e-10, atol=1e-12)
    model = NormfreeForCausalLM(config)
    assert model.num_parameters() == NormfreeForCausalLM(NormfreeConfig(**SIZES, mlp_bias=bias)).num_parameters()
    with pytest.raises(InputError, match="one of them must be 'spark'"), sparse_decode(model):
        pass


def numpy_attention(q: Array, k: Array, v: Array, r: int, n_active: int, topk: str, first: int) -> Array:
    """One head, causal: q, k, v [T, head_dim]; keys before ``first`` are padding. Rows of padding are NaN."""
    output = np.full_like(v, np.nan)
    for t in range(first, len(q)):
        keys = slice(first, t + 1)
        scores = k[keys, :r] @ q[t, :r] / np.sqrt(r)
        kept = numpy_topk.kept(scores, n_active, topk)
        weights = np.zeros_like(scores)
        weights[kept] = softmax(scores[kept])
        gates = np.log1p(np.exp(k[keys, r:] @ q[t, r:] / np.sqrt(q.shape[1] - r)))
        output[t] = (weights * gates) @ v[keys]
    return output


@pytest.mark.parametrize("topk", ["statistical", "exact"])
@pytest.mark.parametrize("first", [0, 4])
@pytest.mark.parametrize("n_kv_head", [4, 2])
def test_attention_is_that_of_the_equation(topk: str, first: int, n_kv_head: int) -> None:
    model = build(**SPARK, attention_predictor_dim=3, n_kv_head=n_kv_head, topk=topk).double()
    attention = model.model.blocks[0].attention
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        getattr(attention, f"{name}_proj").register_forward_hook(lambda m, i, o, name=name: seen.__setitem__(name, o))
        for name in "qkv"
    ]
    hooks.append(attention.o_proj.register_forward_pre_hook(lambda m, i: seen.__setitem__("o", i[0])))
    mask = torch.ones(1, 20, dtype=torch.long)
    mask[:, :first] = 0
    with torch.no_grad():
        model(torch.randint(19, (1, 20)), attention_mask=mask)
    for hook in hooks:
        hook.remove()
    heads = {name: each[0].view(20, -1, 8).transpose(0, 1).numpy() for name, each in seen.items()}
    for head in range(4):
        group = head * n_kv_head // 4
        expected = numpy_attention(heads["q"][head], heads["k"][group], heads["v"][group], 3, 5, topk, first)
        np.testing.assert_allclose(heads["o"][head][first:], expected[first:], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("r", [1, 16, 31])
def test_as_many_parameters_as_the_dense_layers(bias: str, r: int) -> None:
    options: dict[str, Any] = {**SIZES, "attention_bias": bias, "mlp_bias": bias == "all"}
    dense = NormfreeForCausalLM(NormfreeConfig(**options))
    spark = NormfreeForCausalLM(NormfreeConfig(**options, **SPARK, ffn_predictor_dim=r, attention_predictor_dim=1))
    assert spark.num_parameters() == dense.num_parameters()
    for part in ("ffn", "attention"):
        counts = [
            sum(each.numel() for each in getattr(model.model.blocks[0], part).parameters()) for model in (dense, spark)
        ]
        assert counts[0] == counts[1]


def test_as_many_parameters_as_a_gated_network_of_two_thirds_the_width() -> None:
    gated = NormfreeForCausalLM(NormfreeConfig(**SIZES, ffn="gated", n_inner=64, mlp_bias=False))
    spark = NormfreeForCausalLM(NormfreeConfig(**SIZES, ffn="spark", n_inner=96, mlp_bias=False))
    assert spark.num_parameters() == gated.num_parameters()


def test_every_activation_leaves_an_inactive_neuron_at_zero() -> None:
    for name in ACTIVATIONS:
        config = NormfreeConfig(**SIZES, activation=name)
        assert ACTIVATIONS[name](config)(torch.zeros(3)).tolist() == [0.0] * 3


def test_an_exact_top_k_computes_k_neurons_and_attends_to_k_keys() -> None:
    model = build(**SPARK, topk="exact")
    with SparsityProbe(model) as probe, torch.no_grad():
        attentions = model(torch.randint(19, (3, 24)), output_attentions=True).attentions
    assert probe.active_share().tolist() == [0.25] * 2
    seen = [min(t + 1, 5) for t in range(24)]
    for weights in attentions:
        assert torch.equal((weights > 0).sum(-1), torch.tensor(seen).expand(3, 4, 24))
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4, 24))
        assert torch.equal(weights, weights.tril())
    assert probe.attended_keys().tolist() == pytest.approx([np.mean(seen)] * 2, rel=1e-12)
    assert set(probe.by_layer()) == {"active_share", "attended_keys"}


@torch.no_grad()
def test_the_probe_reads_natural_sparsity_and_counts_nothing_afterwards() -> None:
    model = build(activation=["relu", "gelu"])
    hidden: list[torch.Tensor] = []
    hook = model.model.blocks[0].ffn.down_proj.register_forward_pre_hook(lambda m, i: hidden.append(i[0]))
    with SparsityProbe(model) as probe:
        for _ in range(2):
            model(torch.randint(19, (2, 9)))
    hook.remove()
    share = np.mean([(each > 0).double().mean().item() for each in hidden])
    assert probe.active_share()[0].item() == pytest.approx(share, rel=1e-12)
    assert 0.2 < share < 0.8
    assert probe.active_share()[1].item() == pytest.approx(1.0, abs=1e-3)
    assert set(probe.by_layer()) == {"active_share"}
    before = probe.active_share()
    model(torch.randint(19, (2, 9)))
    assert torch.equal(probe.active_share(), before)
    model.model.blocks[0].ffn.up_proj.weight[3, 4] = torch.nan
    with SparsityProbe(model) as probe:
        model(torch.randint(19, (2, 9)))
    assert probe.active_share().isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@torch.no_grad()
def test_the_probe_counts_numbers_of_every_dtype_that_are_not_zero(dtype: torch.dtype) -> None:
    model: Any = build(n_layer=1)
    model.to(dtype)
    down_proj = model.model.blocks[0].ffn.down_proj
    # zeros of both signs, the smallest subnormal numbers, and a sum that float16 cannot hold
    tiny, largest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps, torch.finfo(torch.float16).max
    row = torch.zeros(128, dtype=dtype)
    row[:7] = torch.tensor([0.0, -0.0, tiny, -tiny, largest, largest, -1.0], dtype=dtype)
    rows = row.expand(2, 6, 128)[:, ::2]
    with SparsityProbe(model) as probe:
        down_proj(rows)
        down_proj(torch.full((2, 1, 128), -0.0, dtype=dtype))
    assert probe.active_share().tolist() == [6 * 5 / (8 * 128)]
    with SparsityProbe(model) as probe:
        down_proj(torch.where(row == -1, -torch.inf, row)[None, None])
    assert probe.active_share().isnan().all()


@pytest.mark.parametrize("options", [{}, ROTARY, {**ROTARY, "rope_parameters": {"partial_rotary_factor": 0.5}}])
@torch.no_grad()
def test_padding_on_the_left_changes_nothing(options: dict[str, Any]) -> None:
    model = build(**SPARK, **options)
    ids = torch.randint(19, (1, 13))
    padded, mask = torch.cat([torch.zeros(1, 6, dtype=torch.long), ids], 1), torch.ones(1, 19, dtype=torch.long)
    mask[:, :6] = 0
    positions = torch.cat([torch.zeros(6, dtype=torch.long), torch.arange(13)])[None]
    actual = model(padded, attention_mask=mask, position_ids=positions).logits[:, 6:]
    torch.testing.assert_close(actual, model(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{}, ROTARY])
def test_generation_with_a_cache_is_generation_without(options: dict[str, Any]) -> None:
    model = build(**SPARK, **options)
    ids = torch.randint(1, 19, (2, 7))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    generated = [
        model.generate(ids, attention_mask=mask, max_new_tokens=15, do_sample=False, pad_token_id=0, **cache)
        for cache in ({"use_cache": True}, {"use_cache": False}, {"cache_implementation": "static"})
    ]
    assert generated[0].shape == (2, 22)
    assert torch.equal(generated[0], generated[1])
    assert torch.equal(generated[0], generated[2])


@torch.no_grad()
def test_rotated_parts_depend_on_relative_positions_alone() -> None:
    model = build(**ROTARY, attention="spark", head_dim=16, attention_predictor_dim=6)
    embedding = model.model.rotary_embedding
    assert embedding is not None
    q, k = torch.randn(2, 1, 1, 1, 16).unbind()
    products = []
    for shift in (0, 9):
        positions = torch.arange(20)[None] + shift
        at = rotate_parts(q.expand(1, 1, 20, 16), k.expand(1, 1, 20, 16), embedding(q, positions), 6)
        products.append([at[0][0, 0, :, part] @ at[1][0, 0, :, part].T for part in (slice(6), slice(6, None))])
    for before, after in zip(*products, strict=True):
        torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-4)
        assert before.std() > 0.05


def test_halves_of_a_head_have_every_second_frequency() -> None:
    cos = torch.arange(8.0).repeat(2)[None, None]
    q = torch.ones(1, 1, 1, 16)
    rotated, _ = rotate_parts(q, q, (cos, torch.zeros_like(cos)), 8)
    assert rotated[0, 0, 0].tolist() == [0, 2, 4, 6] * 4


def test_gradients_reach_every_parameter_and_checkpointing_keeps_them() -> None:
    ids = torch.randint(19, (2, 20))
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        model = build(**SPARK, use_cache=False).train()
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        with SparsityProbe(model) as probe:
            model(ids, labels=ids).loss.backward()
        gradients.append({name: each.grad for name, each in model.named_parameters()})
        assert [each.n for each in probe._neurons] == [2 * 20 * 128] * 2  # recomputation is not counted
    for name, gradient in gradients[0].items():
        assert gradient is not None
        assert gradient.isfinite().all()
        assert gradient.any(), name
        torch.testing.assert_close(gradient, gradients[1][name])


@pytest.mark.parametrize("topk", ["statistical", "exact"])
def test_it_compiles_as_one_graph(topk: str) -> None:
    model = build(**SPARK, topk=topk)
    ids = torch.randint(19, (2, 12))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids).logits, model(ids).logits)


def test_a_saved_model_is_the_same_model(tmp_path: Path) -> None:
    model = build(**SPARK)
    model.save_pretrained(tmp_path)
    loaded = NormfreeForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.spark_sizes == model.config.spark_sizes
    assert loaded.config._attn_implementation == "eager"
    ids = torch.randint(19, (2, 12))
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@torch.no_grad()
def test_the_entropy_of_a_sparse_head_is_that_of_its_softmax() -> None:
    model = build(**SPARK)
    ids = torch.randint(19, (3, 24))
    with EntropyProbe(model, count_nonfinite=True) as probe:
        attentions = model(ids, output_attentions=True).attentions
    assert probe.unreadable == {}
    weights = np.stack([each.double().numpy() for each in attentions])
    expected = -(weights * np.log(np.where(weights > 0, weights, 1))).sum(-1).mean((1, 3))
    np.testing.assert_allclose(probe.per_head().numpy(), expected, rtol=1e-5)
    assert (probe.per_head() < np.log(15)).all()
    assert not torch.stack(probe.nonfinite()).any()


@torch.no_grad()
def test_what_reads_queries_and_keys_names_sparse_heads_as_unreadable() -> None:
    model = build(**SPARK)
    with EntropyProbe(model, backend="reference") as probe:
        model(torch.randint(19, (1, 9)))
    assert set(probe.unreadable.values()) == {
        "it attends to selected keys, and handed back no float32 distribution over them"
    }
    with EntropyRecorder(model) as recorded:
        model(torch.randint(19, (1, 9)))
    with pytest.raises(InputError, match="it attends to selected keys"):
        recorded.per_head()


def test_other_attention_implementations_are_refused() -> None:
    config = NormfreeConfig(**SIZES, **SPARK)
    model = NormfreeForCausalLM(config)
    message = "attention spark has the implementation eager only, not 'sdpa'"
    with pytest.raises(InputError, match=message):
        model.set_attn_implementation("sdpa")
    with pytest.raises(InputError, match=message):
        NormfreeForCausalLM._from_config(NormfreeConfig(**SIZES, **SPARK), attn_implementation="sdpa")
    model.config._attn_implementation_internal = "sdpa"
    with pytest.raises(InputError, match="the configuration names 'sdpa'"):
        model(torch.zeros(1, 3, dtype=torch.long))
    dense = NormfreeForCausalLM(NormfreeConfig(**SIZES, ffn="spark"))
    assert dense.config._attn_implementation == "sdpa"


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"ffn_active": 0.1}, "ffn_active means nothing for ffn 'dense'; leave it out, or use ffn: spark or topk"),
    ({"ffn": "topk", "ffn_predictor_dim": 4}, "ffn_predictor_dim means nothing for ffn 'topk'"),
    ({"ffn": "topk", "activation": "leaky_relu"}, "activation leaky_relu means nothing with ffn 'topk'"),
    ({"ffn": "gated", "ffn_predictor_dim": 4}, "ffn_predictor_dim means nothing for ffn 'gated'"),
    ({"attention_active": 4}, "attention_active means nothing for attention 'softmax'"),
    ({"attention_predictor_dim": 4}, "attention_predictor_dim means nothing for attention 'softmax'"),
    ({"topk": "exact"}, "topk means nothing for ffn 'dense' and attention 'softmax'"),
    ({"ffn": "spark", "topk": "exakt"}, "unknown topk 'exakt' (did you mean 'exact'?)"),
    ({"ffn": "spark", "ffn_active": 0}, "ffn_active is 0; as a count it must be 1 to 128"),
    ({"ffn": "spark", "ffn_active": 129}, "ffn_active is 129; as a count it must be 1 to 128"),
    ({"ffn": "spark", "ffn_active": 1.5}, "ffn_active is 1.5; a float is a share and must be in (0, 1]"),
    ({"ffn": "spark", "ffn_predictor_dim": 32}, "ffn_predictor_dim is 32; as a count it must be 1 to 31"),
    ({"ffn": "spark", "ffn_predictor_dim": 1.0}, "ffn_predictor_dim is 1.0 of 32; at least one must be left"),
    (
        {"attention": "spark", "attention_predictor_dim": 8},
        "attention_predictor_dim is 8; as a count it must be 1 to 7",
    ),
    ({"attention": "spark", "attention_active": -1}, "attention_active is -1; as a count it must be at least 1"),
    ({"ffn": "spark", "activation": "leaky_relu"}, "activation leaky_relu means nothing with ffn 'spark'"),
    (
        {"attention": "spark", "attention_predictor_dim": 1, "position": "rotary"},
        "attention_predictor_dim 1 of head_dim 8 leaves a part without a pair of the 8 rotary dimensions",
    ),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_options_that_do_not_fit_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as raised:
        NormfreeConfig(**{**SIZES, **options})
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


def test_shares_and_defaults() -> None:
    sizes = NormfreeConfig(ffn="spark", attention="spark", attention_active=0.25).spark_sizes
    assert (sizes.ffn_active, sizes.ffn_predictor_dim) == (round(0.08 * 3072), 384)
    assert (sizes.attention_active, sizes.attention_predictor_dim) == (256, 32)
    config = NormfreeConfig(attention="spark")
    assert (config.attention_active, config.topk) == (256, "statistical")
    assert NormfreeConfig().spark_sizes.ffn_active == 0


def test_the_scale_of_the_output_at_initialisation() -> None:
    """Against a dense ReLU network, for input of RMS 1, by the moments of a thresholded Gaussian.

    With t = Φ⁻¹(1 − p), E[max(z − t, 0)²] = (1 + t²) p − t φ(t): a neuron's second moment is that times the variances
    of both products, and a dense ReLU neuron's is half of one variance.
    """
    sizes: dict[str, Any] = {
        "n_layer": 1,
        "n_embd": 512,
        "n_head": 8,
        "activation": "relu",
        "mlp_bias": False,
        "vocab_size": 8,
    }
    x = torch.randn(400, 512)
    rms = {}
    for ffn in ("dense", "spark"):
        layer: nn.Module = NormfreeForCausalLM(NormfreeConfig(**sizes, ffn=ffn)).model.blocks[0].ffn
        with torch.no_grad():
            rms[ffn] = layer(x).square().mean().sqrt().item()
    p, t = 0.08, 1.4050715603096329
    moment = (1 + t**2) * p - t * np.exp(-(t**2) / 2) / np.sqrt(2 * np.pi)
    expected = np.sqrt(moment * (0.02**2 * 256) ** 2 / (0.02**2 * 512 / 2))
    assert rms["spark"] / rms["dense"] == pytest.approx(expected, rel=0.06)
