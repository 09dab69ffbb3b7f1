"""GGUF files: header, tokenizer, and a check that transformers' reader took every key and every tensor.

transformers ignores keys and tensors that it does not know and uses its own defaults, which silently makes another
model. Here such a file is refused. Layout: "GGUF" specification, versions 2 and 3.
"""

from __future__ import annotations

import re
import struct
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from normfree.errors import InputError

SUFFIX = ".gguf"
MAGIC = b"GGUF"
VERSIONS = (2, 3)
ARCHITECTURES = ("llama", "gemma2", "gemma3", "qwen2", "qwen3")
"""Those whose tensors, permuted or offset in the file, were compared with the original model after reading."""
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
SAME_NUMBER = 1e-6
"""Largest relative difference of a metadata value, often stored as float32, from the configuration's."""
SPELLED = {
    "context_length": ("max_position_embeddings",),
    "embedding_length": ("hidden_size",),
    "block_count": ("num_hidden_layers",),
    "feed_forward_length": ("intermediate_size",),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.key_length": ("head_dim",),
    "attention.value_length": ("head_dim",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon"),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "vocab_size": ("vocab_size",),
}
"""Keys of the file, without its architecture, and the names that configurations have for them."""
WITHOUT_EFFECT = {"attention.causal": True, "rope.scaling.type": "none"}
"""Keys without effect at this value."""


@dataclass(frozen=True)
class GgufFile:
    """The header of a GGUF file.

    metadata: every key and its value; of arrays, only the number of entries.
    tensors: every tensor's name, and the type it is stored in, such as ``Q4_1`` or ``F32``.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, str]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", "not named"))

    @property
    def quantization(self) -> str | None:
        """The types of quantized weights, most frequent first, such as ``Q4_1 and Q8_0, dequantized to float32``.

        None without quantized weights.
        """
        types = Counter(each for each in self.tensors.values() if each not in ("F64", "F32", "F16", "BF16"))
        if not types:
            return None
        *first, last = [name for name, _ in types.most_common()]
        return f"{', '.join(first)}{' and ' if first else ''}{last}, dequantized to float32"


def is_gguf(source: str) -> bool:
    """True for a name that ends in ``.gguf`` and for a file that begins with GGUF's magic bytes."""
    if source.lower().endswith(SUFFIX):
        return True
    if not Path(source).is_file():
        return False
    with Path(source).open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def open_gguf(path: Path) -> GgufFile:
    """The header of a file that can be read completely.

    Raises:
        InputError: there is no file, the gguf package is missing, the file is not GGUF, cut short, of an unknown
            version, big-endian or one of several parts, or its architecture is none of ``ARCHITECTURES``.
    """
    if not path.is_file():
        raise InputError(f"there is no file {path}; give a .gguf file, a model folder or a Hub id")
    try:
        import gguf
    except ImportError as error:
        raise InputError(f"GGUF needs gguf ({error}); install it with: pip install 'normfree[gguf]'") from error
    try:
        with path.open("rb") as stream:
            file = _Header(path, stream).read(gguf)
    except (EOFError, UnicodeDecodeError, struct.error, OverflowError, MemoryError) as error:
        raise InputError(f"{path} is cut short or damaged ({error}); copy or download it again") from error
    parts = file.metadata.get("split.count", 1)
    if parts not in (0, 1) or re.search(r"-\d{5}-of-\d{5}\.gguf$", path.name):
        raise InputError(
            f"{path} is one part of several; join them with llama-gguf-split --merge, and give the whole file"
        )
    kind = file.metadata.get("general.type", "model")
    if kind != "model":
        raise InputError(f"{path} holds no model but a GGUF file of type {kind!r}; give the file of the model itself")
    if file.architecture not in ARCHITECTURES:
        raise InputError(
            f"{path} is of architecture {file.architecture!r}; of GGUF files, {', '.join(ARCHITECTURES)} are read; "
            "give the model's safetensors folder"
        )
    return file


def load_gguf_tokenizer(file: GgufFile) -> PreTrainedTokenizerBase:
    """The tokenizer in the file.

    Raises:
        InputError: there is none, or transformers' reader would split text differently from the model.
    """
    advice = "give the model's tokenizer with --tokenizer"
    kind, cut = file.metadata.get("tokenizer.ggml.model"), str(file.metadata.get("tokenizer.ggml.pre"))
    if kind is None:
        raise InputError(f"{file.path} holds no tokenizer; {advice}")
    if kind == "gpt2" and cut not in {*_WORDS, *_transformers_words()}:
        raise InputError(
            f"{file.path} cuts text into words like {cut!r}, which transformers' reader does not; {advice}"
        )
    try:
        # An empty folder: a tokenizer.json next to the file would be read in place of what is in the file.
        with gguf_reader(), tempfile.TemporaryDirectory() as folder:
            tokenizer = AutoTokenizer.from_pretrained(
                folder, gguf_file=str(file.path.resolve()), trust_remote_code=False, local_files_only=True
            )
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"cannot load the tokenizer in {file.path} ({reason}); {advice}") from error
    if _WORDS.get(cut) is not None:
        tokenizer.backend_tokenizer.pre_tokenizer = _WORDS[cut]
    return tokenizer


_WORDS = {
    "gpt-2": None,
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
}
"""Pre-tokenizers of byte-level tokenizers; None: GPT-2's, which transformers' reader takes for unknown names."""


def _transformers_words() -> Collection[str]:
    """The pre-tokenizers that transformers' reader knows, in versions with such a table."""
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:
        return ()
    return GGUF_PRE_TOKENIZER_SPLITS


@contextmanager
def gguf_reader() -> Iterator[None]:
    """Hides the progress bar of transformers' reader, which has no switch."""
    with redirect_stderr(StringIO()):
        yield


def check_gguf_model(file: GgufFile, model: PreTrainedModel) -> None:
    """Checks that ``model``, built from ``file``, has every key and every tensor of the file.

    Raises:
        InputError: transformers ignored a tensor or a key, or read another value.
    """
    advice = "give the model's safetensors folder"
    left_out = sorted(set(file.tensors) - _readable_tensors(file, model))
    if left_out:
        raise InputError(
            f"{file.path}: transformers' reader leaves out {len(left_out)} of its tensors ({', '.join(left_out[:3])} "
            f"first), and without them it is another model; {advice}"
        )
    config = model.config.get_text_config()
    for key, value in file.metadata.items():
        if not key.startswith(f"{file.architecture}."):
            continue
        name = key.removeprefix(f"{file.architecture}.")
        if not _holds(name, value, config):
            raise InputError(f"{file.path}: {key} is {value!r}, which transformers' reader does not take up; {advice}")
    n_head, n_embd = config.num_attention_heads, config.hidden_size
    if file.architecture.startswith("gemma") and (config.num_hidden_layers, n_embd) in _SCALED_BY_WIDTH:
        raise InputError(
            f"{file.path}: the scores of this Gemma are scaled by 1/sqrt({n_embd // n_head}), which the file does not "
            f"say and transformers' reader does not know; {advice}"
        )


_SCALED_BY_WIDTH = {(46, 4608), (62, 5376)}
"""Layers and width of Gemma 2 27B and Gemma 3 27B: their query_pre_attn_scalar is hidden_size / num_attention_heads."""


def _holds(name: str, value: Any, config: PreTrainedConfig) -> bool:
    """True if ``config`` has ``value`` for the file's key ``name``."""
    if name in WITHOUT_EFFECT:
        return bool(value == WITHOUT_EFFECT[name])
    if name == "rope.freq_base":
        return _same(value, _rope(config).get("rope_theta"))
    if name == "rope.dimension_count":
        return _same(value, _head_dim(config) * _rope(config).get("partial_rotary_factor", 1.0))
    if name in ("attention.key_length", "attention.value_length"):
        return _same(value, _head_dim(config))
    return any(_same(value, getattr(config, spelled, None)) for spelled in SPELLED.get(name, ()))


def _rope(config: PreTrainedConfig) -> dict[str, Any]:
    """The rotary parameters; where kinds of layers differ, those of full attention."""
    parameters: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    return parameters.get("full_attention", parameters)


def _head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _same(value: Any, other: Any) -> bool:
    if isinstance(value, (bool, str)) or other is None or isinstance(other, (bool, str)):
        return bool(value == other)
    return abs(value - other) <= SAME_NUMBER * abs(other)


def _readable_tensors(file: GgufFile, model: PreTrainedModel) -> set[str]:
    """The GGUF names of the model's parameters."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    kind = next(kind for kind, name in MODEL_ARCH_NAMES.items() if name == file.architecture)
    names = get_tensor_name_map(kind, model.config.get_text_config().num_hidden_layers)
    found = set()
    for parameter in model.state_dict():
        name, _, suffix = parameter.rpartition(".")
        found.add(f"{names.get_name(name)}.{suffix}")
    return found


class _Header:
    """Reads the header.

    Raises:
        EOFError: the file ends too early.
    """

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self.path = path
        self.stream = stream
        self.size = path.stat().st_size

    def read(self, gguf: Any) -> GgufFile:
        if self.stream.read(4) != MAGIC:
            raise InputError(
                f"{self.path} is no GGUF file (it does not begin with {MAGIC.decode()}); give another file"
            )
        version = self.number("<I")
        if version not in VERSIONS:
            reason = "big-endian" if version & 0xFFFF == 0 else f"GGUF version {version}"
            raise InputError(f"{self.path} is {reason}; little-endian versions 2 and 3 are read; convert it again")
        n_tensor, n_key = self.number("<Q"), self.number("<Q")
        metadata = {self.string(): self.value(self.number("<I")) for _ in range(n_key)}
        tensors, ends = {}, [0]
        for _ in range(n_tensor):
            name = self.string()
            shape = [self.number("<Q") for _ in range(self.number("<I"))]
            code, offset = self.number("<I"), self.number("<Q")
            try:
                kind = gguf.GGMLQuantizationType(code)
            except ValueError as error:
                raise InputError(f"{self.path}: tensor {name} is of unknown type {code}; update gguf") from error
            per_block, n_bytes = gguf.GGML_QUANT_SIZES[kind]
            ends.append(offset + prod(shape) // per_block * n_bytes)
            tensors[name] = str(kind.name)
        alignment = metadata.get("general.alignment", 32)
        begin = -(-self.stream.tell() // alignment) * alignment
        if begin + max(ends) > self.size:
            raise EOFError(f"its tensors need {begin + max(ends):,} bytes, it has {self.size:,}")
        return GgufFile(self.path, metadata, tensors)

    def bytes(self, n: int) -> bytes:
        if self.stream.tell() + n > self.size:
            raise EOFError("it ends within its header")
        return self.stream.read(n)

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.bytes(struct.calcsize(form)))[0]

    def string(self) -> str:
        return self.bytes(self.number("<Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise InputError(f"{self.path}: metadata of unknown type {kind}; it is damaged or of a newer version")
        of, n = self.number("<I"), self.number("<Q")
        if of in SCALARS:
            self.bytes(n * struct.calcsize(SCALARS[of]))
        else:
            for _ in range(n):
                self.value(of)
        return n
