"""``normfree.measure``: against float64 eager attentions, whatever the texts come as; and what it leaves alone."""

import re
from html.parser import HTMLParser
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from peft import LoraConfig, get_peft_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
)

import normfree
from normfree.errors import InputError
from normfree.training import load_pretrained
from tests.data.made_up import document
from tests.measured_models import TOKENS, VOCABULARY, build, tokenizer_of

TEXTS = ["def f(x):\n    return x", "x", "import numpy as np\n\nvalues = [1, 2, 3]\n", "for value in values:"]
MODELS = ("gpt2", "llama", "normfree")
WITH_OTHER_MASKS = ("bidirectional", "windows", "two kinds")


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_of()


@pytest.fixture
def folder(tokenizer, tmp_path):
    build("gpt2").save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


@torch.no_grad()
def reference(model, sequences):
    """Entropy, bound and sink share [n_layer, n_head]: each sequence alone, eager, in float64."""
    model = model.double().eval()
    model.set_attn_implementation("eager")
    sums, n = np.zeros(()), 0
    for tokens in sequences:
        weights = model(input_ids=torch.as_tensor(tokens)[None], output_attentions=True).attentions
        p = np.stack([each[0].numpy() for each in weights])
        entropy = -np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0)), 0.0).sum((-1, -2))
        bound = np.full_like(entropy, np.log(np.arange(1, len(tokens) + 1)).sum())
        sums, n = sums + np.stack([entropy, bound, p[..., 0].sum(-1)]), n + len(tokens)
    return sums / n


def as_grid(measurement, column):
    return measurement.heads.pivot(index="layer", columns="head", values=column).to_numpy()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_sequences_of_different_lengths_against_float64(name, batch_size):
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randint(0, VOCABULARY, (n,), generator=generator) for n in (20, 3, 7, 1, 20, 11, 2)]
    measured = normfree.measure(build(name), [row.tolist() for row in sequences], batch_size=batch_size)
    assert (measured.n_sequences, measured.n_tokens, measured.sequence_length) == (7, 64, 20)
    for column, expected in zip(
        ("entropy_nats", "uniform_nats", "sink_share"), reference(build(name), sequences), strict=True
    ):
        np.testing.assert_allclose(as_grid(measured, column), expected, rtol=0, atol=3e-5, err_msg=column)
    np.testing.assert_allclose(measured.layers["mean_nats"], reference(build(name), sequences)[0].mean(1), atol=3e-5)


@pytest.mark.parametrize("name", WITH_OTHER_MASKS)
def test_padding_never_counts_under_other_masks(name):
    sequences = [list(range(3, 20)), [21, 22, 23], [5], [40, 41, 42, 43, 44, 45, 46]]
    measured = normfree.measure(build(name), sequences)
    assert measured.unreadable == {}
    entropy, _, sink = reference(build(name), sequences)
    np.testing.assert_allclose(as_grid(measured, "entropy_nats"), entropy, atol=3e-5)
    np.testing.assert_allclose(as_grid(measured, "sink_share"), sink, atol=3e-5)


class IgnoresTheMask(torch.nn.Module):
    """A model whose padding the probe cannot tell from tokens."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask=None):
        return self.model(input_ids=input_ids)


class WithoutMask(IgnoresTheMask):
    def forward(self, input_ids):  # type: ignore[override]
        return self.model(input_ids=input_ids)


@pytest.mark.parametrize("wrapper", [IgnoresTheMask, WithoutMask])
def test_padding_never_counts_where_a_model_ignores_the_mask(wrapper):
    sequences = [list(range(5, 25)), [1, 2, 3], [4, 5, 6], [7]]
    measured = normfree.measure(wrapper(build("gpt2")), sequences)
    np.testing.assert_allclose(as_grid(measured, "entropy_nats"), reference(build("gpt2"), sequences)[0], atol=3e-5)


def same(a, b):
    pd.testing.assert_frame_equal(a.heads, b.heads)
    pd.testing.assert_frame_equal(a.layers, b.layers)
    assert (a.n_sequences, a.n_tokens) == (b.n_sequences, b.n_tokens)


def test_strings_and_their_tokens_agree_in_every_form(tokenizer):
    model = build("gpt2")
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    padded = tokenizer(TEXTS, add_special_tokens=False)
    longest = max(map(len, rows))
    left_padded = {
        "input_ids": torch.tensor([[0] * (longest - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
    }
    expected = normfree.measure(model, TEXTS, tokenizer)
    table = datasets.Dataset.from_dict({"text": TEXTS, "name": ["a", "b", "c", "d"]})
    for texts in (tuple(TEXTS), ["", *TEXTS, ""], pd.Series(TEXTS), np.array(TEXTS), table, table["text"], iter(TEXTS)):
        same(normfree.measure(model, texts, tokenizer), expected)
    tokens = datasets.Dataset.from_dict({"input_ids": rows, "text": TEXTS})
    for texts in (rows, padded, left_padded, tokens, tokens["input_ids"], [torch.tensor(row) for row in rows]):
        same(normfree.measure(model, texts), expected)
    one = normfree.measure(model, TEXTS[0], tokenizer)
    for texts in (rows[0], torch.tensor(rows[0]), torch.tensor(rows[:1]), np.array(rows[0], dtype=np.int32)):
        same(normfree.measure(model, texts), one)


def test_long_texts_are_cut_and_each_part_begins_as_told(tokenizer):
    model, text = build("gpt2"), document(3)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    cut = [[0, *ids[start : start + 15]] for start in range(0, len(ids), 15)]
    measured = normfree.measure(model, text, tokenizer, bos=True, sequence_length=16)
    same(measured, normfree.measure(model, cut))
    assert measured.beginning.token_ids == (0,)
    by_default = normfree.measure(model, text, tokenizer)
    assert by_default.sequence_length == 64  # the model's positions
    assert by_default.beginning.token_ids == ()


def test_names_folders_and_models_from_folders_find_their_tokenizer(folder, tokenizer):
    expected = normfree.measure(build("gpt2"), TEXTS, tokenizer)
    loaded = GPT2LMHeadModel.from_pretrained(folder)
    for model in (folder, str(folder), load_pretrained(str(folder)), loaded):
        same(normfree.measure(model, TEXTS), expected)
    same(normfree.measure(build("gpt2"), TEXTS, folder), expected)
    assert normfree.measure(loaded, TEXTS).name == "gpt2"


def test_command_and_library_agree(folder, corpus_folder, normfree_command, tmp_path):
    arguments = ("--corpus", f"directory:{corpus_folder}", "--sequence-length", 12, "--sequences", 5)
    code, _, err = normfree_command("entropy", folder, *arguments, "--out", tmp_path / "out")
    assert code == 0, err
    from normfree.interpret import token_sequences

    loaded = load_pretrained(str(folder))
    tokens = token_sequences(
        loaded,
        corpus=f"directory:{corpus_folder}",
        tokenizer=None,
        sequence_length=12,
        n_sequences=5,
        cache_dir=tmp_path / "cache",
    ).tokens
    written = normfree.measure(loaded, tokens).to_csv(tmp_path / "library")
    assert [path.name for path in written] == ["heads.csv", "layers.csv"]
    for path in written:
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


@pytest.fixture
def normfree_command(request):
    return request.getfixturevalue("normfree")


def test_the_model_and_random_numbers_are_left_as_they_were():
    model = build("llama").train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    model(input_ids=torch.arange(6)[None], labels=torch.arange(6)[None]).loss.backward()
    gradients = [each.grad.clone() for each in model.parameters()]
    state = torch.get_rng_state()
    measured = normfree.measure(model, [[1, 2, 3, 4], [5, 6]])
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(a, b.grad) for a, b in zip(gradients, model.parameters(), strict=True))
    assert model.lm_head.weight.requires_grad
    same(normfree.measure(model.eval(), [[1, 2, 3, 4], [5, 6]]), measured)


def test_dropout_of_a_training_model_is_not_measured():
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, embd_pdrop=0.9, **TOKENS))
    same(normfree.measure(model.train(), [[1, 2, 3]]), normfree.measure(model.eval(), [[1, 2, 3]]))


def test_modes_come_back_after_an_error():
    model = build("gpt2").train()
    model.transformer.h[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        normfree.measure(model, [[1, 2]])
    assert all(module.training for module in model.modules())


@pytest.mark.filterwarnings("ignore:Using `torch.compile", "ignore:`is_gradient_checkpointing`")
def test_wrapped_and_compiled_models():
    expected = normfree.measure(build("gpt2"), [[1, 2, 3, 4], [5, 6]])
    adapted = get_peft_model(build("gpt2"), LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    compiled: Any = torch.compile(build("gpt2"))
    for model in (adapted, compiled):
        grid = as_grid(normfree.measure(model, [[1, 2, 3, 4], [5, 6]]), "entropy_nats")
        np.testing.assert_allclose(grid, as_grid(expected, "entropy_nats"), atol=1e-6)


class Checker(HTMLParser):
    """Counts what is opened and not closed."""

    VOID = ("img", "br", "hr")

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parsed(page):
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    return checker


def test_what_a_notebook_shows_is_a_heatmap_and_a_table_with_names_escaped():
    measured = normfree.measure(build("llama"), [[1, 2, 3, 4]], name="<script>alert(1)</script>&")
    page = parsed(measured._repr_html_())
    pictures = [attributes["src"] for tag, attributes in page.seen if tag == "img"]
    assert len(pictures) == 1
    assert pictures[0].startswith("data:image/png;base64,iVBOR")
    assert not any(tag == "script" for tag, _ in page.seen)
    assert "<script>alert(1)</script>&" in "".join(page.text)
    assert sum(tag == "tr" for tag, _ in page.seen) == 1 + 3
    assert isinstance(measured.plot(), Figure)
    assert re.fullmatch(
        r"Measurement\(.*: layers: 3, heads in each: 4; sequences: 1, tokens: 4; mean entropy .* sink share .* %\)",
        repr(measured),
    )


def test_a_deep_model_has_a_short_table():
    config = GPT2Config(n_layer=30, n_head=1, n_embd=4, **TOKENS)
    page = parsed(normfree.measure(GPT2LMHeadModel(config), [[1, 2, 3]])._repr_html_())
    assert sum(tag == "tr" for tag, _ in page.seen) == 1 + 12 + 1


def test_head_nan_is_said():
    model = build("gpt2")
    with torch.no_grad():
        model.get_parameter("transformer.h.1.attn.c_attn.weight")[0, 0] = torch.nan
    measured = normfree.measure(model, [[1, 2, 3]])
    assert "heads with NaN: 1" in repr(measured)
    assert "mean entropy nan" in repr(measured)
    assert "NaN" in measured._repr_html_()


def test_heads_in_one_file(tmp_path):
    measured = normfree.measure(build("gpt2"), [[1, 2, 3]])
    assert measured.to_csv(tmp_path / "deep" / "h.csv") == [tmp_path / "deep" / "h.csv"]
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "deep" / "h.csv"), measured.heads, atol=1e-12)


def test_two_models_in_one_figure():
    both = [normfree.measure(build("gpt2"), [[1, 2, 3]], name=name).head_entropy for name in ("a", "b")]
    figure = normfree.plot.headwise_entropy_heatmaps(pd.concat(both))
    assert [axes.get_title() for axes in figure.axes if axes.get_title()] == ["a", "b"]


BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "needs a tokenizer": ("text", {}, "strings need a tokenizer; give the model's with tokenizer="),
    "no text": ([], {}, "the texts hold no token"),
    "only empty rows": ([[], []], {}, "the texts hold no token"),
    "bytes": (b"text", {}, "cannot measure on a bytes"),
    "number": (3, {}, "cannot measure on a int"),
    "floats": (torch.rand(2, 3), {}, "token ids have to be whole numbers"),
    "bools": (torch.ones(2, 3, dtype=torch.bool), {}, "token ids have to be whole numbers"),
    "nested": (torch.zeros(1, 2, 3, dtype=torch.int64), {}, "token ids have to be whole numbers"),
    "mixed": ([[1, 2], "text"], {}, "item 1 of the texts is a str"),
    "None among rows": ([[1, 2], None], {}, "item 1 of the texts is a NoneType"),
    "negative": ([[1, 2], [3, -100]], {}, "sequence 1 has token -100"),
    "too large": ([[1, VOCABULARY]], {}, f"sequence 0 has token {VOCABULARY}, the vocabulary of .* is 0 to 299"),
    "too long": ([[1] * 65], {}, "sequence 0 has 65 tokens, more than the 64 positions"),
    "bos of tokens": ([[1, 2]], {"bos": True}, "token ids are measured as they are; leave out bos"),
    "length of tokens": ([[1, 2]], {"sequence_length": 8}, "leave out sequence_length"),
    "batch size": ([[1, 2]], {"batch_size": 0}, "batch_size has to be at least 1"),
    "mapping": ({"ids": [1]}, {}, "it needs input_ids"),
    "frame": (pd.DataFrame({"text": ["a"]}), {}, "give one of its columns"),
    "splits": (datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["a"]})}), {}, "one of them: train"),
    "no column": (datasets.Dataset.from_dict({"a": ["x"], "b": ["y"]}), {}, "no column 'text' among a, b"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(case):
    texts, options, message = BAD[case]
    with pytest.raises(InputError, match=message) as error:
        normfree.measure(build("gpt2"), texts, **options)
    assert "\n" not in str(error.value)


def test_bad_strings_tokenizers_and_models(tokenizer):
    model = build("gpt2")
    bad: tuple[tuple[Any, dict[str, Any], str], ...] = (
        (["a", None], {}, "text 1 is a NoneType"),
        ("", {}, "the texts hold no token"),
        ("abc", {"sequence_length": 1, "bos": True}, "sequence_length 1 leaves no room"),
        ("abc", {"sequence_length": 65}, "more than the 64 positions"),
    )
    for texts, options, message in bad:
        with pytest.raises(InputError, match=message):
            normfree.measure(model, texts, tokenizer, **options)
    with pytest.raises(InputError, match="a dict is no tokenizer"):
        normfree.measure(model, "text", {})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="a dict is no model"):
        normfree.measure({}, "text")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="contains no transformers model"):
        normfree.measure(torch.nn.Linear(2, 2), [[1]])
    large = tokenizer_of(320)
    with pytest.raises(InputError, match="token"):
        normfree.measure(model, "text", large)


def test_other_public_objects_say_what_they_are(folder):
    loaded = load_pretrained(str(folder))
    assert re.fullmatch(r"LoadedModel\('.*gpt2': GPT2LMHeadModel, [\d,]+ parameters on cpu\)", repr(loaded))
    with normfree.EntropyProbe(loaded.model) as probe:
        assert repr(probe) == "EntropyProbe(GPT2LMHeadModel: active, 0 queries in 0 layers)"
        loaded.model(torch.arange(6)[None])
    assert repr(probe) == "EntropyProbe(GPT2LMHeadModel: not active, 6 queries in 2 layers)"
