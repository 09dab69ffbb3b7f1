"""Weights against NumPy's SVD, ablations against models whose activations are rewritten by hand."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy
from torch import nn

from normfree.errors import InputError
from normfree.interpret import (
    confidence_neuron_candidates,
    cumulative_ablation,
    neuron_ablation_effects,
    neuron_output_weights,
)
from tests.interpret.small_decoders import ALL, LINEAR_READOUT, T, decoder, gpt2, tokens

SEQUENCES = tokens(5, T)


def array(tensor):
    return tensor.detach().double().numpy()


def folded_unembedding(model):
    """The unembedding as one matrix from the centred residual stream, shifts of all logits left out."""
    W, kind = array(model.lm_head.weight), model.config.final_norm
    if kind != "none":
        W = W * array(model.model.final_norm.weight)
    if kind in ("layernorm", "constant_std"):
        W = W @ (np.eye(W.shape[1]) - 1 / W.shape[1])
    return W - W.mean(0)


@pytest.mark.parametrize("name", ALL)
def test_output_weights_against_numpy(name):
    model = ALL[name]()
    n_null = 3
    frame = neuron_output_weights(model, layers=[0, -1], n_null_directions=n_null)
    last = model.config.n_layer - 1
    assert frame["layer"].unique().tolist() == [0, last]
    W = folded_unembedding(model)
    rank = np.linalg.matrix_rank(W)
    is_centred = model.config.final_norm in ("layernorm", "constant_std")
    assert rank == model.config.n_embd - is_centred
    null_space = np.linalg.svd(W)[2][:rank][-n_null:]
    for layer, rows in frame.groupby("layer"):
        w = array(model.model.blocks[layer].ffn.down_proj.weight).T
        if is_centred:
            w = w - w.mean(1, keepdims=True)
        norm = np.linalg.norm(w, axis=1)
        np.testing.assert_allclose(rows["weight_norm"], norm)
        cosines = (W / np.linalg.norm(W, axis=1, keepdims=True)) @ (w / norm[:, None]).T
        np.testing.assert_allclose(rows["logit_variance"], cosines.var(axis=0), rtol=1e-9)
        share = np.linalg.norm(w @ null_space.T, axis=1) / norm
        np.testing.assert_allclose(rows["null_space_share"], share, rtol=1e-6)
        log_norm, log_variance = np.log(norm), np.log(cosines.var(axis=0))
        score = (log_norm - log_norm.mean()) / log_norm.std() - (
            log_variance - log_variance.mean()
        ) / log_variance.std()
        np.testing.assert_allclose(rows["score"], score, rtol=1e-6, atol=1e-9)


def planted():
    """GPT-2's kind of model whose neuron 5 of the last layer writes, strongly, where the unembedding reads nothing."""
    model = gpt2()
    with torch.no_grad():
        W = torch.from_numpy(folded_unembedding(model))
        direction = torch.linalg.svd(W).Vh[-2].float()  # the last is the mean that LayerNorm takes off
        unread = model.lm_head.weight @ torch.diag(model.model.final_norm.weight)
        projected = unread - (unread @ direction)[:, None] * direction
        model.lm_head.weight.copy_(projected / model.model.final_norm.weight)
        model.model.blocks[-1].ffn.down_proj.weight[:, 5] = 6 * direction
    return model


def test_a_planted_confidence_neuron_is_found_and_works_through_the_norm_alone():
    model = planted()
    weights = neuron_output_weights(model)
    assert weights["layer"].unique().tolist() == [1]
    candidates = confidence_neuron_candidates(weights, 4)
    assert candidates["score"].is_monotonic_decreasing
    first = candidates.iloc[0]
    assert (first["layer"], first["neuron"]) == (1, 5)
    assert first["null_space_share"] == pytest.approx(1, abs=1e-5)
    assert first["logit_variance"] < 1e-10
    effects = neuron_ablation_effects(model, SEQUENCES, candidates)
    assert effects[["layer", "neuron"]].equals(candidates[["layer", "neuron"]])
    found = effects.iloc[0]
    assert found["total_effect_nats"] > 1e-3
    assert found["frozen_effect_nats"] < 1e-6
    assert found["norm_mediated_share"] > 0.999


def losses(logits, input_ids):
    """Loss of each predicted token in NumPy, nats."""
    logits = logits[:, :-1] - logits[:, :-1].max(-1, keepdims=True)
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(log_probabilities, input_ids.numpy()[:, 1:, None], -1)[..., 0]


def entropies(logits):
    """Entropy of each predicted token's distribution, nats, by SciPy."""
    return entropy(softmax(logits[:, :-1], axis=-1), axis=-1)


class Rewritten(nn.Module):
    """Stands in for ``down_proj``: keeps what it reads, and writes ``value`` over one neuron."""

    def __init__(self, module, neuron=None, value=None):
        super().__init__()
        self.module, self.neuron, self.value = module, neuron, value

    def forward(self, x):
        self.read = x
        if self.neuron is not None:
            x = torch.where(torch.arange(x.shape[-1]) == self.neuron, self.value, x)
        return self.module(x)


class StdOf(nn.Module):
    """Stands in for a final norm: divides by the std of another residual stream."""

    def __init__(self, norm, kind, eps, stream):
        super().__init__()
        self.norm, self.kind, self.eps, self.stream = norm, kind, eps, stream

    def forward(self, x):
        if self.kind in ("none", "constant_std"):
            return self.norm(x)
        centre = (lambda t: t - t.mean(-1, keepdim=True)) if self.kind == "layernorm" else (lambda t: t)
        std = (centre(self.stream).square().mean(-1, keepdim=True) + self.eps).sqrt()
        bias = self.norm.bias if self.kind == "layernorm" else 0
        return centre(x) / std * self.norm.weight + bias


def final_stream(model):
    seen = []
    hook = model.model.blocks[-1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        logits = model(SEQUENCES, use_cache=False).logits
    hook.remove()
    return seen[0], array(logits)


@pytest.mark.parametrize("layer", [0, -1])
@pytest.mark.parametrize("name", ALL)
def test_ablation_effects_against_rewritten_modules(name, layer):
    model = ALL[name]().double()
    layer, neuron = layer % model.config.n_layer, 7
    found = neuron_ablation_effects(model, SEQUENCES, pd.DataFrame({"layer": [layer], "neuron": [neuron]}), 2).iloc[0]
    ffn, norm = model.model.blocks[layer].ffn, model.model.final_norm
    down_proj = ffn.down_proj
    ffn.down_proj = Rewritten(down_proj)
    stream, logits = final_stream(model)
    base, base_entropy = losses(logits, SEQUENCES), entropies(logits)
    mean = ffn.down_proj.read[..., neuron].mean()
    ffn.down_proj = Rewritten(down_proj, neuron, mean)
    ablated = final_stream(model)[1]
    change, entropy_change = losses(ablated, SEQUENCES) - base, entropies(ablated) - base_entropy
    model.model.final_norm = StdOf(norm, model.config.final_norm, model.config.norm_eps, stream)
    ablated = final_stream(model)[1]
    frozen, frozen_entropy = losses(ablated, SEQUENCES) - base, entropies(ablated) - base_entropy
    assert np.abs(change).mean() > 1e-5
    assert found["mean_activation"] == pytest.approx(mean.item(), rel=1e-9)
    assert found["total_effect_nats"] == pytest.approx(np.abs(change).mean(), rel=1e-6, abs=1e-12)
    assert found["total_change_nats"] == pytest.approx(change.mean(), rel=1e-6, abs=1e-12)
    assert found["frozen_effect_nats"] == pytest.approx(np.abs(frozen).mean(), rel=1e-6, abs=1e-12)
    assert found["frozen_change_nats"] == pytest.approx(frozen.mean(), rel=1e-6, abs=1e-12)
    for kind, expected in (("total", entropy_change), ("frozen", frozen_entropy)):
        effect, mean_change = (found[f"{kind}_entropy_{name}_nats"] for name in ("effect", "change"))
        assert effect == pytest.approx(np.abs(expected).mean(), rel=1e-6, abs=1e-12)
        assert mean_change == pytest.approx(expected.mean(), rel=1e-6, abs=1e-12)
    assert found["norm_mediated_share"] == pytest.approx(1 - np.abs(frozen).mean() / np.abs(change).mean(), abs=1e-6)


class Together(Rewritten):
    """Writes a value over each of several neurons."""

    def forward(self, x):
        self.read = x.clone()
        x[..., self.neuron] = self.value
        return self.module(x)


@pytest.mark.parametrize("name", ALL)
def test_cumulative_ablation_against_rewritten_modules(name):
    model = ALL[name]().double()
    last = model.config.n_layer - 1
    chosen = [(last, 7), (0, 3), (last, 12)]
    frame = pd.DataFrame(chosen, columns=["layer", "neuron"])
    found = cumulative_ablation(model, SEQUENCES, frame, batch_size=2)
    assert found["n_ablated"].tolist() == [0, 1, 2, 3]
    assert found[["layer", "neuron"]].to_numpy().tolist() == [[-1, -1], *map(list, chosen)]
    networks = {layer: model.model.blocks[layer].ffn for layer in (0, last)}
    whole = {layer: ffn.down_proj for layer, ffn in networks.items()}
    for layer, ffn in networks.items():
        ffn.down_proj = Rewritten(whole[layer])
    stream, _ = final_stream(model)
    means = {layer: ffn.down_proj.read.mean((0, 1)) for layer, ffn in networks.items()}
    norm, values = model.model.final_norm, []
    for n in range(4):
        for layer, ffn in networks.items():
            neurons = [neuron for at, neuron in chosen[:n] if at == layer]
            ffn.down_proj = Together(whole[layer], neurons, means[layer][neurons])
        model.model.final_norm = norm
        logits = final_stream(model)[1]
        model.model.final_norm = StdOf(norm, model.config.final_norm, model.config.norm_eps, stream)
        frozen = final_stream(model)[1]
        values.append([of(each) for each in (logits, frozen) for of in (mean_loss, mean_entropy)])
    columns = ["loss_nats", "entropy_nats", "frozen_loss_nats", "frozen_entropy_nats"]
    np.testing.assert_allclose(found[columns], values, rtol=1e-9)
    first = values[0]
    changes = [[100 * (loss / first[0] - 1), 100 * (each / first[1] - 1)] for loss, each, *_ in values]
    np.testing.assert_allclose(found[["loss_change_percent", "entropy_change_percent"]], changes, atol=1e-6)


def mean_loss(logits):
    return losses(logits, SEQUENCES).mean()


def mean_entropy(logits):
    return entropies(logits).mean()


def test_the_order_of_a_cumulative_ablation_does_not_change_its_end():
    model, neurons = gpt2(), pd.DataFrame({"layer": [0, 1, 1], "neuron": [4, 9, 2]})
    ends = [cumulative_ablation(model, SEQUENCES, each).iloc[-1] for each in (neurons, neurons[::-1])]
    assert ends[0]["loss_nats"] == ends[1]["loss_nats"]
    alone = cumulative_ablation(model, SEQUENCES, neurons[:1])
    single = neuron_ablation_effects(model, SEQUENCES, neurons[:1]).iloc[0]
    increase = alone["loss_nats"][1] - alone["loss_nats"][0]
    assert increase == pytest.approx(single["total_change_nats"], rel=1e-9)
    with pytest.raises(InputError, match="a neuron is ablated twice"):
        cumulative_ablation(model, SEQUENCES, pd.concat([neurons, neurons[:1]]))


@pytest.mark.parametrize("name", LINEAR_READOUT)
def test_without_a_std_nothing_is_mediated_by_it(name):
    model = LINEAR_READOUT[name]()
    candidates = confidence_neuron_candidates(neuron_output_weights(model, layers=range(3)), 5)
    effects = neuron_ablation_effects(model, SEQUENCES, candidates)
    np.testing.assert_array_equal(effects["total_effect_nats"], effects["frozen_effect_nats"])
    np.testing.assert_array_equal(effects["total_change_nats"], effects["frozen_change_nats"])
    assert (effects["norm_mediated_share"] == 0).all()


def test_a_neuron_without_weights_has_no_direction_and_no_effect():
    model = decoder()
    with torch.no_grad():
        model.model.blocks[-1].ffn.down_proj.weight[:, 4] = 0
    weights = neuron_output_weights(model)
    assert weights.loc[4, "weight_norm"] == 0
    assert weights.loc[4, ["logit_variance", "null_space_share", "score"]].isna().all()
    assert weights.drop(index=4).notna().all(axis=None)
    assert 4 not in confidence_neuron_candidates(weights, len(weights))["neuron"].tolist()
    effects = neuron_ablation_effects(model, SEQUENCES, pd.DataFrame({"layer": [2], "neuron": [4]}))
    assert effects.loc[0, "total_effect_nats"] == 0
    assert np.isnan(effects["norm_mediated_share"][0])


def test_the_default_null_space_is_one_percent_of_the_directions():
    model = gpt2()
    pd.testing.assert_frame_equal(neuron_output_weights(model), neuron_output_weights(model, n_null_directions=1))
    whole = neuron_output_weights(model, n_null_directions=31)
    np.testing.assert_allclose(whole["null_space_share"], 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: neuron_output_weights(model, layers=[2]), "no layer 2; the model has the layers 0 to 1"),
        (lambda model: neuron_output_weights(model, n_null_directions=32), "choose 1 to 31"),
        (lambda model: neuron_output_weights(model, n_null_directions=0), "choose 1 to 31"),
        (lambda model: confidence_neuron_candidates(neuron_output_weights(model), 0), "choose at least 1"),
        (lambda model: neuron_ablation_effects(model, SEQUENCES, pd.DataFrame({"layer": [0]})), "lacks neuron"),
        (
            lambda model: neuron_ablation_effects(model, SEQUENCES, pd.DataFrame({"layer": [], "neuron": []})),
            "no neuron to ablate",
        ),
        (
            lambda model: neuron_ablation_effects(model, SEQUENCES, pd.DataFrame({"layer": [0], "neuron": [128]})),
            "no neuron 128 in layer 0; .* neurons 0 to 127",
        ),
        (
            lambda model: neuron_ablation_effects(model, tokens(2, 1), pd.DataFrame({"layer": [0], "neuron": [1]})),
            "at least 2 tokens",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call(gpt2())


def test_an_unembedding_with_nan_has_no_directions():
    model = decoder()
    with torch.no_grad():
        model.lm_head.weight[3, 3] = torch.nan
    with pytest.raises(InputError, match="the unembedding of the model holds NaN or Inf"):
        neuron_output_weights(model)


def test_post_norm_is_refused():
    with pytest.raises(InputError, match="norm_placement is 'post'"):
        neuron_output_weights(decoder(norm="layernorm", norm_placement="post"))
