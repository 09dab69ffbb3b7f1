"""Attribution against the model's own logits, and against a recomputation from its weights in float64 NumPy."""

import numpy as np
import pytest
import torch

from normfree.errors import InputError
from normfree.interpret import direct_attribution_errors, direct_effects, direct_logit_attribution, mean_final_std
from tests.interpret.small_decoders import ALL, LINEAR_READOUT, NORMED, VOCAB_SIZE, T, decoder, gpt2, llama, tokens


def model_logits(model, input_ids):
    with torch.no_grad():
        return model(input_ids=input_ids, use_cache=False).logits.double()


def outputs_of(model, input_ids, names):
    """The outputs of the modules of these names, float64 NumPy."""
    seen = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: seen.update(
                {name: (output[0] if isinstance(output, tuple) else output).double().numpy()}
            )
        )
        for name in names
    ]
    model_logits(model, input_ids)
    for hook in hooks:
        hook.remove()
    return seen


def reference_norm(model, x):
    """The final norm in NumPy."""
    kind, norm = model.config.final_norm, model.model.final_norm
    if kind == "none":
        return x
    gain = norm.weight.detach().double().numpy()
    if kind == "rmsnorm":
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + model.config.norm_eps) * gain
    bias = norm.bias.detach().double().numpy()
    x = x - x.mean(-1, keepdims=True)
    std = 1.7 if kind == "constant_std" else np.sqrt((x**2).mean(-1, keepdims=True) + model.config.norm_eps)
    return x / std * gain + bias


@pytest.mark.parametrize("neurons", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_contributions_sum_to_the_models_logits(name, neurons):
    model, input_ids, targets = ALL[name](), tokens(3, T), tokens(3, T, seed=1)
    found = direct_logit_attribution(model, input_ids, targets, neurons=neurons)
    logits = model_logits(model, input_ids).gather(-1, targets[..., None])[..., 0]
    assert logits.std() > 0.5
    assert found.contributions.dtype == torch.float32
    torch.testing.assert_close(found.logits.double(), logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.contributions.double().sum(0) + found.constant, logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_differences_of_two_logits(name):
    model, input_ids, targets, against = ALL[name](), tokens(2, T), tokens(2, T, seed=1), tokens(2, T, seed=2)
    found = direct_logit_attribution(model, input_ids, targets, against)
    one, other = (direct_logit_attribution(model, input_ids, each) for each in (targets, against))
    torch.testing.assert_close(found.contributions, one.contributions - other.contributions, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.logits, one.logits - other.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.contributions.sum(0) + found.constant, found.logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_components_are_what_the_weights_say(name):
    """MLPs and attentions as the modules put them out, heads with all other heads zeroed before ``o_proj``."""
    model, input_ids, targets = ALL[name](), tokens(2, T), tokens(2, T, seed=1)
    found = direct_logit_attribution(model, input_ids, targets)
    embedding = model.model.embed_tokens(input_ids)
    if model.model.embed_positions is not None:
        embedding = embedding + model.model.embed_positions.weight[:T]
    n_layer, n_head, head_dim = model.config.n_layer, model.config.n_head, model.config.head_dim
    modules = [f"model.blocks.{layer}.{part}" for layer in range(n_layer) for part in ("attention", "ffn")]
    seen = outputs_of(model, input_ids, [*modules, f"model.blocks.{n_layer - 1}"])
    final = seen[f"model.blocks.{n_layer - 1}"]
    unembedding = model.lm_head.weight.detach().double().numpy()[targets.numpy()]
    # What the final norm makes of a small step, divided by the step: linear where the std does not move.
    centred = final - final.mean(-1, keepdims=True) if model.config.final_norm != "rmsnorm" else final
    std = {
        "none": 1.0,
        "constant_std": 1.7,
    }.get(model.config.final_norm, np.sqrt((centred**2).mean(-1, keepdims=True) + model.config.norm_eps))
    gain = 1.0 if model.config.final_norm == "none" else model.model.final_norm.weight.detach().double().numpy()

    def attributed(output):
        if model.config.final_norm in ("layernorm", "constant_std"):
            output = output - output.mean(-1, keepdims=True)
        return (output / std * gain * unembedding).sum(-1)

    expected = [attributed(embedding.detach().double().numpy())]
    for layer in range(n_layer):
        attention = model.model.blocks[layer].attention
        whole = seen[f"model.blocks.{layer}.attention"]
        heads = []
        for head in range(n_head):
            own = slice(head * head_dim, (head + 1) * head_dim)

            def without(module, inputs, own=own):
                zeroed = inputs[0].clone()
                zeroed[..., own] = 0
                return zeroed

            hook = attention.o_proj.register_forward_pre_hook(without)
            name_of = f"model.blocks.{layer}.attention"
            heads.append(whole - outputs_of(model, input_ids, [name_of])[name_of])
            hook.remove()
        expected += [attributed(output) for output in heads]
        if attention.o_proj.bias is not None:
            expected.append(attributed(whole - sum(heads)))
        expected.append(attributed(seen[f"model.blocks.{layer}.ffn"]))
    assert len(expected) == len(found.components)
    np.testing.assert_allclose(found.contributions.numpy(), np.stack(expected), atol=2e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_table_of_components_is_in_the_order_of_the_contributions(name):
    model, input_ids, targets = NORMED[name](), tokens(2, T), tokens(2, T, seed=1)
    whole = direct_logit_attribution(model, input_ids, targets)
    parts = direct_logit_attribution(model, input_ids, targets, neurons=True)
    assert list(whole.components.columns) == ["kind", "layer", "index"]
    kinds = ["head"] * 4 + (["attention_bias"] if name == "gpt2" else []) + ["mlp"]
    assert whole.components["kind"].tolist() == ["embedding", *kinds, *kinds]
    assert len(parts.components) == len(parts.contributions)
    for layer in range(2):
        of_part = parts.components.query(f"kind in ('neuron', 'mlp_bias') and layer == {layer}").index.tolist()
        (of_whole,) = whole.components.query(f"kind == 'mlp' and layer == {layer}").index
        together = parts.contributions[of_part].sum(0)
        torch.testing.assert_close(together, whole.contributions[of_whole], rtol=0, atol=1e-4)
    neurons = parts.components[parts.components["kind"] == "neuron"]
    assert neurons.groupby("layer")["index"].max().tolist() == [model.config.n_inner - 1] * 2


@pytest.mark.parametrize("name", ALL)
def test_direct_effects_are_measured_through_the_real_norm(name):
    model, input_ids, targets = ALL[name](), tokens(2, T), tokens(2, T, seed=1)
    found = direct_effects(model, input_ids, targets)
    components = direct_logit_attribution(model, input_ids, targets).components
    last = f"model.blocks.{model.config.n_layer - 1}"
    names = [f"model.blocks.{layer}.ffn" for layer in range(model.config.n_layer)]
    seen = outputs_of(model, input_ids, [*names, last])
    unembedding = model.lm_head.weight.detach().double().numpy()[targets.numpy()]
    for layer, ffn in enumerate(names):
        with_it, without = (reference_norm(model, x) for x in (seen[last], seen[last] - seen[ffn]))
        expected = ((with_it - without) * unembedding).sum(-1)
        row = components.index[(components["kind"] == "mlp") & (components["layer"] == layer)]
        np.testing.assert_allclose(found[row[0]].numpy(), expected, atol=2e-4)


@pytest.mark.parametrize("name", LINEAR_READOUT)
def test_without_a_std_attribution_is_the_measured_effect(name):
    model, input_ids, targets = LINEAR_READOUT[name](), tokens(3, T), tokens(3, T, seed=1)
    found = direct_logit_attribution(model, input_ids, targets)
    torch.testing.assert_close(found.contributions, direct_effects(model, input_ids, targets), rtol=0, atol=1e-4)
    errors = direct_attribution_errors(model, tokens(5, T), batch_size=2)
    assert errors.heads["nmae"].max() < 1e-9
    assert errors.mlps["nmae"].max() < 1e-9


@pytest.mark.parametrize("name", NORMED)
def test_errors_are_the_normalized_mean_absolute_errors_over_predicted_tokens(name):
    model, sequences = NORMED[name](), tokens(5, T)
    errors = direct_attribution_errors(model, sequences, batch_size=2)
    attributed = direct_logit_attribution(model, sequences[:, :-1], sequences[:, 1:])
    effects = direct_effects(model, sequences[:, :-1], sequences[:, 1:])
    error = ((attributed.contributions - effects).abs().mean((1, 2)) / effects.abs().mean((1, 2))).numpy()
    kinds = attributed.components["kind"].to_numpy()
    np.testing.assert_allclose(errors.heads["nmae"], error[kinds == "head"], rtol=1e-4)
    np.testing.assert_allclose(errors.mlps["nmae"], error[kinds == "mlp"], rtol=1e-4)
    assert errors.heads["layer"].tolist() == [0] * 4 + [1] * 4
    assert errors.heads["head"].tolist() == [0, 1, 2, 3] * 2
    assert errors.heads["nmae"].min() > 0.01
    quotient = errors.heads["mean_absolute_error"] / errors.heads["mean_absolute_effect"]
    np.testing.assert_allclose(errors.heads["nmae"], quotient)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_constant_std_scales_each_tokens_contributions(name):
    model, sequences = NORMED[name](), tokens(4, T)
    input_ids, targets = sequences, tokens(4, T, seed=1)
    x = outputs_of(model, sequences, ["model.blocks.1"])["model.blocks.1"]
    if name == "gpt2":
        x = x - x.mean(-1, keepdims=True)
    std = np.sqrt((x**2).mean(-1) + model.config.norm_eps)
    constant = mean_final_std(model, sequences, batch_size=3)
    assert constant == pytest.approx(std[:, 1:].mean(), rel=1e-6)
    own = direct_logit_attribution(model, input_ids, targets)
    fixed = direct_logit_attribution(model, input_ids, targets, constant_std=constant)
    expected = own.contributions.double().numpy() * std / constant
    np.testing.assert_allclose(fixed.contributions.numpy(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fixed.logits, own.logits)
    cruder = direct_attribution_errors(model, sequences, constant_std=3 * constant)
    assert cruder.heads["nmae"].mean() > direct_attribution_errors(model, sequences).heads["nmae"].mean()


def test_a_component_that_writes_nothing_has_no_error_but_nan():
    model = gpt2()
    with torch.no_grad():
        model.model.blocks[1].attention.o_proj.weight[:, 8:16] = 0
    heads = direct_attribution_errors(model, tokens(2, T)).heads.set_index(["layer", "head"])
    assert heads["nmae"].isna().sum() == 1
    assert np.isnan(heads["nmae"][(1, 1)])
    assert heads.loc[(1, 1), "mean_absolute_effect"] == 0


def test_nan_stays_nan():
    model = gpt2()
    with torch.no_grad():
        model.model.blocks[1].ffn.down_proj.bias[3] = torch.nan
    errors = direct_attribution_errors(model, tokens(2, T))
    assert errors.heads["nmae"].isna().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": tokens(2, T).float()}, r"input_ids must be int64 token ids of shape \[\*, \*\]"),
        (
            {"targets": tokens(2, T - 1)},
            r"targets must be int64 token ids of shape \[2, 7\], not empty; got .* \[2, 6\]",
        ),
        ({"against": tokens(2, T) + VOCAB_SIZE}, "the vocabulary of the model is 0 to 49"),
        ({"input_ids": tokens(2, 17), "targets": tokens(2, 17)}, "17 tokens long, more than the 16 positions"),
        ({"constant_std": 0.0}, "constant std is 0.0; it must be positive"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(InputError, match=message):
        direct_logit_attribution(**{"model": gpt2(), "input_ids": tokens(2, T), "targets": tokens(2, T), **change})


@pytest.mark.parametrize(
    "options",
    [
        {"norm": "dyt"},
        {"norm": "derf"},
        {"norm": "layernorm_scaling"},
        {"norm": "none", "qk_norm": True},
        {"scale_embeddings": True},
        {"embedding_multiplier": 3.0, "attn_logit_softcapping": 0.5, "attention_scale": 0.3},
    ],
    ids=str,
)
def test_contributions_add_up_whatever_the_norms_of_the_blocks_are(options):
    model = decoder(**{"norm": "rmsnorm", "final_norm": "rmsnorm", **options})
    sequences = tokens(2, T)
    found = direct_logit_attribution(model, sequences, sequences)
    expected = model(sequences).logits.gather(-1, sequences[..., None])[..., 0]
    torch.testing.assert_close(found.contributions.sum(0) + found.constant, expected, rtol=0, atol=2e-5)


def test_models_that_cannot_be_taken_apart():
    sequences = tokens(2, T)
    for placement in ("sandwich", "hybrid", "hybrid_star", "mix", "deepnorm"):
        with pytest.raises(InputError, match=f"norm_placement is '{placement}'"):
            direct_logit_attribution(decoder(norm="layernorm", norm_placement=placement), sequences, sequences)
    capped = decoder(final_logit_softcapping=30.0)
    for read in (direct_logit_attribution, direct_effects):
        with pytest.raises(InputError, match=r"soft-capped \(final_logit_softcapping = 30\.0\)"):
            read(capped, sequences, sequences)
    with pytest.raises(InputError, match="final_logit_softcapping"):
        direct_attribution_errors(capped, sequences)
    for norm, kind in (("dyt", "DynamicTanh"), ("derf", "DynamicErf")):
        with pytest.raises(InputError, match=f"final norm of the class {kind}"):
            direct_logit_attribution(decoder(norm=norm, final_norm=norm), sequences, sequences)
    post = decoder(norm="layernorm", norm_placement="post")
    with pytest.raises(InputError, match=r"norm_placement is 'post'.*use a model with norm_placement 'pre'"):
        direct_logit_attribution(post, sequences, sequences)
    with pytest.raises(InputError, match=r"call model.eval\(\) first"):
        direct_attribution_errors(gpt2().train(), sequences)
    with pytest.raises(InputError, match=r"convert it with normfree\.from_hf first"):
        direct_effects(torch.nn.Linear(2, 2), sequences, sequences)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no std of its own to freeze"):
        mean_final_std(decoder(), sequences)
    with pytest.raises(InputError, match="at least 2 tokens"):
        direct_attribution_errors(llama(), tokens(2, 1))
    odd = gpt2()
    odd.model.final_norm = torch.nn.Tanh()
    with pytest.raises(InputError, match="final norm of the class Tanh"):
        direct_effects(odd, sequences, sequences)
