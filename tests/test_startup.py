"""What importing normfree and asking its command line for help bring in, what they cost, and that nothing is lost."""

from __future__ import annotations

import ast
import json
import pkgutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import normfree
from normfree import NormfreeConfig, NormfreeForCausalLM, model_type, registration
from normfree.cli import COMMANDS

HEAVY = {"torch", "transformers", "numpy", "pandas", "scipy", "matplotlib", "datasets", "huggingface_hub"}
OPTIONAL = {"torchao", "peft", "triton", "gguf", "submitit", "ray", "trl", "lightning", "pytorch_lightning", "trackio"}
ADDED = {"normfree", "normfree.quiet", "normfree.registration", "normfree.model_type"}
"""The modules that `import normfree` adds to transformers."""
AUTO_CLASSES = "from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer"
MODULES = "import json, sys; modules = sorted(sys.modules)"
QUESTIONS = """
import pickle
from transformers.utils.logging import disable_progress_bar
disable_progress_bar()
folder = sys.argv[1]
listed = "normfree" in CONFIG_MAPPING and list(CONFIG_MAPPING).count("normfree") == 1
{first}
config = AutoConfig.from_pretrained(folder)
from normfree import NormfreeConfig
answers = dict(
    listed=listed and list(CONFIG_MAPPING).count("normfree") == 1,
    is_the_class=type(config) is NormfreeConfig is CONFIG_MAPPING["normfree"],
    for_model=AutoConfig.for_model("normfree", n_layer=3).n_layer,
    base=type(AutoModel.from_pretrained(folder)).__name__,
    causal=type(AutoModelForCausalLM.from_pretrained(folder)).__name__,
    from_config=type(AutoModelForCausalLM.from_config(NormfreeConfig(**config.to_dict()))).__name__,
    tokens=AutoTokenizer.from_pretrained(folder)("a b").input_ids,
    other=AutoConfig.for_model("gpt2").model_type,
    pickled_config=type(pickle.loads(pickle.dumps(config))).__name__,
    pickled_mapping=pickle.loads(pickle.dumps(CONFIG_MAPPING))["normfree"].__name__,
)
print(json.dumps([modules, answers]))
"""


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def imported_at_once(node: ast.AST) -> Iterator[str]:
    """Modules, and names from modules, that are imported with a module: not those in functions or for type checkers."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.Import):
            yield from (name.name for name in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield str(child.module)
            yield from (f"{child.module}.{name.name}" for name in child.names)
        yield from imported_at_once(child)


def printed(code: str, *arguments: object) -> Any:
    """The JSON that ``code`` prints; it may write nothing else, warnings included."""
    done = run("-c", code, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model of one layer, with a tokenizer of three words."""
    path = tmp_path_factory.mktemp("model")
    config = NormfreeConfig(vocab_size=3, n_layer=1, n_head=2, n_embd=8, n_positions=8)
    NormfreeForCausalLM(config).save_pretrained(path)
    words = Tokenizer(WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def modules_of_transformers() -> set[str]:
    """What the auto classes import without normfree."""
    return set(printed(f"{AUTO_CLASSES}; {MODULES}; print(json.dumps(modules))"))


def test_importing_normfree_imports_only_the_standard_library() -> None:
    before, after = (
        printed(f"{first}; {MODULES}; print(json.dumps(modules))") for first in ("pass", "import normfree")
    )
    packages = {name.partition(".")[0] for name in set(after) - set(before)}
    assert packages - sys.stdlib_module_names == {"normfree"}


@pytest.mark.parametrize(
    ("imports", "first"),
    [
        (f"import normfree; {AUTO_CLASSES}", "AutoModelForCausalLM.from_pretrained(folder)"),
        (f"{AUTO_CLASSES}; import normfree", "AutoConfig.for_model('normfree', n_layer=1)"),
    ],
)
def test_auto_classes_know_the_models_in_either_order(
    imports: str, first: str, folder: Path, modules_of_transformers: set[str]
) -> None:
    modules, answers = printed(f"{imports}; {MODULES}\n{QUESTIONS.format(first=first)}", folder)
    added = set(modules) - modules_of_transformers
    assert {name for name in added if name.partition(".")[0] not in sys.stdlib_module_names} == ADDED
    assert answers == {
        "listed": True,
        "is_the_class": True,
        "for_model": 3,
        "base": "NormfreeModel",
        "causal": "NormfreeForCausalLM",
        "from_config": "NormfreeForCausalLM",
        "tokens": [0, 1],
        "other": "gpt2",
        "pickled_config": "NormfreeConfig",
        "pickled_mapping": "NormfreeConfig",
    }


def test_the_mapping_of_transformers_works_as_before() -> None:
    assert isinstance(CONFIG_MAPPING, model_type.ConfigMapping)
    with pytest.raises(KeyError):
        CONFIG_MAPPING["no such model"]
    with pytest.raises(ValueError, match=r"Unrecognized model identifier.*normfree"):
        AutoConfig.for_model("no such model")
    mapping: Any = AutoModelForCausalLM._model_mapping
    assert mapping[NormfreeConfig] is NormfreeForCausalLM


@pytest.mark.parametrize("is_registered", [False, True])
def test_the_mapping_lists_the_model_type_once(is_registered: bool) -> None:
    mapping = model_type.ConfigMapping({"gpt2": "GPT2Config"})
    if is_registered:
        mapping.register("normfree", NormfreeConfig)
    assert list(mapping) == mapping.keys() == ["gpt2", "normfree"]
    assert "normfree" in mapping
    assert "llama" not in mapping
    if is_registered:
        assert mapping.items() == [("gpt2", GPT2Config), ("normfree", NormfreeConfig)]
        assert mapping.values() == [GPT2Config, NormfreeConfig]


def test_a_second_installation_changes_nothing() -> None:
    finders, mapping = list(sys.meta_path), type(CONFIG_MAPPING)
    registration.install()
    assert sys.meta_path == finders
    assert type(CONFIG_MAPPING) is mapping


@pytest.mark.parametrize("name", [registration.CONFIGURATIONS, registration.QUANTIZERS])
def test_surrounded_modules_keep_their_loader(name: str) -> None:
    module = sys.modules[name]
    assert module.__spec__ is not None
    assert module.__loader__ is module.__spec__.loader
    assert type(module.__loader__).__module__.startswith("_frozen_importlib")
    found = registration._Finder().find_spec(name, sys.modules[name.rpartition(".")[0]].__path__)
    assert found is not None
    loader: Any = found.loader
    assert loader.get_source(name)


def test_no_module_imports_an_optional_library_before_it_is_needed() -> None:
    source = Path(normfree.__file__).parent
    imports = {
        ".".join(("normfree", *path.relative_to(source).with_suffix("").parts)).removesuffix(".__init__"): set(
            imported_at_once(ast.parse(path.read_text(encoding="utf-8")))
        )
        for path in source.rglob("*.py")
    }
    needing = {name for name, names in imports.items() if {each.partition(".")[0] for each in names} & OPTIONAL}
    # Modules named after their library, and nothing that imports them at once.
    assert {name.rpartition(".")[2] for name in needing} == {
        "triton_launch",
        "triton_softmax",
        "triton_decode",
        "triton_decode_kernels",
        "lightning",
    }
    assert {name for name, names in imports.items() if names & needing} <= needing


def test_every_public_name_is_there_for_people_and_type_checkers() -> None:
    tree = ast.parse(Path(normfree.__file__).read_text(encoding="utf-8"))
    (checked,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    imports = {
        name.asname: (name.name, node.module)
        for node in checked.body
        if isinstance(node, ast.ImportFrom)
        for name in node.names
    }
    rooms = {name: (name, "normfree" if name == room else f"normfree.{room}") for name, room in normfree._ROOMS.items()}
    assert imports == rooms, "a public name is a line of _ROOMS and `from ROOM import NAME as NAME` for type checkers"
    assert list(rooms) == sorted(rooms)
    assert set(normfree.__all__) == set(rooms) <= set(dir(normfree))
    for name in normfree.__all__:
        assert getattr(normfree, name) is vars(normfree)[name]


def test_no_public_name_is_hidden_by_a_module() -> None:
    # Importing normfree.NAME would put the module in the place of the name.
    modules = {module.name for module in pkgutil.iter_modules(normfree.__path__)}
    assert not modules & {name for name, room in normfree._ROOMS.items() if name != room}


def test_rooms_are_attributes_and_other_names_are_errors() -> None:
    assert printed("import json, normfree; print(json.dumps(normfree.files.__name__))") == "normfree.files"
    with pytest.raises(AttributeError, match="module 'normfree' has no attribute 'no_such_name'"):
        _ = normfree.no_such_name  # type: ignore[attr-defined]
    assert not hasattr(normfree, "__wrapped__")


def test_help_imports_no_heavy_library() -> None:
    commands = [[command.__name__.replace("_", "-"), "--help"] for command in COMMANDS]
    asked = [[], ["--help"], ["-h"], ["--version"], ["bench"], ["bench", "-h"], ["bench", "entropy", "-h"], *commands]
    code = f"""
import contextlib, io, json, sys
from normfree.cli import app
codes = []
for arguments in {asked!r}:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = app(arguments, prog_name="normfree", standalone_mode=False)
    codes.append([code or 0, len(out.getvalue().splitlines()) > 5])
print(json.dumps([codes, sorted(sys.modules)]))
"""
    codes, modules = printed(code)
    expected = {(): [0, True], ("bench",): [0, True], ("--version",): [0, False]}
    assert codes == [expected.get(tuple(arguments), [0, True]) for arguments in asked]
    assert not {name.partition(".")[0] for name in modules} & (HEAVY | OPTIONAL)


def test_the_bare_command_prints_its_help() -> None:
    done = run("-m", "normfree")
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout.startswith("Usage: normfree [OPTIONS] COMMAND [ARGS]...\n")
    assert "\n  study " in done.stdout


def test_the_shell_completes_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_NORMFREE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "normfree ent")
    monkeypatch.setenv("COMP_CWORD", "1")
    assert run("-m", "normfree").stdout.split() == ["entropy"]


def test_what_imports_make_is_traversed_neither_then_nor_at_exit() -> None:
    code = """
import atexit, gc, json, sys
atexit.register(lambda: print(json.dumps([gc.get_stats()[2]["collections"], gc.get_freeze_count() > 100_000])))
from normfree.cli import main
sys.argv = ["normfree", "--version"]
try:
    main()
except SystemExit:
    import normfree.runner.worker
"""
    done = run("-c", code)
    assert (done.returncode, done.stderr) == (0, "")
    full_collections, is_frozen = json.loads(done.stdout.splitlines()[-1])
    assert full_collections == 0
    assert is_frozen


def test_start_up_takes_a_fraction_of_importing_torch() -> None:
    commands = {
        "torch": ("-c", "import torch"),
        "normfree": ("-c", "import normfree"),
        "help": ("-m", "normfree", "--help"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(3):
        for name, command in commands.items():
            start = time.perf_counter()
            assert run(*command).returncode == 0
            seconds[name].append(time.perf_counter() - start)
    # Where `import torch` takes 1.3 s, as on an idle laptop: 0.3 s and 0.65 s.
    torch, package, help_ = (statistics.median(seconds[name]) for name in ("torch", "normfree", "help"))
    assert package < torch / 4
    assert help_ < torch / 2
