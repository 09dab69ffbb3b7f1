"""A step under torch.compile is named as such, with what to do; the probe does not break it."""

from typing import Any

import pytest
import torch

from normfree.errors import InputError
from normfree.probes import EntropyProbe, EntropyRecorder

from .small_models import batch_of, build
from .test_own_attention import build as build_own

STANCE = r'torch\.compiler\.set_stance\("force_eager"\)'


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model, what):
    """How the model is called, and the layers that are compiled."""
    layers = {f"model.layers.{layer}.self_attn" for layer in range(2)}
    if what == "model":
        return torch.compile(model, backend="eager"), layers
    if what == "function":
        return torch.compile(lambda **batch: model(**batch), backend="eager"), layers
    if what == "in place":
        model.compile(backend="eager")
    elif what == "layer":
        model.model.layers[1].compile(backend="eager")
        layers = {"model.layers.1.self_attn"}
    elif what == "forward":
        attention = model.model.layers[0].self_attn
        attention.forward = torch.compile(attention.forward, backend="eager")
        layers = {"model.layers.0.self_attn"}
    return model, layers


@pytest.mark.parametrize("what", ["model", "in place", "function", "layer", "forward"])
def test_compiled_layers_are_named_and_read_where_the_compiler_stands_aside(what):
    model, batch = build("llama"), batch_of("none")
    with torch.no_grad():
        bare = model(**batch).logits
    run, layers = compiled(model, what)
    with EntropyProbe(model) as probe, torch.no_grad():
        torch.testing.assert_close(run(**batch).logits, bare)
    assert set(probe.unreadable) == layers
    assert all("torch.compile" in reason and "force_eager" in reason for reason in probe.unreadable.values())
    if len(layers) == 2:
        with pytest.raises(InputError, match=STANCE):
            probe.per_head()
    probe.reset()
    with probe, torch.no_grad(), torch.compiler.set_stance("force_eager"):
        run(**batch)
    assert probe.unreadable == {}


def test_own_softmaxes_that_are_compiled():
    model, batch = build_own("gpt_neo"), batch_of("none")
    run: Any = torch.compile(model, backend="eager")
    with EntropyProbe(run) as probe, torch.no_grad():
        run(**batch)
    assert len(probe.unreadable) == 2
    assert all("torch.compile" in reason for reason in probe.unreadable.values())


def test_a_recorder_says_the_same():
    model = build("llama")
    run = torch.compile(model, backend="eager")
    with EntropyRecorder(model) as recorded:
        run(**batch_of("none"))
    with pytest.raises(InputError, match=STANCE):
        recorded.per_head()
