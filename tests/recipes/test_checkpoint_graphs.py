"""Checkpointing by graphs: the numbers of torch's checkpointing, whatever changes between two steps; what is refused.

On a CPU the steps run uncaptured; the cases marked gpu replay graphs.
"""

from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.support.grpo import make_trainer, train
from tests.support.models import tiny_model
from tw_core import ReasoningTrie
from tw_recipes import install
from tw_recipes.checkpoint_graphs import CheckpointGraphs, GraphError, padded_rows
from tw_recipes.support import decoder_layers

pytestmark = pytest.mark.filterwarnings("ignore:.*activation_checkpointing:FutureWarning")

FAMILIES = ["qwen3", "mistral_window", "gemma3"]


def test_sizes_are_eight_to_an_octave():
    sizes = [padded_rows(rows) for rows in range(1, 20_000)]
    assert all(rows <= size < rows + max(128, rows / 8 + 1) for rows, size in enumerate(sizes, 1))
    assert sizes == sorted(sizes)
    assert [padded_rows(size) for size in sizes] == sizes
    assert len({size for size in sizes if 4096 < size <= 8192}) == 8
    assert padded_rows(2560) == 2560
    assert padded_rows(2561) == 2816


def packed(seed, rows=128, device="cpu"):
    """A trie of three sequences, padded to `rows`, and a gradient for each of its rows."""
    draw = torch.Generator().manual_seed(seed)
    common = torch.randint(3, 60, (20,), generator=draw).tolist()
    own = [torch.randint(3, 60, (20 + 5 * i,), generator=draw).tolist() for i in range(3)]
    trie = ReasoningTrie.from_sequences([common + tail for tail in own]).pack()
    real = trie.num_rows
    weights = torch.randn(1, rows, 1, generator=draw)
    weights[:, real:] = 0
    return trie.pad_to(rows).to(device), weights.to(device)


def ready(family="qwen3", lora=False, device="cpu", dtype=torch.float32):
    """A model that checkpoints by torch's function; the same weights each time."""
    torch.manual_seed(0)
    model = tiny_model(family).to(device=device, dtype=dtype)
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    install(model, probe=False)
    model.train()
    enable(model)
    return model


def graphed(model, rows=512):
    """Graphs of a model, installed."""
    graphs = CheckpointGraphs(model, rows)
    graphs.install()
    return graphs


def enable(model):
    """What `gradient_checkpointing_enable` does, whose name changes with the version of transformers."""
    for layer in decoder_layers(model):
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


def score(model, trie, weights):
    """A weighted sum of the hidden states, and those."""
    backbone = model.get_base_model().model if hasattr(model, "get_base_model") else model.model
    out = backbone(
        input_ids=trie.input_ids[None],
        position_ids=trie.position_ids[None],
        subtree_end=trie.subtree_end[None],
        use_cache=False,
    ).last_hidden_state
    return (out * weights.to(out.dtype)).sum(), out.detach()


def backward(model, trie, weights):
    """Backward of `score`; returns the hidden states."""
    total, out = score(model, trie, weights)
    total.backward()
    return out


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, wanted, **tolerance):
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], **tolerance, msg=lambda m, n=name: f"{n}: {m}")


def check_steps(family, lora, device, dtype, **tolerance):
    """Three steps with other rows, another size and other weights each time; gradients of two rows add up."""
    stock, ours = (ready(family, lora, device, dtype) for _ in range(2))
    graphs = graphed(ours)
    for seed, rows in ((0, 128), (1, 256), (2, 128)):
        batch = packed(seed, rows, device)
        for model in (stock, ours):
            model.zero_grad()
        torch.testing.assert_close(backward(ours, *batch), backward(stock, *batch), **tolerance)
        for model in (stock, ours):
            backward(model, *packed(seed + 10, 256, device))  # adds up
        assert_same(gradients(ours), gradients(stock), **tolerance)
        with torch.no_grad():
            for model in (stock, ours):
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.mul_(1.01)
    assert all(len(graphs._layers[layer]) == 2 for layer in decoder_layers(ours))
    return graphs, ours


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_checkpointing(family, lora):
    check_steps(family, lora, "cpu", torch.float32, atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_replays_are_those_of_checkpointing(family, lora):
    graphs, model = check_steps(family, lora, "cuda", torch.float32, atol=1e-4, rtol=1e-4)
    assert all(one._graphs is not None for layer in decoder_layers(model) for one in graphs._layers[layer].values())


@pytest.mark.gpu
def test_graphs_share_their_memory():
    model = ready(device="cuda")
    graphed(model)
    backward(model, *packed(0, 128, "cuda"))
    before = torch.cuda.memory_allocated()
    backward(model, *packed(1, 256, "cuda"))
    gradients_of_it = sum(parameter.nbytes for parameter in model.parameters())
    # Not 32 MiB of cuBLAS for every graph; what one stream of the eager kernels has may be among it.
    assert torch.cuda.memory_allocated() - before < 40 * 2**20 + gradients_of_it


@pytest.mark.gpu
def test_a_layer_that_waits_for_the_gpu_is_refused_and_leaves_nothing_in_capture():
    model = ready(device="cuda")
    graphed(model)
    mlp = decoder_layers(model)[0].mlp
    run = mlp.forward
    mlp.forward = lambda x: run(x) * x.sum().item() ** 0
    with pytest.raises(GraphError, match=r"cannot be replayed as CUDA graphs.*graph_rows=0"):
        backward(model, *packed(0, device="cuda"))
    assert 0 <= torch.rand(1, device="cuda").item() < 1


def test_two_forwards_before_their_backwards():
    stock, ours = ready(), ready()
    graphed(ours)
    for model in (stock, ours):
        total = sum(score(model, *packed(seed))[0] for seed in (0, 1))
        total.backward()
    assert_same(gradients(ours), gradients(stock), atol=1e-5, rtol=1e-5)


def test_other_rows_take_the_function_that_was_there():
    stock, ours = ready(), ready()
    graphs = graphed(ours, 256)
    for rows in (384, 200):  # too many; not one of the sizes
        batch = packed(0, rows)
        backward(stock, *batch)
        backward(ours, *batch)
    assert not graphs._layers
    assert_same(gradients(ours), gradients(stock), atol=0, rtol=0)


def test_graphs_are_made_anew_for_other_parameters_and_adapters():
    model = ready(lora=True)
    graphs = graphed(model)
    model.enable_input_require_grads()  # or nothing is trained while the adapters are off
    layer = decoder_layers(model)[0]
    backward(model, *packed(0))
    (first,) = graphs._layers[layer].values()
    backward(model, *packed(1))
    assert [*graphs._layers[layer].values()] == [first]
    moved = layer.mlp.down_proj.lora_A["default"].weight
    moved.data = moved.data.clone()
    backward(model, *packed(0))
    (second,) = graphs._layers[layer].values()
    assert second is not first
    model.zero_grad()
    with model.disable_adapter():
        backward(model, *packed(0))
    (third,) = graphs._layers[layer].values()
    assert third is not second


def test_installing_again_changes_nothing_and_enabling_again_undoes_it():
    model = ready()
    graphs = graphed(model)
    before = [layer._gradient_checkpointing_func for layer in decoder_layers(model)]
    graphs.install()
    assert [layer._gradient_checkpointing_func for layer in decoder_layers(model)] == before
    enable(model)
    backward(model, *packed(0))
    assert not graphs._layers


def hook(model):
    decoder_layers(model)[1].mlp.register_forward_hook(lambda *_: None)


def dropout(model):
    decoder_layers(model)[1].mlp.act_fn = nn.Sequential(nn.SiLU(), nn.Dropout(0.1))


def argument(model):
    layer = decoder_layers(model)[1]
    before = layer._gradient_checkpointing_func

    def with_more(function, *args):
        function.keywords["cache"] = object()
        return before(function, *args)

    layer._gradient_checkpointing_func = with_more


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(hook, "mlp has hooks"), (dropout, r"mlp.act_fn.1 drops out with p=0.1"), (argument, "a object among its argu")],
)
def test_what_a_replay_would_leave_out_is_refused(spoil, message):
    model = ready()
    graphed(model)
    spoil(model)
    with pytest.raises(GraphError, match=f"DecoderLayer cannot be replayed as CUDA graphs: {message}"):
        backward(model, *packed(0))


def test_the_trainer_has_the_same_steps(tmp_path, monkeypatch):
    used = []
    graphs = CheckpointGraphs._graphs

    def counted(self, *args):
        used.append(args[0])
        return graphs(self, *args)

    monkeypatch.setattr(CheckpointGraphs, "_graphs", counted)
    wanted, logs = train(make_trainer("trie", tmp_path / "without"))
    assert not used
    found, with_graphs = train(make_trainer("trie", tmp_path / "with", graph_rows=1024))
    assert len(set(used)) == 2  # layers
    for one, two in zip(found, wanted, strict=True):
        assert_same(one, two, atol=1e-5, rtol=1e-5)
    assert [entry["sharing_ratio"] for entry in with_graphs] == [entry["sharing_ratio"] for entry in logs]


def test_the_option_needs_checkpointing(tmp_path):
    with pytest.raises(ValueError, match=r"graph_rows must be 0, or a number of rows with gradient_checkpointing=True"):
        make_trainer("trie", tmp_path, graph_rows=1024, gradient_checkpointing=False)
    with pytest.raises(ValueError, match=r"graph_rows must be 0, or .* got -1"):
        make_trainer("trie", tmp_path, graph_rows=-1)
