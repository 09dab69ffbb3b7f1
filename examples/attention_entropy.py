"""See the attention entropy of every head of a model in five lines.

    python examples/attention_entropy.py                        # a tiny random model: no download
    python examples/attention_entropy.py gpt2 some_text.txt     # a model of the Hub on your own text

Rows are layers, columns heads. An entropy is a share of what uniform attention would have: 0 is a head that looks
at one token, 1 a head that looks at all alike.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from normfree import EntropyProbe
from normfree.interpret import tokenizer_of
from normfree.training import load_pretrained

N_TOKEN = 256


def tiny_random_model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=4, n_head=6, n_embd=48, n_positions=N_TOKEN, vocab_size=256, bos_token_id=0, eos_token_id=0
    )
    # larger weights than a model starts with: heads of all kinds
    config.initializer_range = 0.35
    return GPT2LMHeadModel(config)


def main(arguments: list[str]) -> None:
    text = Path(arguments[1] if len(arguments) > 1 else __file__).read_text(encoding="utf-8")
    if arguments:
        measured = load_pretrained(arguments[0])
        model = measured.model
        input_ids = tokenizer_of(measured)(text, return_tensors="pt")["input_ids"].to(model.device)
    else:
        model = tiny_random_model()
        input_ids = torch.tensor([list(text.encode("utf-8"))])
    input_ids = input_ids[:, :N_TOKEN]

    # the five lines
    with EntropyProbe(model.eval()) as probe, torch.no_grad():
        model(input_ids)
    entropy, share = probe.per_head(), probe.normalized()
    for layer, row in enumerate(share.tolist()):
        print(f"layer {layer:2d}  " + " ".join(f"{head:.2f}" for head in row))

    print(f"mean entropy {entropy.mean():.3f} nats over {input_ids.shape[1]} tokens")
    print(f"attention paid to the first token: {100 * probe.sink_share().mean():.1f} %")
    for name, reason in probe.unreadable.items():
        print(f"not read: {name}: {reason}")


if __name__ == "__main__":
    main(sys.argv[1:])
