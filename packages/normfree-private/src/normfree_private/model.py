"""A whole block and a whole model under secure computation, its weights and its input secret."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from normfree.errors import InputError
from normfree.modeling import NormfreeConfig, NormfreeForCausalLM
from normfree_private.environment import Engine
from normfree_private.export import block_weights, engine_config, model_weights, one_hot, public_tables
from normfree_private.measurement import Cost, Measurer, Program, Settings, run_programs


@dataclass(frozen=True)
class EncryptedRun:
    """The cost of a whole model, and the difference of its logits from the plain model's in float64.

    max_error, mean_error: of the absolute differences of logits, over all positions and the vocabulary.
    logit_std: standard deviation of the plain logits, to compare errors with.
    same_prediction: share of positions with the same largest logit.
    plain_loss, encrypted_loss: mean next-token loss of the tokens, nats.
    """

    cost: Cost
    max_error: float
    mean_error: float
    logit_std: float
    same_prediction: float
    plain_loss: float
    encrypted_loss: float


def block_cost(measurer: Measurer, config: NormfreeConfig, layer: int, sequence_length: int) -> Cost:
    """The cost of block ``layer`` in one program, with weights drawn at random.

    Raises:
        InputError: the model has no encrypted counterpart.
        EngineError: the engine failed.
    """
    described = {**engine_config(config), "n_layer": 1, "activations": [config.activations[layer]]}
    options = {name: getattr(config, name) for name in NormfreeConfig.option_names()}
    small = {
        "n_layer": 1,
        "layer_types": None,
        "activation": config.activations[layer],
        "vocab_size": 2,
        "n_positions": sequence_length,
    }
    if "learnable_leaky_relu" not in small.values():
        options["slope_sharing"] = None
    if small["activation"] not in ("leaky_relu", "learnable_leaky_relu"):
        options["negative_slope"] = None
    model = NormfreeForCausalLM(NormfreeConfig(**{**options, **small})).eval()
    x = torch.randn(sequence_length, config.n_embd, generator=torch.Generator().manual_seed(0)).numpy()
    inputs = {"x": x, **block_weights(model, 0)}
    described = {"kind": "block", "layer": 0, "config": described}
    return measurer.programs([Program(described, inputs, public_tables(model, sequence_length))])[0]


def run_encrypted(engine: Engine, settings: Settings, model: NormfreeForCausalLM, tokens: torch.Tensor) -> EncryptedRun:
    """Runs the model on ``tokens`` [T], int64, under secure computation and in float64.

    Raises:
        InputError: the model has no encrypted counterpart, or fewer than T positions; or T is less than 2.
        EngineError: the engine failed.
    """
    if len(tokens) < 2:
        raise InputError(f"an encrypted run needs at least 2 tokens, not {len(tokens)}")
    sequence_length = len(tokens)
    program = Program(
        {"kind": "model", "config": engine_config(model.config)},
        {"tokens": one_hot(tokens, model.config.vocab_size), **model_weights(model, sequence_length)},
        public_tables(model, sequence_length),
    )
    [(cost, output)] = run_programs(engine, settings, [program], wants_outputs=True)
    encrypted = torch.from_numpy(output["output0"]).double()
    plain = _plain_logits(model, tokens)
    difference = (encrypted - plain).abs()
    return EncryptedRun(
        cost,
        max_error=float(difference.max()),
        mean_error=float(difference.mean()),
        logit_std=float(plain.std()),
        same_prediction=float((encrypted.argmax(-1) == plain.argmax(-1)).double().mean()),
        plain_loss=_loss(plain, tokens),
        encrypted_loss=_loss(encrypted, tokens),
    )


def _plain_logits(model: NormfreeForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """The logits [T, vocab_size] in float64; the model keeps its dtype."""
    reference = NormfreeForCausalLM(model.config).double().eval()
    reference.load_state_dict(model.state_dict())
    with torch.no_grad():
        logits: torch.Tensor = reference(tokens.unsqueeze(0).cpu()).logits
    return logits[0].double()


def _loss(logits: torch.Tensor, tokens: torch.Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(logits[:-1], tokens[1:].cpu()))
