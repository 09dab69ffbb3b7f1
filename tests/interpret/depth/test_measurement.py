import copy

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn.functional import cross_entropy

from normfree.errors import InputError
from normfree.interpret import measure_angular_distance, measure_depth, most_similar_block, write_depth
from normfree.interpret.depth.block_calls import record
from normfree.interpret.depth.jacobian import jacobian_frame, squared_jacobian_distances
from tests.interpret.depth.models import N_LAYER, STOCK, ours, stock, tokens

T = 8
N_PROBE = 60


def hidden_states(model, text):
    """Embedding, then after each block, before any final norm: transformers' own, the last from a hook."""
    last = []
    blocks = next(
        module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == N_LAYER
    )
    hook = blocks[-1].register_forward_hook(lambda module, inputs, output: last.append(output))
    with torch.no_grad():
        states = model(input_ids=text, output_hidden_states=True, use_cache=False).hidden_states
    hook.remove()
    return torch.stack([*states[:-1], last[0]]).double().numpy()


def sequence_loss(model, text):
    with torch.no_grad():
        logits = model(input_ids=text, use_cache=False).logits.double()
    losses = cross_entropy(logits[:, :-1].transpose(1, 2), text[:, 1:], reduction="none")
    return losses.mean(dim=1).numpy()


def without(model, name, layers):
    """A copy with these blocks really taken out of the list at ``name``."""
    shorter = copy.deepcopy(model)
    parent = shorter.get_submodule(name.rpartition(".")[0])
    blocks = getattr(parent, name.rpartition(".")[2])
    kept = torch.nn.ModuleList([block for layer, block in enumerate(blocks) if layer not in layers])
    setattr(parent, name.rpartition(".")[2], kept)
    config = shorter.config
    setattr(config, config.attribute_map.get("num_hidden_layers", "num_hidden_layers"), len(kept))
    if getattr(config, "layer_types", None):
        config.layer_types = [each for layer, each in enumerate(config.layer_types) if layer not in layers]
    return shorter


LISTS = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}


@pytest.mark.parametrize("name", STOCK)
def test_stock_models_against_their_own_hidden_states_and_shorter_copies(name):
    model, text = stock(name), tokens(6, T)
    found = measure_depth(model, text, n_probe=2, batch_size=4)

    x = hidden_states(model, text)
    variance = ((x - x.mean(axis=-1, keepdims=True)) ** 2).mean(axis=-1)
    by_tokens = found.residual_variance.set_index("tokens")
    np.testing.assert_allclose(by_tokens["residual_variance"]["all"], variance.mean(axis=(1, 2)), rtol=1e-5)
    later = variance[..., 1:].mean(axis=-1)
    np.testing.assert_allclose(by_tokens["residual_variance"]["without first"], later.mean(axis=-1), rtol=1e-5)
    error = later.std(axis=-1, ddof=1) / np.sqrt(6)
    np.testing.assert_allclose(by_tokens["standard_error"]["without first"], error, rtol=1e-4)

    unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
    for row in found.angular_distance.to_dict("records"):
        cosine = (unit[row["layer"]] * unit[row["layer"] + row["n_apart"]]).sum(axis=-1)
        angle = np.arccos(cosine) / np.pi
        np.testing.assert_allclose(row["angular_distance"], angle[:, -1].mean(), rtol=1e-4)
        np.testing.assert_allclose(row["angular_distance_all_tokens"], angle.mean(), rtol=1e-4)
    assert len(found.angular_distance) == N_LAYER * (N_LAYER + 1) // 2
    distances = measure_angular_distance(model, text, batch_size=3)
    np.testing.assert_allclose(distances["angular_distance"], found.angular_distance["angular_distance"], rtol=1e-5)

    place = LISTS.get(name, "model.layers")
    plain = sequence_loss(model, text)
    np.testing.assert_allclose(found.summary["loss_nats"], plain.mean(), rtol=1e-6)
    for layer, row in enumerate(found.skipped_layers.to_dict("records")):
        increase = sequence_loss(without(model, place, [layer]), text) - plain
        np.testing.assert_allclose(row["loss_increase_nats"], increase.mean(), atol=1e-5)
        np.testing.assert_allclose(row["standard_error"], increase.std(ddof=1) / np.sqrt(6), atol=1e-5)
    for row in found.dropped_last.to_dict("records"):
        layers = range(N_LAYER - row["n_dropped"], N_LAYER)
        increase = sequence_loss(without(model, place, layers), text) - plain
        np.testing.assert_allclose(row["loss_increase_nats"], increase.mean(), atol=1e-5)
    assert found.dropped_last["n_dropped"].tolist() == list(range(1, N_LAYER))
    np.testing.assert_allclose(sequence_loss(model, text), plain, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_gradient_norms_are_those_of_backward(name):
    model, text = stock(name), tokens(5, T)
    found = measure_depth(model, text, n_probe=2, batch_size=2).gradient_norms
    assert all(parameter.grad is None for parameter in model.parameters())

    blocks = model.get_submodule(LISTS.get(name, "model.layers"))
    model = model.double()
    model(input_ids=text, labels=text).loss.backward()
    expected = [sum(each.grad.square().sum() for each in block.parameters()).sqrt() for block in blocks]
    np.testing.assert_allclose(found["parameter_gradient_norm"], [float(each) for each in expected], rtol=1e-4)

    norms = np.zeros((len(blocks), len(text)))
    for sequence, one in enumerate(text.split(1)):
        states = model(input_ids=one, labels=one, output_hidden_states=True)
        gradients = torch.autograd.grad(states.loss, states.hidden_states[:-1])
        norms[:, sequence] = [float(each.norm()) for each in gradients]
    np.testing.assert_allclose(found["residual_gradient_norm"], norms.mean(axis=1), rtol=1e-4)
    np.testing.assert_allclose(found["standard_error"], norms.std(axis=1, ddof=1) / np.sqrt(5), rtol=1e-3)


def test_frozen_parameters_have_gradients_too_and_stay_frozen():
    model, text = stock("llama"), tokens(2, T)
    expected = measure_depth(model, text, n_probe=2).gradient_norms
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    found = measure_depth(model, text, n_probe=2).gradient_norms
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_jacobian_distance_against_the_whole_jacobian(name):
    model, text = stock(name).double(), tokens(2, 4)
    with torch.no_grad():
        recorded = record(model, text)
    squared = squared_jacobian_distances(recorded, N_PROBE, torch.Generator().manual_seed(0))
    for layer, call in enumerate(recorded.calls):
        exact = []
        for sequence in range(len(text)):

            def block(x, call=call, sequence=sequence):
                stream = call.stream.clone()
                stream[sequence] = x
                return call.run(stream)[sequence]

            J = torch.autograd.functional.jacobian(block, call.stream[sequence])
            size = call.stream[sequence].numel()
            exact.append(float((J.reshape(size, size) - torch.eye(size)).square().sum()) / size)
        error = squared[layer].std(dim=0) / N_PROBE**0.5
        np.testing.assert_array_less((squared[layer].mean(dim=0) - torch.tensor(exact)).abs(), 4 * error)
    frame = jacobian_frame(squared)
    np.testing.assert_allclose(frame["jacobian_distance"], squared.mean(dim=(1, 2)).sqrt())


def test_standard_error_of_the_jacobian_distance_is_its_spread_over_probes():
    model, text = stock("llama"), tokens(2, T)
    with torch.no_grad():
        recorded = record(model, text)
    found = [
        jacobian_frame(squared_jacobian_distances(recorded, 8, torch.Generator().manual_seed(seed)))
        for seed in range(25)
    ]
    spread = np.std([each["jacobian_distance"] for each in found], axis=0, ddof=1)
    np.testing.assert_allclose(np.mean([each["standard_error"] for each in found], axis=0), spread, rtol=0.6)


def test_a_block_that_does_nothing_is_the_identity_in_every_measure():
    model = ours(norm="none", final_norm="none")
    with torch.no_grad():
        for parameter in model.model.blocks[2].parameters():
            parameter.zero_()
    found = measure_depth(model, tokens(4, T))
    assert found.skipped_layers["loss_increase_nats"][2] == 0
    assert found.jacobian_distance["jacobian_distance"][2] == 0
    np.testing.assert_allclose(
        found.angular_distance.query("layer == 2 and n_apart == 1")["angular_distance"], 0, atol=1e-7
    )
    assert most_similar_block(found.angular_distance, 1) == [2]


def test_the_block_to_drop_is_the_one_with_the_smallest_distance_across():
    distances = measure_angular_distance(stock("gpt2"), tokens(4, T))
    across = distances[distances["n_apart"] == 2].set_index("layer")["angular_distance"]
    first = int(across.index.to_numpy()[across.argmin()])
    assert most_similar_block(distances, 2) == [first, first + 1]
    for n_drop in (0, N_LAYER, -1):
        with pytest.raises(InputError, match=f"cannot choose {n_drop} of {N_LAYER} layers"):
            most_similar_block(distances, n_drop)


@pytest.mark.parametrize(
    "options",
    [
        {"norm_placement": "post"},
        {"norm": "none", "final_norm": "none"},
        {"position": "rotary", "parallel_residual": True},
        {"activation": ["gelu", "relu", "silu", "gelu", "relu"]},
    ],
)
def test_ours_is_read_as_any_other(options):
    found = measure_depth(ours(**options), tokens(3, T), n_probe=2)
    assert found.summary["nonfinite_entries"].item() == 0
    for frame in found.frames().values():
        assert (
            not frame.drop(columns=["rate", "rate_low", "rate_high", "fitted_variance"], errors="ignore")
            .isna()
            .any(axis=None)
        )


def test_a_diverged_model_is_measured_and_its_entries_counted(tmp_path):
    model = stock("gpt2")
    with torch.no_grad():
        model.transformer.h[3].mlp.c_proj.bias[0] = torch.nan
    found = measure_depth(model, tokens(3, T), n_probe=2)
    (row,) = found.summary.to_dict("records")
    # after block 3, channel 0; block 4 spreads it over all
    assert row["nonfinite_entries"] == 3 * T + 3 * T * 16
    assert np.isnan([row["loss_nats"], row["effective_depth"]]).all()
    assert row["variance_growth"] == "undecided"
    assert found.skipped_layers["nonfinite_sequences"].tolist() == [3, 3, 3, 0, 3]
    assert np.isfinite(found.residual_variance.query("tokens == 'all' and layer < 4")["residual_variance"]).all()
    frames = found.frames(model="diverged")
    write_depth(frames, tmp_path)
    assert {path.stem for path in tmp_path.iterdir()} == set(frames)
    assert "diverged,all,4,nan" in (tmp_path / "residual_variance.csv").read_text()


@pytest.mark.parametrize("n_layer", [1, 2])
def test_the_shallowest_models(n_layer):
    found = measure_depth(ours(n_layer=n_layer), tokens(1, 2), n_probe=2)
    assert len(found.skipped_layers) == n_layer
    assert len(found.dropped_last) == n_layer - 1
    assert found.summary["variance_growth"].item() == "undecided"


def test_repeated_measurements_agree():
    first, second = (measure_depth(stock("llama"), tokens(3, T)).frames() for _ in range(2))
    for name, frame in first.items():
        pd.testing.assert_frame_equal(frame, second[name])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (tokens(2, T).float(), "tokens must be int64"),
        (tokens(2, 1), "T at least 2"),
        (tokens(2, T)[:0], "n at least 1"),
        (tokens(2, T) + 45, "the vocabulary of GPT2LMHeadModel is 0 to 49"),
        (tokens(2, 33), "33 tokens, GPT2LMHeadModel 32 positions"),
    ],
)
def test_tokens_that_do_not_fit(text, says):
    with pytest.raises(InputError, match=says):
        measure_depth(stock("gpt2"), text)


def test_models_that_cannot_be_measured():
    with pytest.raises(InputError, match="training mode"):
        measure_depth(stock("gpt2").train(), tokens(2, T))
    with pytest.raises(InputError, match="at least 2 probes"):
        measure_depth(stock("gpt2"), tokens(2, T), n_probe=1)
    model = stock("llama")
    forward = model.model.layers[1].forward
    model.model.layers[1].forward = lambda x, **keywords: forward(forward(x, **keywords), **keywords)[0]
    with pytest.raises(InputError, match=r"model.layers.1 puts out a tensor of 2 dimensions, not a residual stream"):
        measure_depth(model, tokens(2, T))
