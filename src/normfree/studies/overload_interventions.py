"""What keeps heads of norm-free models near uniform attention? Trained models are changed, and fine-tuned briefly.

A correlation cannot tell whether heads are stuck because of what their layer's network does, because the residual
stream is small, or because their logits are. Each intervention changes one of these in a trained model; the control
changes nothing and is fine-tuned as long.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import nn

from normfree.columns import ENTROPY_NATS, EVAL_LOSS
from normfree.data import PackedData
from normfree.entropy import uniform_entropy_bound
from normfree.files import write_text
from normfree.modeling import NormfreeConfig, NormfreeForCausalLM
from normfree.modeling.constant_std import ConstantStdNorm
from normfree.report import Element, Section, Table
from normfree.report.frames import in_order
from normfree.report.intervals import mean_confidence_interval
from normfree.report.numbers import number, plus_minus
from normfree.runner import Findings, Measurement, Study, StudyPage, measured_frame, slug
from normfree.studies.hybrid_activations import layer_entropy_by_configuration
from normfree.studies.relu_revival import GELU, LAYERNORM_GELU, PAPER, RELU, scale_limits
from normfree.training import Recipe, RunResult, StudyProgress, load_pretrained, load_run_config, train
from normfree.training.evaluation import loss_on
from normfree.training.half_precision import autocast
from normfree.training.run_folder import CONFIG_FILE

STEPS_SHARE, RATE_SHARE = 1 / 16, 0.3
"""Of the recipe's steps and of its learning rate: those of the fine-tuning, which decays to zero along a cosine."""
STUCK = 0.75
"""A head is stuck if its entropy is above this share of that of uniform attention."""
SHARPER = 4.0
"""Factor of the logits of stuck heads."""
CALIBRATION_SEQUENCES = 32
FOLDER, LOSSES_FILE, ENTROPY_FILE = "interventions", "interventions.csv", "intervention-entropy.csv"
CHANGED = (GELU, RELU)


@dataclass(frozen=True)
class Trained:
    """A trained model without norms in its blocks.

    entropy: of each head, nats, [n_layer, n_head].
    tokens: int64 [n, T], to measure on.
    """

    model: NormfreeForCausalLM
    entropy: NDArray[np.float64]
    tokens: torch.Tensor

    def with_options(self, **options: object) -> NormfreeForCausalLM:
        """A model with the same weights and some other options; norms that it lacked begin as they are initialized."""
        names = NormfreeConfig.option_names()
        config = NormfreeConfig(**{**{name: getattr(self.model.config, name) for name in names}, **options})
        changed = NormfreeForCausalLM(config)
        missing, unexpected = changed.load_state_dict(self.model.state_dict(), strict=False)
        assert not unexpected, unexpected
        assert all("norm" in name for name in missing), missing
        return changed


@dataclass(frozen=True)
class Intervention:
    """A change of a trained model.

    change: returns the changed model.
    layers: those that it changes, from the number of layers.
    """

    label: str
    change: Callable[[Trained], NormfreeForCausalLM]
    layers: Callable[[int], range]


def other_activation(trained: Trained, layers: range) -> NormfreeForCausalLM:
    """ReLU in place of GELU in ``layers``, or the reverse."""
    activations = list(trained.model.config.activations)
    for layer in layers:
        activations[layer] = {"gelu": "relu", "relu": "gelu"}[activations[layer]]
    return trained.with_options(activation=activations)


def sharper_heads(trained: Trained) -> NormfreeForCausalLM:
    """Logits of stuck heads times ``SHARPER``: their query projections are."""
    changed = trained.with_options()
    config = changed.config
    bound = uniform_entropy_bound(config.n_positions)
    is_stuck = torch.from_numpy(trained.entropy > STUCK * bound)
    factors = torch.where(is_stuck, SHARPER, 1.0).repeat_interleave(config.head_dim, dim=1)
    with torch.no_grad():
        for block, factor in zip(changed.model.blocks, factors, strict=True):
            projection = block.attention.q_proj
            projection.weight.mul_(factor[:, None])
            if projection.bias is not None:
                projection.bias.mul_(factor)
    return changed


@torch.no_grad()
def unit_inputs(trained: Trained) -> NormfreeForCausalLM:
    """The same function, with an RMS of one in what every attention and every feed-forward network reads.

    What they read is divided by its RMS over all tokens, a constant, and the weights that read it are multiplied by it.
    An update of these weights then changes the function more, as it does behind a norm.
    """
    rms = _input_rms(trained)
    changed = trained.with_options(norm="constant_std", norm_is_centered=False)
    for block, (attention, ffn) in zip(changed.model.blocks, rms, strict=True):
        for norm, network, writer, value in (
            (block.attention_norm, block.attention, "o_proj", attention),
            (block.ffn_norm, block.ffn, "down_proj", ffn),
        ):
            assert isinstance(norm, ConstantStdNorm)
            norm.std.fill_(value)
            for name, projection in network.named_children():
                if isinstance(projection, nn.Linear) and name != writer:
                    projection.weight.mul_(value)
    return changed


@torch.no_grad()
def _input_rms(trained: Trained) -> list[tuple[float, float]]:
    """The RMS of what each block's attention and feed-forward network read."""
    squares: dict[nn.Module, float] = {}

    def see(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        squares[module] = float(arguments[0].float().square().mean())

    blocks = trained.model.model.blocks
    hooks = [each.register_forward_pre_hook(see) for block in blocks for each in (block.attention, block.ffn)]
    trained.model.eval()(trained.tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [(squares[block.attention] ** 0.5, squares[block.ffn] ** 0.5) for block in blocks]


def _early(n_layer: int) -> range:
    return range(max(1, n_layer // 3))


def _late(n_layer: int) -> range:
    return range(n_layer - max(1, n_layer // 3), n_layer)


def _swapped(where: Callable[[int], range]) -> Callable[[Trained], NormfreeForCausalLM]:
    return lambda trained: other_activation(trained, where(trained.model.config.n_layer))


CONTROL = "control"
INTERVENTIONS = (
    Intervention(CONTROL, Trained.with_options, lambda n_layer: range(0)),
    Intervention("other activation, early third", _swapped(_early), _early),
    Intervention("other activation, late third", _swapped(_late), _late),
    Intervention("other activation, all layers", _swapped(range), range),
    Intervention(f"stuck heads' logits ×{SHARPER:g}", sharper_heads, range),
    Intervention("the same function, inputs of RMS 1", unit_inputs, range),
)


def measure(result: RunResult, data: PackedData, console: Console) -> None:
    """Changes and fine-tunes a finished run in every way; writes two tables into its folder.

    ``interventions.csv``: intervention, before, after (evaluation loss, nats per token). ``intervention-entropy.csv``:
    intervention, layer, head, entropy_nats, after fine-tuning. A run that diverged, or with LayerNorm, has none.
    """
    place, label = result.folder / FOLDER, result.row["configuration"]
    is_changed = label in {each.label for each in CHANGED}
    if not is_changed or result.row["status"] != "finished" or (result.folder / ENTROPY_FILE).exists():
        return
    model = load_pretrained(str(result.folder)).as_normfree()
    entropy = result.head_entropy.pivot(index="layer", columns="head", values=ENTROPY_NATS).to_numpy(np.float64)
    trained = Trained(model, entropy, data.eval.whole(CALIBRATION_SEQUENCES)[0].to(model.device))
    recipe = _recipe(load_run_config(result.folder / CONFIG_FILE).recipe, int(result.row["steps"]))
    n_token = recipe.n_tokens(data.train.sequence_length)
    losses, entropies = [], []
    with StudyProgress(len(INTERVENTIONS) * n_token, f"{label} seed {result.row['seed']}: interventions") as progress:
        for each in INTERVENTIONS:
            changed = each.change(trained)
            with autocast(recipe.precision, changed.device):
                before = loss_on(changed, data.eval)
            folder = place / slug(each.label)
            start = folder / "start"
            changed.save_pretrained(start)
            data.tokenizer.save_pretrained(start)
            run = load_run_config(result.folder / CONFIG_FILE).model_copy(
                update={"configuration": each.label, "model": {}, "recipe": recipe, "start_from": str(start.resolve())}
            )
            tuned = train(run, data, folder / "tuned", callbacks=(progress.run(each.label, n_token),))
            shutil.rmtree(start)
            losses.append({"intervention": each.label, "before": before, "after": tuned.row[EVAL_LOSS]})
            entropies.append(tuned.head_entropy.assign(intervention=each.label))
    write_text(result.folder / LOSSES_FILE, pd.DataFrame(losses).to_csv(index=False, na_rep="nan"))
    write_text(result.folder / ENTROPY_FILE, pd.concat(entropies).to_csv(index=False, na_rep="nan"))


def _recipe(recipe: Recipe, trained_steps: int) -> Recipe:
    """The recipe of the brief fine-tuning: that of the training run, shorter and at a lower rate."""
    steps = max(1, round(STEPS_SHARE * trained_steps))
    changes: dict[str, object] = {
        "steps": steps,
        "tokens": None,
        "eval_steps": steps,
        "save_steps": steps,
        "warmup_ratio": 0.05,
    }
    changes |= {"learning_rate": RATE_SHARE * recipe.learning_rate, "learning_rate_decay": "cosine"}
    return Recipe.model_validate({**recipe.model_dump(), **changes})


def describe(page: StudyPage) -> Findings:
    """What each intervention does to the loss and to stuck heads, for each activation."""
    measured, _ = page.measured(ENTROPY_FILE)
    sections = []
    leads = []
    for base in CHANGED:
        own = [each for each in measured if each.row["configuration"] == base.label]
        if not own:
            continue
        losses, entropy = measured_frame(own, LOSSES_FILE), measured_frame(own, ENTROPY_FILE)
        table = intervention_table(losses, entropy, page.uniform_bound)
        name = f"entropy-after-{slug(base.label)}"
        n_layer = page.folder.preset.n_layer
        elements: list[Element] = [
            Table(formatted(table), _CAPTION),
            page.figure(
                name,
                layer_entropy_by_configuration(
                    entropy.assign(configuration=entropy["intervention"]),
                    marked={each.label: list(each.layers(n_layer)) for each in INTERVENTIONS},
                    mark="changed",
                    maximum=page.uniform_bound,
                ),
                f"Attention entropy by layer after each change of {base.label} and its fine-tuning, mean over heads: "
                "evaluation tokens. A dot marks the layers that were changed.",
            ),
        ]
        sections.append(Section(f"Changes of {base.label}", elements))
        leads.append(_lead(base.label, table))
    return Findings(" ".join(leads) or "No run is changed yet.", sections, scale_limits(page) + _LIMITS)


_CAPTION = (
    "Evaluation loss in nats per token right after the change, and how far it is above the control's after "
    "fine-tuning. Stuck: "
    f"heads above {100 * STUCK:.0f} % of the entropy of uniform attention. ± 95 % t-interval over seeds."
)
_LIMITS = (
    "A brief fine-tuning shows what can still change in a trained model, not what would have come of it from the start."
)


def intervention_table(losses: pd.DataFrame, entropy: pd.DataFrame, bound: float) -> pd.DataFrame:
    """One row an intervention: estimates over seeds.

    Args:
        losses: intervention, seed, before, after.
        entropy: intervention, seed, layer, head, entropy_nats.
        bound: entropy of uniform attention, nats.

    Returns:
        intervention; before, excess (after, less the control's of the same seed) and stuck_percent (of the heads), each
        an :class:`~normfree.report.intervals.Estimate`.
    """
    control = losses[losses["intervention"] == CONTROL].set_index("seed")["after"]
    is_stuck = (entropy[ENTROPY_NATS] > STUCK * bound).where(entropy[ENTROPY_NATS].notna())
    stuck = entropy.assign(stuck=is_stuck.astype(float)).groupby(["intervention", "seed"])["stuck"]
    shares = stuck.agg(lambda each: each.mean(skipna=False))
    rows = []
    for name in in_order(losses["intervention"]):
        own = losses[losses["intervention"] == name].set_index("seed")
        values = {"before": own["before"], "excess": own["after"] - control, "stuck_percent": 100 * shares[name]}
        estimates = {key: mean_confidence_interval(each.to_numpy(np.float64)) for key, each in values.items()}
        rows.append({"intervention": name, **estimates})
    return pd.DataFrame(rows)


def formatted(table: pd.DataFrame) -> pd.DataFrame:
    """The table of :func:`intervention_table` for readers."""
    return pd.DataFrame(
        {
            "Change": row["intervention"],
            "Loss at once": plus_minus(row["before"], ".3f"),
            "After, less control": plus_minus(row["excess"], "+.3f"),
            "Stuck heads, %": plus_minus(row["stuck_percent"], ".0f"),
        }
        for row in table.to_dict("records")
    )


def _lead(base: str, table: pd.DataFrame) -> str:
    rows = {row["intervention"]: row for row in table.to_dict("records")}
    told = [
        f"{name} {number(row['excess'].mean, '+.3f')} nats, {number(row['stuck_percent'].mean, '.0f')} % stuck"
        for name, row in rows.items()
        if name != CONTROL
    ]
    control = number(rows[CONTROL]["stuck_percent"].mean, ".0f")
    return f"{base} (control: {control} % of the heads stuck): {'; '.join(told)}."


STUDY = Study(
    name="overload-interventions",
    title="What keeps heads near uniform attention",
    question="Activation, residual scale or logits: what keeps heads of norm-free models near uniform attention?",
    baseline=LAYERNORM_GELU.label,
    configurations=lambda preset: (LAYERNORM_GELU, *CHANGED),
    describe=describe,
    measurement=lambda preset: Measurement(lambda: None, measure),
    presets=("smoke", "cpu", "cpu-long", "gpu"),
    papers=(PAPER,),
)
