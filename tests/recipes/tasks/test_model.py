"""The random models of the tasks: seeded, and with labels composed of their characters where asked."""

import torch

from tw_recipes.tasks import get_task
from tw_recipes.tasks.model import tiny_model

TOKENIZER = get_task("multiply").tokenizer()


def test_composed_labels_are_sums_over_their_characters_as_large_as_other_rows():
    before = torch.random.get_rng_state()
    plain, composed = tiny_model(TOKENIZER, seed=3), tiny_model(TOKENIZER, seed=3, composed=True)
    assert torch.equal(torch.random.get_rng_state(), before)
    for name in ("embed_tokens", "lm_head"):
        was, weight = (m.get_parameter(f"{'model.' if name[0] == 'e' else ''}{name}.weight") for m in (plain, composed))

        def row(token, weight=weight):
            return weight[TOKENIZER.convert_tokens_to_ids(token)]

        # What leads from place Q to place R is the same for all numbers and rows, and so for each other part.
        torch.testing.assert_close(row("7aR") - row("7aQ"), row("6xR") - row("6xQ"))
        torch.testing.assert_close(row("7aB") - row("6aB"), row("7bC") - row("6bC"))
        assert not torch.allclose(row("7aB") - row("7bB"), row("7aB") - row("7aC"))
        torch.testing.assert_close(weight.std(), was.std(), rtol=0.1, atol=0)
        for token in ("7", "<Parallel>", TOKENIZER.eos_token):
            assert torch.equal(row(token), row(token, was))
    rest = [name for name, _ in plain.named_parameters() if "embed_tokens" not in name and "lm_head" not in name]
    assert rest
    assert all(torch.equal(plain.get_parameter(n), composed.get_parameter(n)) for n in rest)


def test_the_seed_decides_composed_weights():
    one, same, other = (tiny_model(TOKENIZER, seed=seed, composed=True).lm_head.weight for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
