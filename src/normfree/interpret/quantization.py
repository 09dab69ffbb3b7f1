"""The cost of 8-bit integers in perplexity, for weights alone and for weights and activations (torchao)."""

from __future__ import annotations

import copy
from typing import Any

import pandas as pd
import torch
from torch import nn
from transformers import PreTrainedModel

from normfree.columns import EVAL_LOSS, EVAL_PPL
from normfree.errors import InputError, unknown_name
from normfree.modeling.decoder_blocks import decoder_blocks
from normfree.training.evaluation import evaluation_losses, perplexity

FULL_PRECISION = "full_precision"
INT8_WEIGHTS = "int8_weights"
INT8_WEIGHTS_ACTIVATIONS = "int8_weights_activations"
SCHEMES = (INT8_WEIGHTS, INT8_WEIGHTS_ACTIVATIONS)
PRECISIONS = (FULL_PRECISION, *SCHEMES)


def check_quantization(device: torch.device) -> None:
    """Checks that torchao is installed and multiplies int8 matrices exactly on ``device``.

    Processors without int8 dot products may add pairs of products in 16 bits, which saturate; perplexities would then
    measure the processor, not the model.

    Raises:
        InputError: torchao is not installed, or products of int8 matrices are not exact here.
    """
    linear = nn.Linear(64, 16, bias=False, device=device, dtype=torch.float32)
    nn.init.ones_(linear.weight)
    _quantize(linear, INT8_WEIGHTS_ACTIVATIONS)
    with torch.no_grad():
        # 64 products of 127 by 127, the largest possible.
        product = linear(torch.ones(32, 64, device=device))
    if not torch.allclose(product, torch.full_like(product, 64.0), rtol=0.01):
        raise InputError(
            f"int8 matrix products overflow on this {device.type} ({product[0, 0].item():.1f} for 64); "
            "measure on a CPU with int8 dot products (VNNI) or on a GPU"
        )


def quantized(model: PreTrainedModel, scheme: str) -> PreTrainedModel:
    """A copy of ``model`` whose linear layers inside the decoder blocks compute in int8, through torchao.

    ``int8_weights``: each row w of a weight (one output channel) becomes ŵ = s · clamp(round(w / s), −128, 127) with
    s = max_j |w_j| / 127.5; activations stay in full precision (``Int8WeightOnlyConfig``).
    ``int8_weights_activations``: also, the input of each linear layer is rounded in the same way, with one s a token,
    and products add up in int32 (``Int8DynamicActivationInt8WeightConfig``: symmetric, per token, dynamic). LLM.int8()
    (Dettmers et al., 2022) calls this vector-wise quantization.

    All else stays in full precision: embeddings, unembedding (tied or not), norms, biases, activation functions,
    attention scores and the residual stream.

    Raises:
        InputError: torchao is missing, the scheme is unknown, or the blocks hold no ``nn.Linear``, or other weights of
            two or more dimensions (fused experts, convolutions), which would stay in full precision.
    """
    if scheme not in SCHEMES:
        raise unknown_name("quantization scheme", scheme, SCHEMES)
    _check_all_linear(model)
    smaller = copy.deepcopy(model)
    for block in decoder_blocks(smaller).values():
        _quantize(block, scheme)
    return smaller


@torch.no_grad()
def quantization_cost(model: PreTrainedModel, sequences: torch.Tensor, batch_size: int = 8) -> pd.DataFrame:
    """Evaluation loss and perplexity of ``model`` on ``sequences`` (int64 [n, T], no padding) at each precision.

    The model keeps its mode and its precision; no autocast.

    Returns:
        precision (one of ``PRECISIONS``), eval_loss (mean over the n (T − 1) predicted tokens, nats), eval_ppl (its
        exponential), increase_percent (of perplexity over full precision). A NaN loss makes its row NaN.

    Raises:
        InputError: there is no sequence of two tokens, or the model cannot be quantized (see :func:`quantized`).
    """
    if sequences.ndim != 2 or sequences.shape[0] < 1 or sequences.shape[1] < 2:
        raise InputError(f"need token ids [n, T] with n at least 1 and T at least 2, got {list(sequences.shape)}")
    losses = {FULL_PRECISION: evaluation_losses(model, sequences, batch_size).mean()}
    for scheme in SCHEMES:
        losses[scheme] = evaluation_losses(quantized(model, scheme), sequences, batch_size).mean()
    full = losses[FULL_PRECISION]
    return pd.DataFrame(
        {
            "precision": list(losses),
            EVAL_LOSS: list(losses.values()),
            EVAL_PPL: [perplexity(loss) for loss in losses.values()],
            # exp of the difference: perplexities themselves may overflow.
            "increase_percent": [100 * (perplexity(loss - full) - 1) for loss in losses.values()],
        }
    )


def _check_all_linear(model: PreTrainedModel) -> None:
    """Checks that every matrix of the blocks is the weight of an ``nn.Linear``, and so is quantized."""
    modules = [
        (f"{block_name}.{name}", module)
        for block_name, block in decoder_blocks(model).items()
        for name, module in block.named_modules()
    ]
    if not any(isinstance(module, nn.Linear) for _, module in modules):
        raise InputError(
            f"the blocks of {type(model).__name__} hold no nn.Linear to quantize; "
            "convert it with normfree.from_hf first"
        )
    left = [
        f"{module_name}.{name}"
        for module_name, module in modules
        if not isinstance(module, nn.Linear)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim >= 2
    ]
    if left:
        raise InputError(
            f"int8 would leave {len(left)} weights of {type(model).__name__} in full precision, {left[0]} first, as "
            "they belong to no nn.Linear; the loss would be that of a partly quantized model"
        )


def _quantize(module: nn.Module, scheme: str) -> None:
    """Quantizes the linear layers of ``module`` in place."""
    try:
        from torchao import quantization as torchao
    except ImportError as error:
        raise InputError(
            f"quantization needs torchao ({error}); install it with: pip install 'normfree[quantization]'"
        ) from error
    configs: dict[str, Any] = {
        INT8_WEIGHTS: torchao.Int8WeightOnlyConfig,
        INT8_WEIGHTS_ACTIVATIONS: torchao.Int8DynamicActivationInt8WeightConfig,
    }
    # The default would change settings of torch.compile for the whole process.
    torchao.quantize_(module, configs[scheme](set_inductor_config=False))
