import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from normfree import NormfreeConfig, NormfreeForCausalLM
from normfree.errors import InputError
from normfree.report import load_published
from normfree.runner import Study, installed_studies, load_preset, preset_names, run_config
from normfree.studies.relu_revival import GELU, LAYERNORM_GELU, STUDY

STUDIES = {name: each for name, each in installed_studies().items() if isinstance(each, Study)}
SHIPPED = [
    *("cpu", "cpu-brief", "cpu-long", "cpu-pythia-128", "cpu-pythia-256"),
    *("gpu", "gpu-pythia-128", "gpu-pythia-256"),
    *("paper-gpt2-128", "paper-pythia-128", "paper-pythia-256"),
    "smoke",
]


DEPTH = ["depth-12", "depth-24", "depth-48", "depth-96"]
LLAMA = ["llama-130m", "llama-1b", "llama-250m", "llama-350m", "llama-60m"]
REMOVAL = ["removal-cpu", "removal-gap-cpu", "removal-gap-smoke", "removal-scaling-cpu", "removal-smoke"]


def test_the_shipped_presets_are_listed() -> None:
    assert preset_names() == sorted([*SHIPPED, *DEPTH, *LLAMA, *REMOVAL])


def test_presets_are_what_they_were_when_each_was_a_whole_file() -> None:
    whole = json.loads(Path(__file__).with_name("resolved_presets.json").read_text())
    assert {name: load_preset(name).model_dump(mode="json", exclude_unset=True) for name in whole} == whole


def test_the_long_preset_takes_the_steps_of_the_paper_and_sees_no_token_twice() -> None:
    paper, long, short = (load_preset(name) for name in ("paper-gpt2-128", "cpu-long", "cpu"))
    steps = paper.recipe.n_steps(paper.data.sequence_length)
    assert long.recipe.n_steps(long.data.sequence_length) == steps == 32043
    assert long.recipe.n_tokens(long.data.sequence_length) == long.data.train_tokens
    for name in ("learning_rate", "warmup_ratio", "learning_rate_decay", "weight_decay", "eval_steps"):
        assert getattr(long.recipe, name) == getattr(paper.recipe, name), name
    assert long.model == short.model


def written(folder: Path, **files: str) -> str:
    """Writes YAML files, and returns the path of the first."""
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return str(folder / f"{next(iter(files))}.yaml")


def test_a_file_holds_what_differs_from_its_base(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        mine="base: sub.yaml\nmodel: {attention_bias: null, norm: rmsnorm}\nrecipe: {tokens: 2560}",
        sub="base: smoke\ndescription: Mine.\nmodel: {n_layer: 3}\nremoval: {budget_shares: [0.1]}\nseeds: [4, 5]",
    )
    smoke, mine = load_preset("smoke"), load_preset(path)
    assert (mine.description, mine.seeds, mine.model_name) == ("Mine.", [4, 5], smoke.model_name)
    kept = {name: value for name, value in smoke.model.items() if name != "attention_bias"}
    assert mine.model == {**kept, "n_layer": 3, "norm": "rmsnorm"}
    assert mine.data == smoke.data
    assert mine.recipe == smoke.with_changes(**{"recipe.tokens": 2560}).recipe
    assert mine.removal is not None
    assert mine.removal.budget_shares == (0.1,)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"a": "base: smok"}, r"a.yaml: base smok: unknown preset 'smok' \(did you mean 'smoke'\?\)"),
        ({"a": "base: b.yaml"}, r"a.yaml: base b.yaml: cannot read .*b.yaml: No such file"),
        ({"a": "base: a.yaml"}, "a.yaml: base a.yaml: bases form a circle"),
        ({"a": "base: b.yaml", "b": "base: ./a.yaml"}, r"b.yaml: base ./a.yaml: bases form a circle"),
        ({"a": "base: [smoke]"}, r"a.yaml: base \['smoke'\]: unknown preset"),
        ({"a": "base: smoke\nmodel: {n_layers: 3}"}, "a.yaml: unknown model option 'n_layers'"),
        ({"a": "base: smoke\nrecipe: {lr: 3}"}, "a.yaml: unknown option 'recipe.lr'"),
        ({"a": "base: smoke\nrecipes: {steps: 3}"}, "a.yaml: unknown option 'recipes'"),
        ({"a": "base: smoke\nmodel_name: null"}, "a.yaml: model_name: Field required"),
        ({"a": "base: b.yaml\nmodel: {n_layer: 3}", "b": "model: 3"}, "unknown section 'model'"),
        ({"a": "base: b.yaml", "b": "model: ["}, r"a.yaml: base b.yaml: .*b.yaml is not valid YAML"),
    ],
)
def test_a_base_that_cannot_be_used_is_one_clear_error(tmp_path: Path, files: dict[str, str], says: str) -> None:
    with pytest.raises(InputError, match=says) as error:
        load_preset(written(tmp_path, **files))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "sizes", "learning_rate", "n_parameters"),
    [
        # Sizes: the public code's configurations. Parameters with its vocabulary of 32,000.
        ("llama-60m", (8, 8, 512, 1376), 1e-3, 58_073_600),
        ("llama-130m", (12, 12, 768, 2048), 1e-3, 134_105_856),
        ("llama-250m", (24, 16, 768, 2560), 1e-3, 247_370_496),
        ("llama-350m", (24, 16, 1024, 2736), 5e-4, 367_969_280),
        ("llama-1b", (24, 32, 2048, 5461), 5e-4, 1_339_082_752),
    ],
)
def test_the_llama_presets_are_those_of_the_curse_of_depth(
    name: str, sizes: tuple[int, ...], learning_rate: float, n_parameters: int
) -> None:
    preset = load_preset(name)
    config = NormfreeConfig(**preset.model, vocab_size=32_000, n_positions=preset.data.sequence_length)
    assert (config.n_layer, config.n_head, config.n_embd, config.n_inner) == sizes
    with torch.device("meta"):
        assert NormfreeForCausalLM(config).num_parameters() == n_parameters
        assert LlamaForCausalLM(_llama_config(config)).num_parameters() == n_parameters
    assert (preset.data.corpus, preset.data.sequence_length) == ("hf:allenai/c4:en", 256)
    recipe = preset.recipe
    assert (recipe.learning_rate, recipe.batch_size, recipe.weight_decay) == (learning_rate, 512, 0.0)
    published = load_published("curse_of_depth_table1")
    tokens = set(published.loc[published["model"] == preset.model_name, "training_tokens_billion"] * 1e9)
    assert {recipe.tokens} == ({1.1e9} if name == "llama-60m" else tokens)


def _llama_config(config: NormfreeConfig) -> LlamaConfig:
    """Hugging Face's LLaMA of that size."""
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.n_embd,
        intermediate_size=config.n_inner,
        num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head,
        tie_word_embeddings=False,
    )


@pytest.mark.parametrize("name", DEPTH)
def test_the_depth_presets_differ_in_their_depth_only(name: str) -> None:
    preset, first = load_preset(name), load_preset(DEPTH[0])
    assert preset.n_layer == int(name.removeprefix("depth-"))
    assert {**preset.model, "n_layer": None} == {**first.model, "n_layer": None}
    assert (preset.data, preset.recipe) == (first.data, first.recipe)
    assert preset.recipe.n_steps(preset.data.sequence_length) == 500


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_preset_makes_its_four_models(name: str) -> None:
    preset = load_preset(name)
    for configuration in STUDY.configurations(preset):
        config = run_config(preset, configuration, seed=0).build_model_config(preset.data.vocab_size)
        assert config.final_norm == "layernorm"
        assert config.norm == ("layernorm" if "LN" in configuration.label else "none")
    assert preset.recipe.n_steps(preset.data.sequence_length) >= 1


@pytest.mark.parametrize(
    ("name", "sizes", "n_steps"),
    [
        ("paper-gpt2-128", (12, 12, 768, 128), 32_043),
        ("paper-pythia-128", (6, 8, 512, 128), 32_043),
        ("paper-pythia-256", (6, 8, 512, 256), 16_021),
    ],
)
def test_the_paper_presets_are_the_papers(name: str, sizes: tuple[int, ...], n_steps: int) -> None:
    preset = load_preset(name)
    config = run_config(preset, LAYERNORM_GELU, seed=1337).build_model_config(50_000)
    assert (config.n_layer, config.n_head, config.n_embd, config.n_positions) == sizes
    assert preset.recipe.n_steps(preset.data.sequence_length) == n_steps
    assert (preset.data.corpus, preset.data.cut, preset.recipe.precision) == ("codeparrot", "chunks", "fp16")
    assert (preset.recipe.learning_rate, preset.recipe.batch_size) == (1e-3, 512)


def test_gpt2_of_the_paper_has_biases_on_queries_and_keys_only() -> None:
    preset = load_preset("paper-gpt2-128").with_changes(**{"model.n_layer": 1})
    config = run_config(preset, GELU, seed=0).build_model_config(1000)
    biases = {name for name, _ in NormfreeForCausalLM(config).named_parameters() if name.endswith("bias")}
    assert biases == {
        "model.blocks.0.attention.q_proj.bias",
        "model.blocks.0.attention.k_proj.bias",
        "model.final_norm.bias",
    }


def test_a_budget_replaces_the_other_kind_of_budget() -> None:
    assert load_preset("cpu").with_changes(**{"recipe.steps": 7}).recipe.n_steps(128) == 7
    assert load_preset("smoke").with_changes(**{"recipe.tokens": 2560}).recipe.n_steps(32) == 10


def test_a_changed_tokenizer_takes_its_vocabulary_with_it() -> None:
    changed = load_preset("cpu").with_changes(**{"data.tokenizer": "gpt2"})
    assert changed.data.tokenizer == "gpt2"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modl.n_layer": 3}, "unknown section 'modl'"),
        ({"recipe.lr": 3}, "unknown option 'recipe.lr'"),
        ({"recipe.learning_rate": "fast"}, "recipe.learning_rate: Input should be a valid number"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [1, 1]}, "seeds must be different"),
        ({"removal": {"learning_rates": []}}, "removal.learning_rates: Tuple should have at least 1 item"),
        ({"removal": {"budget_shares": [0.1, 0.1]}}, "removal.budget_shares: they must be different"),
        ({"removal": {"budget_shares": [0.0]}}, "removal.budget_shares.0: Input should be greater than 0"),
    ],
)
def test_bad_changes_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_preset("cpu").with_changes(**changes)


def test_an_unknown_preset_is_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"unknown preset 'cpus' \(did you mean 'cpu'\?\)"):
        load_preset("cpus")
    with pytest.raises(InputError, match="cannot read"):
        load_preset(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize("name", STUDIES)
def test_every_configuration_has_a_folder_of_its_own(name: str) -> None:
    preset = {"norm-removal": "removal-cpu", "norm-removal-scaling": "removal-scaling-cpu"}.get(name, "cpu")
    slugs = [each.slug for each in STUDIES[name].configurations(load_preset(preset))]
    assert len(set(slugs)) == len(slugs)
