"""Packed equals expanded: logits' loss and the gradient of every parameter, for each accepted family."""

import random

import pytest
import torch

from tests.support.models import ATTENTION_FAMILIES, HYBRID_FAMILIES, tiny_model
from tests.support.tries import expanded_loss, gradients, largest_error, packed_loss, random_units
from tw_recipes import install

TOLERANCE = 1e-5
# transformers computes the chunks of a gated delta rule in float32 of their own, cut differently for each length.
HYBRID_TOLERANCE = 3e-4


@pytest.mark.parametrize("family", [*ATTENTION_FAMILIES, *HYBRID_FAMILIES])
def test_packed_loss_and_gradients_equal_expanded(family):
    units = random_units(random.Random(7), 6)
    model = tiny_model(family)
    expected_loss = expanded_loss(model, units)
    expected = gradients(model, expected_loss)
    install(model)
    loss = packed_loss(model, units)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=TOLERANCE)
    tolerance = HYBRID_TOLERANCE if family in HYBRID_FAMILIES else TOLERANCE
    assert largest_error(gradients(model, loss), expected) < tolerance


def test_sinks_get_a_gradient():
    model = install(tiny_model("gpt_oss_sinks"))
    found = gradients(model, packed_loss(model, random_units(random.Random(0), 4)))
    sinks = [gradient for name, gradient in found.items() if name.endswith("sinks")]
    assert len(sinks) == 2
    assert all(float(gradient.abs().min()) > 0 for gradient in sinks)


def test_a_unit_that_stands_twice_weighs_twice():
    units = random_units(random.Random(3), 3)
    units = [*units, units[1], units[1]]
    model = tiny_model("qwen3")
    expected_loss = expanded_loss(model, units)
    expected = gradients(model, expected_loss)
    loss = packed_loss(install(model), units)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=TOLERANCE)
    assert largest_error(gradients(model, loss), expected) < TOLERANCE


def test_window_is_measured_in_depth():
    """A window counted in packed rows would hide the context of a branch that comes late in the row."""
    units = [[[9, 10, 11], [20 + 5 * k, 21 + 5 * k, 22 + 5 * k]] for k in range(6)]
    model = tiny_model("mistral_window")
    expected = expanded_loss(model, units)
    assert packed_loss(install(model), units).item() == pytest.approx(expected.item(), rel=TOLERANCE)


@pytest.mark.filterwarnings("ignore:.*activation_checkpointing:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["qwen3", "gpt_oss_sinks"])
def test_activation_checkpointing_recomputes_the_same(family, reentrant):
    units = random_units(random.Random(5), 5)
    model = install(tiny_model(family))
    expected = gradients(model, packed_loss(model, units))
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert largest_error(gradients(model, packed_loss(model, units)), expected) < TOLERANCE


def test_layers_share_the_rows_of_the_carrier(monkeypatch):
    """One tensor object for all layers, so that a plan remembered on it is built once for a packed row."""
    import tw_recipes.attention as attention

    seen = []
    original = attention.trie_attention

    def spy(q, k, v, subtree_end, **options):
        seen.append((subtree_end, options["position_ids"]))
        return original(q, k, v, subtree_end, **options)

    model = install(tiny_model("llama"))
    monkeypatch.setattr(attention, "trie_attention", spy)
    packed_loss(model, random_units(random.Random(1), 3))
    assert len(seen) == 2
    assert seen[0][0] is seen[1][0]
    assert seen[0][1] is seen[1][1]


def test_compiles_without_a_graph_break():
    units = random_units(random.Random(2), 4)
    model = install(tiny_model("qwen3"))
    expected = packed_loss(model, units)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert packed_loss(compiled, units).item() == pytest.approx(expected.item(), rel=TOLERANCE)


def test_a_model_without_a_head():
    model = tiny_model("llama").model
    install(model)
    batch = {
        "input_ids": torch.tensor([[5, 6, 7]]),
        "position_ids": torch.tensor([[0, 1, 1]]),
        "subtree_end": torch.tensor([[3, 2, 3]], dtype=torch.int32),
    }
    packed = model(**batch, target_rows=torch.tensor([[2, 0, 2]])).last_hidden_state[0]
    alone = model(input_ids=torch.tensor([[5, 7]])).last_hidden_state[0]
    torch.testing.assert_close(packed, alone[[1, 0, 1]])
