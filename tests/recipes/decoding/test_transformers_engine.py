"""TransformersEngine on a tiny model that forks: tokens, log-probs, prefix reuse, new weights, cancellation, faults."""

import asyncio
import gc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.forking import EOS, PROMPTS, TRAJECTORIES, VOCAB, forking_model
from tests.support.models import tiny_model
from tests.support.rollouts import model_folder
from tests.support.trajectories import TAG_IDS
from tw_core import ReasoningTrie, Unit
from tw_recipes import install
from tw_recipes.decoding import GREEDY, EngineError, ForkJoinDecoder, Request, Rollout, Sampling, TransformersEngine

SEEDED = Sampling(seed=0)


@pytest.fixture(scope="module", autouse=True)
def cheap_garbage() -> Iterator[None]:
    """transformers collects garbage whenever a batch stops: half a second with all of torch loaded, unless frozen."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def soft_model(scale: float = 0.8) -> torch.nn.Module:
    """The forking model with flatter distributions: it still forks, and its log-probs are not all near 0."""
    model = forking_model()
    with torch.no_grad():
        model.model.norm.weight.mul_(scale)
    return model


def decode(engine: TransformersEngine, *prompts: list[int], sampling: Sampling = GREEDY, **options) -> list[Rollout]:
    return ForkJoinDecoder(engine, TAG_IDS, sampling=sampling, **options).decode_all(list(prompts))


def trie_logprobs(model: torch.nn.Module, units: list[Unit]) -> list[np.ndarray]:
    """Log-probs of each unit's completion, from one packed trie through the installed attention."""
    packed = ReasoningTrie.from_units(units).pack()
    assert packed.num_rows < sum(len(context) + len(completion) for context, completion in units)
    with torch.no_grad():
        logits = model(
            input_ids=packed.input_ids[None],
            position_ids=packed.position_ids[None],
            subtree_end=packed.subtree_end[None],
            use_cache=False,
        ).logits[0]
    logprobs = logits.float().log_softmax(-1)
    found = []
    for place, (context, completion) in enumerate(units):
        rows = packed.sequence_rows(place)[len(context) - 1 : len(context) + len(completion) - 1]
        found.append(logprobs[rows, torch.from_numpy(completion)].numpy())
    return found


def test_another_key_draws_another_response_in_a_fresh_engine():
    """A file of trajectories that is gone on with, for more samples of the same prompts, must not get copies."""

    def drawn(key: str) -> list[int]:
        decoder = ForkJoinDecoder(TransformersEngine(soft_model(0.1)), TAG_IDS, sampling=SEEDED)
        return asyncio.run(decoder.decode(PROMPTS[0], key=key)).response_ids.tolist()

    assert drawn("0#0") == drawn("0#0")
    assert len({tuple(drawn(f"0#{sample}")) for sample in range(4)}) > 1


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="default"),
        pytest.param({"page_size": 4}, id="small_pages"),
        pytest.param({"share_prefixes": False}, id="no_sharing"),
        pytest.param({"max_batch_tokens": 8, "page_size": 4}, id="split_prefill"),
        pytest.param({"cache_tokens": 160, "page_size": 4}, id="cache_too_small_for_all"),
    ],
)
def test_greedy_trajectories_are_the_learnt_ones_however_they_are_batched(options):
    rollouts = decode(TransformersEngine(forking_model(), **options), *PROMPTS * 4)
    assert [rollout.response_ids.tolist() for rollout in rollouts] == [*TRAJECTORIES] * 4
    assert all(rollout.complete for rollout in rollouts)
    assert [len(rollout.units) for rollout in rollouts[:3]] == [4, 7, 1]


def test_sampled_logprobs_are_the_tries():
    model = soft_model()
    rollouts = decode(TransformersEngine(model, page_size=4), *PROMPTS * 6, sampling=SEEDED)
    install(model)
    assert sum(len(rollout.units) >= 4 for rollout in rollouts) >= 4, "hardly a rollout forked: nothing is shared"
    sampled = np.concatenate([values for rollout in rollouts for values in rollout.logprobs])
    assert sampled.mean() < -0.1
    for rollout in rollouts:
        if len(rollout.units) == 1:
            continue
        for ours, theirs in zip(rollout.logprobs, trie_logprobs(model, rollout.units), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_the_share_of_prompt_tokens_from_the_cache_is_counted():
    for share, warm in ((False, False), (True, False), (True, True)):
        engine = TransformersEngine(forking_model(), page_size=4, share_prefixes=share)
        (rollout,) = decode(engine, PROMPTS[0], warm_prefix=warm)
        calls = rollout.calls
        assert all(0 <= call.cached_tokens <= len(call.context) for call in calls)
        assert engine.cached_share == rollout.cached_share
        assert engine.prompt_tokens == sum(len(call.context) for call in calls)
        if not share:
            assert engine.cached_share == 0
            continue
        fork = len(calls[0].context) + len(calls[0].completion)
        threads = [call for call in calls if call.kind == "thread"]
        # Whole pages of what the fork shares; the last token written is not in the cache yet.
        assert all(call.cached_tokens >= (fork - 1) // 4 * 4 for call in threads)
        # The first thread is a prefix of the joined ids: the join prefills the copies of the others alone.
        written = len(threads[0].context) + len(threads[0].completion)
        assert calls[-1].cached_tokens == (written - 1) // 4 * 4
        assert engine.cached_share > 0.6
        assert [call.kind for call in calls].count("warm") == warm


def test_a_fork_and_its_join_reuse_less_of_the_prompt_with_larger_pages():
    shares = []
    for page in (4, 16, 64):
        engine = TransformersEngine(forking_model(), page_size=page)
        decode(engine, PROMPTS[1])
        shares.append(engine.cached_share)
    assert shares[0] > shares[1] > shares[2] == 0


def test_new_weights_meet_no_old_cache():
    model = soft_model()
    engine = TransformersEngine(model, page_size=4)
    decoder = ForkJoinDecoder(engine, TAG_IDS, sampling=SEEDED)
    decoder.decode_all(PROMPTS * 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    rollout = next(rollout for rollout in decoder.decode_all(PROMPTS * 2) if len(rollout.units) > 1)
    assert rollout.cached_share > 0
    install(model)
    for ours, theirs in zip(rollout.logprobs, trie_logprobs(model, rollout.units), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_the_model_is_given_back_as_it_was():
    model = forking_model().train()
    install(model)
    attention = model.config._attn_implementation
    (rollout,) = decode(TransformersEngine(model), PROMPTS[0])
    assert rollout.response_ids.tolist() == TRAJECTORIES[0]
    assert model.config._attn_implementation == attention
    assert model.training
    packed = ReasoningTrie.from_units(rollout.units).pack()
    logits = model(
        input_ids=packed.input_ids[None],
        position_ids=packed.position_ids[None],
        subtree_end=packed.subtree_end[None],
        use_cache=False,
    ).logits
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


async def test_tokens_come_as_they_are_written_and_make_up_the_calls():
    engine = TransformersEngine(forking_model())
    events = []
    rollout = await ForkJoinDecoder(engine, TAG_IDS, sampling=GREEDY).decode(PROMPTS[1], on_event=events.append)
    await engine.aclose()
    for kind in ("tokens", "call"):
        written = {}
        for event in events:
            if event.kind == kind:
                written.setdefault(event.path, []).extend(event.ids)
        calls = {}
        for call in rollout.calls:
            calls.setdefault(call.path, []).extend(call.completion.tolist())
        assert written == calls
    assert sum(event.kind == "tokens" for event in events) > len(rollout.calls)


async def test_a_cancelled_trajectory_leaves_the_batch_and_the_others_go_on():
    engine = TransformersEngine(tiny_model("qwen3", vocab_size=VOCAB, eos_token_id=EOS))
    decoder = ForkJoinDecoder(engine, TAG_IDS, sampling=SEEDED, eos_ids=[VOCAB - 1])
    found = []
    long = decoder.decode([100, 101], "long", on_event=lambda event: found.append(decoder.cancel("long")))
    others = [asyncio.create_task(decoder.decode([100, 102 + place], str(place))) for place in range(3)]
    rollout = await long
    assert found[0]
    assert (rollout.status, rollout.reason) == ("cancelled", "cancelled by the caller")
    assert not decoder.cancel("long")
    task = asyncio.create_task(decoder.decode([100, 101], "dropped", on_event=lambda event: task.cancel()))
    with pytest.raises(asyncio.CancelledError):
        await task
    assert {(await other).status for other in others} <= {"done", "length"}
    assert (await decoder.decode([100, 101], "dropped")).status in ("done", "length")
    processor = engine._running.manager.batch_processor
    await engine.aclose()
    assert not processor.has_pending_requests()
    assert not engine._cached


class Failing(torch.nn.Module):
    """A forward hook that raises once, at the given call."""

    def __init__(self, model: torch.nn.Module, at: int) -> None:
        super().__init__()
        self.left = at
        self.handle = model.model.layers[1].register_forward_pre_hook(self)

    def forward(self, *_) -> None:
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("a kernel has failed")


@pytest.mark.parametrize("at", [1, 2, 9])
def test_a_failed_batch_ends_its_trajectories_with_the_reason_and_the_next_one_runs(at):
    model = forking_model()
    engine = TransformersEngine(model, page_size=4)
    Failing(model, at)
    decoder = ForkJoinDecoder(engine, TAG_IDS, sampling=GREEDY)
    rollouts = decoder.decode_all(PROMPTS * 3)
    failed = [rollout for rollout in rollouts if not rollout.ok]
    assert failed
    assert all(rollout.status == "error" and "a kernel has failed" in rollout.reason for rollout in failed)
    again = decoder.decode_all(PROMPTS)
    assert [rollout.response_ids.tolist() for rollout in again] == [*TRAJECTORIES]


async def test_a_batch_that_failed_is_replaced_without_closing_the_engine():
    model = forking_model()
    engine = TransformersEngine(model)
    Failing(model, 3)
    decoder = ForkJoinDecoder(engine, TAG_IDS, sampling=GREEDY)
    first = await asyncio.gather(*(decoder.decode(prompt, str(place)) for place, prompt in enumerate(PROMPTS)))
    failed = [rollout for rollout in first if rollout.status == "error"]
    assert failed, "the third step fails whatever is in it; a prompt that comes later is in the next batch"
    done = [rollout.response_ids.tolist() for rollout in first if rollout.status != "error"]
    assert all(ids in TRAJECTORIES for ids in done)
    rollout = await decoder.decode(PROMPTS[1])
    assert rollout.response_ids.tolist() == TRAJECTORIES[1]
    await engine.aclose()


async def test_a_request_lost_by_a_dying_batch_is_failed_not_waited_for(monkeypatch):
    """transformers drops what is queued between its last look at the queue and the end of its thread."""
    model = forking_model()
    engine = TransformersEngine(model)
    await engine.generate(Request(np.array(PROMPTS[0]), (EOS,), 1))
    Failing(model, 1)
    manager = engine._running.manager
    accept = manager.add_request
    monkeypatch.setattr(manager, "add_request", lambda ids, **options: "lost")
    lost = asyncio.create_task(engine.generate(Request(np.array(PROMPTS[0]), (EOS,), 5)))
    await asyncio.sleep(0)
    monkeypatch.setattr(manager, "add_request", accept)
    with pytest.raises(EngineError, match="generation failed: a kernel has failed"):
        await engine.generate(Request(np.array(PROMPTS[0]), (EOS,), 5))
    with pytest.raises(EngineError, match="continuous batching has ended: a kernel has failed"):
        await lost
    await engine.aclose()


async def test_a_call_that_a_failing_batch_refuses_is_run_by_the_next_one():
    """Its waiting calls hear of a failure before it has ended, and may ask again at once."""
    model = forking_model()
    engine = TransformersEngine(model)
    await engine.generate(Request(np.array(PROMPTS[0]), (EOS,), 1))
    manager = engine._running.manager
    manager.add_request = lambda ids, **options: manager.stop(block=False)
    ids = (await engine.generate(Request(np.array(PROMPTS[0]), (EOS,), 5))).ids
    assert ids.tolist() == TRAJECTORIES[0][:5]
    assert engine._running.manager is not manager
    await engine.aclose()


async def test_calls_that_come_while_the_batch_is_stopped_wait_for_a_new_one():
    engine = TransformersEngine(forking_model())
    decoder = ForkJoinDecoder(engine, TAG_IDS, sampling=GREEDY)
    running = asyncio.create_task(decoder.decode(PROMPTS[1], "running"))
    await asyncio.sleep(0.01)
    closing = [asyncio.create_task(engine.aclose()) for _ in range(3)]
    await asyncio.sleep(0)
    closing[0].cancel()
    late = await decoder.decode(PROMPTS[0], "late")
    await asyncio.gather(*closing, return_exceptions=True)
    assert late.response_ids.tolist() == TRAJECTORIES[0]
    assert (await running).response_ids.tolist() == TRAJECTORIES[1]
    await engine.aclose()


def test_a_trajectory_that_cannot_be_served_ends_alone_with_the_reason():
    engine = TransformersEngine(forking_model(), cache_tokens=64, page_size=4)
    assert engine.max_context == 64
    outside, long, good = decode(engine, [100, VOCAB], [100] * 64, PROMPTS[0])
    assert outside.status == "error"
    assert "context ids must lie in 0..119, got 100..120" in outside.reason
    assert long.status == "error"
    assert "the prompt has 64 tokens and the engine's context 64" in long.reason
    assert long.limits_hit == {"max_context": 1}
    assert good.response_ids.tolist() == TRAJECTORIES[0]


def test_a_context_may_fill_the_whole_cache():
    engine = TransformersEngine(tiny_model("qwen3", vocab_size=VOCAB), cache_tokens=64, page_size=4)
    (rollout,) = decode(engine, [100] * 40, sampling=SEEDED, eos_ids=[VOCAB - 1])
    assert rollout.status in ("done", "length")
    assert len(rollout.ids) <= 64 + 2 * rollout.forced


async def test_misuse_is_raised_to_the_caller():
    engine = TransformersEngine(forking_model())
    biased = ForkJoinDecoder(engine, TAG_IDS, sampling=Sampling(logit_bias={5: 1.0}))
    with pytest.raises(ValueError, match="logit_bias is not possible with continuous batching; use OpenAIEngine"):
        await biased.decode(PROMPTS[0])
    calls = [asyncio.create_task(engine.generate(Request(np.array(PROMPTS[1]), (EOS,), 30))) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(ValueError, match="sampling must be that of the running batch"):
        await engine.generate(Request(np.array(PROMPTS[0]), (EOS,), 30, SEEDED))
    await asyncio.gather(*calls)
    assert len((await engine.generate(Request(np.array(PROMPTS[0]), (EOS,), 3, SEEDED))).ids) <= 3
    with pytest.raises(EngineError, match=r"context and max_tokens must fit 256 tokens, got 4 \+ 300"):
        await engine.generate(Request(np.array(PROMPTS[0]), (EOS,), 300))
    await engine.aclose()
    await engine.aclose()
    model = tiny_model("qwen3", eos_token_id=None)
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="the model's configuration names none; pass eos_ids"):
        TransformersEngine(model)


async def test_what_a_listener_raises_ends_the_call_and_reaches_the_caller():
    engine = TransformersEngine(forking_model())

    def listener(event):
        if event.kind == "tokens" and event.path:
            raise LookupError("the display is gone")

    with pytest.raises(LookupError, match="the display is gone"):
        await ForkJoinDecoder(engine, TAG_IDS, sampling=GREEDY).decode(PROMPTS[0], on_event=listener)
    rollout = await ForkJoinDecoder(engine, TAG_IDS, sampling=GREEDY).decode(PROMPTS[0])
    assert rollout.response_ids.tolist() == TRAJECTORIES[0]
    await engine.aclose()


def test_the_documented_example_runs(tmp_path, capsys):
    folder = model_folder(tmp_path)
    page = (Path(__file__).parents[3] / "docs" / "decoding.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    assert "out/quickstart/forkjoin" in code
    code = code.replace("out/quickstart/forkjoin", str(folder)).replace("max_total_tokens=400", "max_total_tokens=12")
    exec(compile(code, "docs/decoding.md", "exec"), {})
    assert "\ntokens ()" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"cache_tokens": 4_096}, {"memory_share": 0.05}], ids=str)
def test_on_a_gpu_the_trajectories_and_logprobs_are_the_same(options):
    prompts = PROMPTS * 4
    on_cpu = decode(TransformersEngine(forking_model(), page_size=4), *prompts)
    engine = TransformersEngine(forking_model().cuda(), page_size=16, **options)
    for rollout, expected in zip(decode(engine, *prompts), on_cpu, strict=True):
        assert rollout.complete, rollout.reason
        assert rollout.ids.tolist() == expected.ids.tolist()
        for ours, theirs in zip(rollout.logprobs, expected.logprobs, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3)
    assert engine.cached_share > 0.3
