"""What models cost under secure computation, as data: what ``normfree private-cost`` prints and writes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from normfree.errors import unknown_name
from normfree.files import DEFAULT_CACHE_DIR
from normfree.training.pretrained import quantizations
from normfree_private.environment import find_engine
from normfree_private.measurement import PROTOCOLS, Measurer, Settings
from normfree_private.pricing import (
    Progress,
    open_models,
    price,
    price_alternatives,
    price_blocks,
    run_end_to_end,
    totals,
)
from normfree_private.projection import NETWORKS, Network

DEFAULT_PROTOCOLS = ("semi2k", "aby3")


@dataclass(frozen=True)
class PrivateCosts:
    """What was measured, as the frames of :mod:`normfree_private.pricing`, and how.

    alternatives, end_to_end: None if they were not asked for. sequence_lengths: T of each model. quantization: how a
    model's weights were quantized, for those that were.
    """

    operations: pd.DataFrame
    totals: pd.DataFrame
    blocks: pd.DataFrame
    alternatives: pd.DataFrame | None
    end_to_end: pd.DataFrame | None
    settings: Sequence[Settings]
    networks: Sequence[Network]
    sequence_lengths: Sequence[int]
    engine_version: str
    quantization: Mapping[str, str]

    def frames(self) -> dict[str, pd.DataFrame]:
        """The frames that were measured, by name."""
        names = ("operations", "totals", "blocks", "alternatives", "end_to_end")
        return {name: frame for name in names if (frame := getattr(self, name)) is not None}


def make_settings(
    protocols: Iterable[str] = DEFAULT_PROTOCOLS,
    *,
    field: str = "fm64",
    fraction_bits: int = 18,
    runs: int = 3,
    timeout_seconds: int = 600,
) -> list[Settings]:
    """Settings for each of ``protocols`` (``semi2k``, ``aby3``, ``cheetah``; in any case), each once.

    Raises:
        InputError: a protocol or the field is unknown, or a number is out of range.
    """
    names = list(dict.fromkeys(name.lower() for name in protocols))
    for name in names:
        if name not in PROTOCOLS:
            raise unknown_name("protocol", name, PROTOCOLS)
    return [Settings(PROTOCOLS[name], field.lower(), fraction_bits, runs, timeout_seconds) for name in names]


def measure_private_costs(
    models: Mapping[str, str],
    *,
    settings: Sequence[Settings] | None = None,
    networks: Sequence[Network] = NETWORKS,
    sequence_length: int | None = None,
    vocab_size: int | None = None,
    blocks_only: bool = False,
    with_alternatives: bool = True,
    end_to_end: bool = False,
    engine_python: Path | None = None,
    cache_dir: Path = DEFAULT_CACHE_DIR,
    progress: Progress = lambda text: None,
) -> PrivateCosts:
    """Measures every operation of ``models`` (name to source, see :func:`~normfree_private.pricing.open_models`).

    Args:
        models: runs, model folders, Hub ids, presets or YAML files, by the name that the tables show.
        settings: one for each protocol; None takes SEMI2K and ABY3.
        networks: links to project the costs to.
        sequence_length: T; by default the run's or preset's.
        vocab_size: for presets whose tokenizer is on the Hub.
        blocks_only: leave embedding, final norm and unembedding out.
        with_alternatives: also measure every norm and activation on the arrays of the first model.
        end_to_end: also run each whole model under encryption.
        engine_python: Python of the engine's environment; None looks for it as
            :func:`~normfree_private.environment.find_engine` does.
        cache_dir: where costs are kept and found again.
        progress: receives a line on what is being measured.

    Raises:
        InputError: a model or the engine cannot be used.
        EngineError: the engine failed; what was measured until then is kept.
    """
    settings = make_settings() if settings is None else settings
    engine = find_engine(engine_python)
    priced = open_models(
        models,
        sequence_length=sequence_length,
        vocab_size=vocab_size,
        blocks_only=blocks_only,
        needs_weights=end_to_end,
    )
    measurers = [Measurer(engine, each, cache_dir / "private-cost") for each in settings]
    operations = _joined(price(each, measurers, blocks_only=blocks_only, progress=progress) for each in priced)
    blocks = _joined(price_blocks(each, measurers, progress=progress) for each in priced)
    others = price_alternatives(priced[0], measurers, progress=progress) if with_alternatives else None
    whole = [run_end_to_end(each, measurers, progress=progress) for each in priced] if end_to_end else []
    return PrivateCosts(
        operations,
        totals(operations, priced, networks),
        blocks,
        others,
        _joined(whole) if whole else None,
        settings,
        networks,
        [each.T for each in priced],
        engine.version,
        quantizations(models),
    )


def _joined(frames: Iterable[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(list(frames), ignore_index=True)
