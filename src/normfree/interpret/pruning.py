"""Models without some of their layers (Gromov et al., "The Unreasonable Ineffectiveness of the Deeper Layers", 2024).

Without the paper's healing by fine-tuning.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from normfree.errors import InputError
from normfree.files import folder_written_whole, write_text
from normfree.interpret.depth.block_calls import RecordedPass, check_independence, record
from normfree.modeling import NormfreeConfig
from normfree.modeling.decoder_blocks import decoder_blocks
from normfree.modeling.layer_types import SLIDING
from normfree.modeling.loading import load_model
from normfree.modeling.norms import SCALED_NORMS
from normfree.modeling.rotary import parameter_sets

PRUNING_FILE = "pruning.json"
"""File in a pruned model's folder: its source and the layers it keeps."""

_N_LAYER = "num_hidden_layers"
_N_DECODER_LAYER = ("decoder_layers", "num_decoder_layers", "num_layers")
"""Its name where configurations count other layers too: encoder-decoders; LongCat, whose layers attend twice."""
_CHECK_TOKENS = 16
_LONGEST = 150
"""Longest quote of another library's message, in characters."""


def check_layers(layers: Sequence[int], n_layer: int) -> list[int]:
    """The layers of 0 ... ``n_layer`` - 1 that are not in ``layers``, in order.

    Raises:
        InputError: ``layers`` are none, all, out of range or repeated.
    """
    for layer in layers:
        if not 0 <= layer < n_layer:
            raise InputError(f"there is no layer {layer} to drop; the model has layers 0 to {n_layer - 1}")
        if layers.count(layer) > 1:
            raise InputError(f"layer {layer} is named twice among those to drop; name each once")
    if not 0 < len(layers) < n_layer:
        raise InputError(f"cannot drop {len(layers)} of {n_layer} layers; drop 1 to {n_layer - 1} of them")
    return [layer for layer in range(n_layer) if layer not in layers]


def prune_layers(model: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """``model`` without the decoder blocks ``layers`` (from 0), as a new model whose layers count from 0.

    The two share their weights. Options of the configuration that are lists of ``n_layer`` entries lose those of the
    dropped layers.

    Raises:
        InputError: the layers do not fit (see :func:`check_layers`); a kept layer would compute something else at its
            new index (a norm scaled by depth, DeepNorm, blocks that differ by index), which is found by name, by the
            options of its modules, or by comparing logits with those of ``model`` with the blocks skipped; or a block
            reads more than the residual stream (see
            :func:`~normfree.interpret.depth.block_calls.check_independence`).
    """
    blocks = list(decoder_blocks(model))
    kept = check_layers(layers, len(blocks))
    check_independence(_checked_pass(model))
    pruned = _built(model, _pruned_config(model.config, kept, len(blocks)), blocks, kept)
    _check_same_options(model, pruned, kept)
    _check_same_logits(model, layers, pruned)
    return pruned


def export_pruned(
    model: PreTrainedModel,
    layers: Sequence[int],
    folder: Path,
    *,
    source: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> PreTrainedModel:
    """Writes :func:`prune_layers` of ``model`` to ``folder``, atomically, and returns it loaded from there.

    The folder holds config.json, safetensors weights, the tokenizer if one is given, and ``pruning.json``.

    Raises:
        InputError: as :func:`prune_layers`; or the folder exists and is not empty; or the written model does not load.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not empty; name another folder for the pruned model")
    pruned = prune_layers(model, layers)
    n_layer = len(decoder_blocks(model))
    kept = check_layers(layers, n_layer)
    origin = {"source": source, "n_layer": n_layer, "dropped_layers": sorted(layers), "kept_layers": kept}
    with folder_written_whole(folder) as temporary:
        pruned.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        write_text(temporary / PRUNING_FILE, json.dumps(origin, indent=2) + "\n")
        reloaded = load_model(str(temporary))
        _check_same_options(model, reloaded, kept)
        _check_same_logits(model, layers, _on(model, reloaded.eval()))
    return reloaded


def _built(model: PreTrainedModel, config: PreTrainedConfig, blocks: list[str], kept: list[int]) -> PreTrainedModel:
    places = {blocks[old]: blocks[new] for new, old in enumerate(kept)}
    state = {}
    for key, value in model.state_dict().items():
        block = next((name for name in blocks if key.startswith(f"{name}.")), None)
        if block is None:
            state[key] = value
        elif block in places:
            state[places[block] + key.removeprefix(block)] = value
    try:
        with no_init_weights():
            pruned = type(model)(config)
    except Exception as error:  # of any kind: it comes from the model's own code
        raise InputError(
            f"{type(model).__name__} cannot be built of the layers that are left ({_one_line(error)}): what a layer is "
            "depends on its index or on other layers; drop others"
        ) from error
    try:
        pruned.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise InputError(
            f"the weights of {type(model).__name__} without these layers do not fit its own class: its layers are not "
            "of one kind; drop others"
        ) from error
    pruned.tie_weights()
    pruned.generation_config = deepcopy(model.generation_config)
    pruned.train(model.training)
    return _on(model, pruned)


def _one_line(error: Exception) -> str:
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said if len(said) <= _LONGEST else said[:_LONGEST] + ' …'}"


def _on(model: PreTrainedModel, other: PreTrainedModel) -> PreTrainedModel:
    """``other`` on the device of ``model``."""
    torch.nn.Module.to(other, model.device)
    return other


def _pruned_config(config: PreTrainedConfig, kept: list[int], n_layer: int) -> PreTrainedConfig:
    text = config.get_text_config()
    if isinstance(text, NormfreeConfig):
        _check_places(text, kept)
    options = config.to_dict()
    of_text = options
    if text is not config:
        of_text = next(options[name] for name in options if getattr(config, name, None) is text)
    for name, value in of_text.items():
        if isinstance(value, list) and len(value) == n_layer and not name.endswith(("_token_id", "_token_ids")):
            of_text[name] = [value[layer] for layer in kept]
    of_decoder = [name for name in _N_DECODER_LAYER if name in of_text]
    for name in of_decoder or [text.attribute_map.get(_N_LAYER, _N_LAYER)]:
        of_text[name] = len(kept)
    if isinstance(text, NormfreeConfig) and SLIDING not in of_text["layer_types"]:
        of_text["sliding_window"] = None
    if isinstance(text, NormfreeConfig) and None not in parameter_sets(text):
        of_text["rope_parameters"] = {kind: of_text["rope_parameters"][kind] for kind in set(of_text["layer_types"])}
    if getattr(text, "n_post_layer", None) is not None:
        of_text["n_post_layer"] = sum(layer < text.n_post_layer for layer in kept)
    options["dtype"] = config.dtype
    try:
        return type(config).from_dict(options)
    except Exception as error:  # of any kind: it comes from the configuration's own checks
        raise InputError(
            f"{type(config).__name__} allows no model of the layers that are left ({_one_line(error)}); drop others"
        ) from error


def _check_places(config: NormfreeConfig, kept: list[int]) -> None:
    """Checks Normfree's own blocks, by the names of their options."""
    moved = next((layer for place, layer in enumerate(kept) if place != layer), None)
    if config.norm in SCALED_NORMS and moved is not None:
        raise InputError(
            f"norm {config.norm!r} scales by the index of the layer, and layer {moved} would move to another one; "
            "drop layers from the end only"
        )
    if config.norm_placement == "deepnorm":
        raise InputError("norm_placement 'deepnorm' scales by the number of layers; none can be dropped")
    if config.norm_placement == "hybrid_star" and kept[0] != 0:
        raise InputError("norm_placement 'hybrid_star' has another kind of block first; keep layer 0")
    if config.norm_placement == "mix" and kept[0] >= (config.n_post_layer or 0):
        raise InputError("norm_placement 'mix' has at least one post-norm layer; keep one of the first")


def _check_same_options(model: PreTrainedModel, pruned: PreTrainedModel, kept: Sequence[int]) -> None:
    """Checks that the kept blocks have the options they had, even if the logits of a few tokens do not depend on them.

    A sliding window, for example, changes only sequences longer than it. An option that equals the layer's index in
    both models is that index; logits show whether the block computes with it.
    """
    before, after = decoder_blocks(model), decoder_blocks(pruned)
    names = list(before)
    for place, (layer, block) in enumerate(zip(kept, after.values(), strict=True)):
        theirs, own = _options(before[names[layer]]), _options(block)
        for name in sorted(theirs.keys() | own.keys()):
            was, now = theirs.get(name), own.get(name)
            if was != now and (was, now) != (layer, place):
                raise InputError(
                    f"layer {layer} of {type(model).__name__} has {name} {was!r}, and {now!r} as layer {place}: what a "
                    "layer does depends on its index; drop layers from the end, or others"
                )


def _options(block: nn.Module) -> dict[str, Any]:
    """The plain values that a block's modules hold, by dotted name."""
    return {
        f"{module_name}.{name}".lstrip("."): value
        for module_name, module in block.named_modules()
        for name, value in [("class", type(module).__qualname__), *vars(module).items()]
        if not name.startswith("_") and isinstance(value, (bool, int, float, str, NoneType))
    }


@torch.no_grad()
def _checked_pass(model: PreTrainedModel) -> RecordedPass:
    """A recorded pass over a few random tokens."""
    config: Any = model.config.get_text_config()
    n_positions = getattr(config, "max_position_embeddings", None) or _CHECK_TOKENS
    n_token = min(_CHECK_TOKENS, n_positions) if n_positions > 0 else _CHECK_TOKENS
    tokens = torch.randint(0, config.vocab_size, (2, n_token), generator=torch.Generator().manual_seed(0))
    return record(model, tokens)


@torch.no_grad()
def _check_same_logits(model: PreTrainedModel, layers: Sequence[int], pruned: PreTrainedModel) -> None:
    recorded = _checked_pass(model)
    expected = recorded.logits_without(layers)
    try:
        logits = pruned(input_ids=recorded.tokens.to(pruned.device), use_cache=False).logits
    except Exception as error:  # of any kind: an index of a layer that no longer exists
        raise InputError(
            f"{type(model).__name__} fails with its layers renumbered: {_one_line(error)}; drop layers from the end, "
            "or others"
        ) from error
    size = float(expected[expected.isfinite()].abs().max()) if expected.isfinite().any() else 1.0
    tolerance = max(1e-3, 4 * torch.finfo(expected.dtype).eps)
    if not torch.allclose(logits, expected, rtol=tolerance, atol=tolerance * size, equal_nan=True):
        raise InputError(
            f"{type(model).__name__} computes something else with its layers renumbered than with these skipped: what "
            "a layer does depends on its index; drop layers from the end, or others"
        )
