"""Numbers from the papers, shipped with the package for reports to show next to their own."""

from importlib.resources import files
from typing import Literal, get_args

import pandas as pd

from normfree.errors import unknown_name

PublishedName = Literal[
    "relu_revival_table2",
    "relu_revival_figure1_headwise_entropy",
    "ln_removal_gpt2_cross_entropy",
    "curse_of_depth_table1",
    "spark_transformer_claims",
]
PUBLISHED_NAMES: tuple[PublishedName, ...] = get_args(PublishedName)


def load_published(name: PublishedName) -> pd.DataFrame:
    """One published table; ``published/README.md`` names the paper behind each.

    The files are kept as published; only the column ``config`` is renamed to ``configuration``, the name
    every frame of the report uses. Losses and entropies are in nats.

    Raises:
        InputError: ``name`` is not one of ``PUBLISHED_NAMES``.
    """
    if name not in PUBLISHED_NAMES:
        raise unknown_name("published table", name, PUBLISHED_NAMES)
    with files("normfree.report").joinpath("published", f"{name}.csv").open(encoding="utf-8") as file:
        return pd.read_csv(file).rename(columns={"config": "configuration"})


def published_head_entropy() -> pd.DataFrame:
    """Figure 1 of ReLU's Revival as a ``head_entropy`` frame: 4 configurations x 12 layers x 12 heads, nats.

    The seed is 1337, the default of the paper's public reference code; the paper reports one run each.
    """
    frame = load_published("relu_revival_figure1_headwise_entropy")
    return frame.assign(model="GPT-2", context_length=128, seed=1337)
