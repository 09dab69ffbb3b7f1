"""The cost of models under secure computation: every operation measured and summed, and whole runs to compare."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from normfree.data import DataConfig
from normfree.errors import InputError
from normfree.modeling import NormfreeConfig, NormfreeForCausalLM
from normfree.runner import Preset, load_preset, preset_names
from normfree.studies.relu_revival import STUDY
from normfree.training import load_pretrained, load_run_config
from normfree.training.run_config import read_yaml
from normfree.training.run_folder import RESULTS_FILE
from normfree_private.measurement import Cost, Measurer
from normfree_private.model import block_cost, run_encrypted
from normfree_private.operations import Step, alternatives, block_steps, model_steps
from normfree_private.projection import Network

Progress = Callable[[str], None]
WHOLE_MODEL = "model"
BLOCKS = "blocks"


@dataclass(frozen=True)
class PricedModel:
    """A model to measure: its name on the page, its configuration, and its sequence length T.

    configuration: its label in a study, such as ``SM+G``. model: its weights; None for a configuration alone.
    eval_ppl: the perplexity of a finished run, else NaN.
    """

    name: str
    config: NormfreeConfig
    T: int
    configuration: str | None = None
    model: NormfreeForCausalLM | None = None
    eval_ppl: float = float("nan")


def open_models(
    sources: Mapping[str, str],
    *,
    sequence_length: int | None,
    vocab_size: int | None,
    blocks_only: bool,
    needs_weights: bool,
) -> list[PricedModel]:
    """The models of ``sources``, from name to source: runs, model folders, Hub ids, presets, YAML files.

    A preset means the four configurations of ReLU's Revival at its size, the YAML file of a run that run's. If the
    configurations of all models differ, they become the models' names.

    Args:
        sequence_length: T; by default the run's or preset's.
        vocab_size: for presets whose tokenizer is on the Hub.
        blocks_only: the vocabulary is not needed.
        needs_weights: configurations without weights are refused.

    Raises:
        InputError: a source cannot be read, has no encrypted counterpart, or lacks a length, vocabulary or weights.
    """
    opened: list[PricedModel] = []
    for source, name in sources.items():
        is_yaml = source.endswith((".yaml", ".yml"))
        if is_yaml and "configuration" in read_yaml(Path(source)):
            run = load_run_config(Path(source))
            config = run.build_model_config(_vocabulary(source, run.data, vocab_size, blocks_only))
            opened.append(PricedModel(name, config, sequence_length or run.data.sequence_length, run.configuration))
        elif is_yaml or source in preset_names():
            preset = load_preset(source)
            size = _vocabulary(source, preset.data, vocab_size, blocks_only)
            opened += _configurations(name, preset, sequence_length, size)
        else:
            opened.append(_trained(source, name, sequence_length))
    for each in opened:
        block_steps(each.config, 0, each.T)  # refuses what has no encrypted counterpart before anything is measured
        if needs_weights and each.model is None:
            raise InputError(f"{each.name} is a configuration without weights; --end-to-end needs a trained model")
        if each.model is not None and each.config.n_positions < each.T:
            raise InputError(f"{each.name} has {each.config.n_positions} positions; lower --sequence-length {each.T}")
    configurations = [each.configuration for each in opened]
    if None not in configurations and len(set(configurations)) == len(configurations):
        return [replace(each, name=str(each.configuration)) for each in opened]
    return opened


def price(model: PricedModel, measurers: Iterable[Measurer], *, blocks_only: bool, progress: Progress) -> pd.DataFrame:
    """The cost of each operation of a model under each protocol, one row an operation, in order.

    Returns:
        model, protocol, layer (NA outside the blocks), name, operation, group, shapes; bytes_sent and messages_sent of
        a party (mean over the parties); seconds, over loopback.

    Raises:
        EngineError: the engine failed.
    """
    rows = []
    for measurer in measurers:
        protocol = measurer.settings.protocol.name
        progress(f"{model.name}: operations, {protocol}")
        steps = model_steps(model.config, model.T, blocks_only=blocks_only)
        costs = measurer.operations(step.operation for step in steps)
        rows += [
            {
                "model": model.name,
                "protocol": protocol,
                "layer": step.layer,
                "name": step.name,
                "operation": step.operation.kind,
                "group": step.group,
                "shapes": step.operation.shape_text,
                **_columns(costs[step.operation]),
            }
            for step in steps
        ]
    return pd.DataFrame(rows).astype({"layer": "Int64"})


def price_blocks(model: PricedModel, measurers: Iterable[Measurer], *, progress: Progress) -> pd.DataFrame:
    """The first block in one program, and the sum of its operations, one row a protocol.

    Returns:
        model, protocol; bytes_sent, messages_sent, seconds of the program; sum_bytes_sent, sum_messages_sent;
        difference_percent: of the sum's bytes from the program's.

    Raises:
        EngineError: the engine failed.
    """
    rows = []
    for measurer in measurers:
        progress(f"{model.name}: block 0 in one program, {measurer.settings.protocol.name}")
        whole = block_cost(measurer, model.config, 0, model.T)
        parts = _parts(measurer, block_steps(model.config, 0, model.T))
        rows.append(_against_sum(model, measurer, whole, parts))
    return pd.DataFrame(rows)


def price_alternatives(model: PricedModel, measurers: Iterable[Measurer], *, progress: Progress) -> pd.DataFrame:
    """The cost of every norm and activation on the arrays of ``model``, one row each and protocol.

    Returns:
        protocol, group, label, shapes, bytes_sent, messages_sent, seconds.

    Raises:
        EngineError: the engine failed.
    """
    rows = []
    for measurer in measurers:
        protocol = measurer.settings.protocol.name
        progress(f"norms and activations, {protocol}")
        labelled = alternatives(model.config, model.T)
        costs = measurer.operations(operation for _, _, operation in labelled)
        for label, group, operation in labelled:
            cost = _columns(costs[operation])
            rows.append({"protocol": protocol, "group": group, "label": label, "shapes": operation.shape_text, **cost})
    return pd.DataFrame(rows)


def run_end_to_end(model: PricedModel, measurers: Iterable[Measurer], *, progress: Progress) -> pd.DataFrame:
    """The whole model under encryption on random tokens, one row a protocol.

    Returns:
        The columns of :func:`price_blocks`, and those of :class:`~normfree_private.model.EncryptedRun`.

    Raises:
        EngineError: the engine failed.
    """
    assert model.model is not None, "open_models asks for weights"
    tokens = torch.randint(model.config.vocab_size, (model.T,), generator=torch.Generator().manual_seed(0))
    rows = []
    for measurer in measurers:
        progress(f"{model.name}: end to end, {measurer.settings.protocol.name}")
        run = run_encrypted(measurer.engine, replace(measurer.settings, runs=1), model.model, tokens)
        parts = _parts(measurer, model_steps(model.config, model.T))
        names = ("max_error", "mean_error", "logit_std", "same_prediction", "plain_loss", "encrypted_loss")
        quality = {name: getattr(run, name) for name in names}
        rows.append({**_against_sum(model, measurer, run.cost, parts), **quality})
    return pd.DataFrame(rows)


def totals(operations: pd.DataFrame, models: Sequence[PricedModel], networks: Sequence[Network]) -> pd.DataFrame:
    """Sums of :func:`price`: of block 0, and of everything measured; one row a model, protocol and part.

    Returns:
        model, protocol, part (``block 0``; ``blocks`` or ``model``), bytes_sent, messages_sent, seconds; for each
        network NAME_seconds; for each of ``GROUPS`` GROUP_percent of the bytes, and for the norms their share of
        everything else too: norm_messages_percent, norm_NAME_percent; eval_ppl.
    """
    has_vocabulary = bool(operations["layer"].isna().any())
    parts = {"block 0": operations[operations["layer"] == 0], WHOLE_MODEL if has_vocabulary else BLOCKS: operations}
    perplexities = {model.name: model.eval_ppl for model in models}
    rows = []
    for part, chosen in parts.items():
        for (model, protocol), own in chosen.groupby(["model", "protocol"], sort=False):
            sums = _sums(own, networks)
            norms = _sums(own[own["group"] == "norm"], networks)
            shares = 100 * own.groupby("group")["bytes_sent"].sum() / sums["bytes_sent"]
            rows.append(
                {
                    "model": model,
                    "protocol": protocol,
                    "part": part,
                    **sums,
                    **{f"{group}_percent": share for group, share in shares.items()},
                    **{f"norm_{name}_percent": 100 * norms[name] / sums[name] for name in sums if name != "bytes_sent"},
                    "eval_ppl": perplexities[str(model)],
                }
            )
    frame = pd.DataFrame(rows)
    percents = [name for name in frame.columns if name.endswith("_percent")]
    return frame.fillna(dict.fromkeys(percents, 0.0))


def group_costs(operations: pd.DataFrame) -> pd.DataFrame:
    """Sums by group for the bar figure: model, protocol, group, bytes_sent, messages_sent."""
    by_group = operations.groupby(["model", "protocol", "group"], sort=False)
    return by_group.agg(bytes_sent=("bytes_sent", "sum"), messages_sent=("messages_sent", "sum")).reset_index()


def _configurations(name: str, preset: Preset, sequence_length: int | None, vocab_size: int) -> list[PricedModel]:
    T = sequence_length or preset.data.sequence_length
    found = []
    for each in STUDY.configurations(preset):
        options = {**preset.model, **each.model, "vocab_size": vocab_size, "n_positions": T}
        found.append(PricedModel(f"{name} {each.label}", NormfreeConfig.from_options(options), T, each.label))
    return found


def _trained(source: str, name: str, sequence_length: int | None) -> PricedModel:
    loaded = load_pretrained(source)
    model = loaded.as_normfree()
    T = sequence_length or (loaded.data.sequence_length if loaded.data is not None else None)
    if T is None:
        raise InputError(f"{source} does not say how long sequences are; give --sequence-length")
    results = Path(source) / RESULTS_FILE
    if loaded.data is None or not results.is_file():
        return PricedModel(name, model.config, T, model=model)
    row = pd.read_csv(results).iloc[0]
    return PricedModel(name, model.config, T, str(row["configuration"]), model, float(row["eval_ppl"]))


def _vocabulary(source: str, data: DataConfig, given: int | None, blocks_only: bool) -> int:
    if given is not None:
        return given
    if data.tokenizer == "train":
        return data.vocab_size
    if blocks_only:
        return NormfreeConfig.vocab_size  # nothing reads it
    raise InputError(
        f"the vocabulary of {source} is that of its tokenizer {data.tokenizer}, which is not loaded here; give its "
        "size with --vocab-size, or leave embedding and unembedding out with --blocks-only"
    )


def _parts(measurer: Measurer, steps: Sequence[Step]) -> list[Cost]:
    costs = measurer.operations(step.operation for step in steps)
    return [costs[step.operation] for step in steps]


def _columns(cost: Cost) -> dict[str, float]:
    return {"bytes_sent": cost.bytes_per_party, "messages_sent": cost.messages_per_party, "seconds": cost.seconds}


def _against_sum(model: PricedModel, measurer: Measurer, whole: Cost, parts: Sequence[Cost]) -> dict[str, Any]:
    summed = reduce(add, parts)
    return {
        "model": model.name,
        "protocol": measurer.settings.protocol.name,
        **_columns(whole),
        "sum_bytes_sent": summed.bytes_per_party,
        "sum_messages_sent": summed.messages_per_party,
        "difference_percent": 100 * (summed.bytes_per_party / whole.bytes_per_party - 1),
    }


def _sums(operations: pd.DataFrame, networks: Sequence[Network]) -> dict[str, float]:
    sums = {name: float(operations[name].sum()) for name in ("bytes_sent", "messages_sent", "seconds")}
    seconds = {
        f"{network.name}_seconds": network.seconds(bytes_sent=sums["bytes_sent"], messages=sums["messages_sent"])
        for network in networks
    }
    return {**sums, **seconds}
