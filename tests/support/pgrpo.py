"""P-GRPO on tiny models: scripted fork/join rollouts, trainers, and the gradient of SPEC section 6 unit by unit."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.support.grpo import grpo_options
from tests.support.models import in_float64, tiny_model
from tests.support.sft import byte_tokenizer
from tw_core import Unit, encode_units
from tw_recipes.decoding.engine import EngineError, Request
from tw_recipes.decoding.scripted_engine import ScriptedEngine
from tw_recipes.evaluation.grading import ExactGrader
from tw_recipes.grpo.pgrpo_config import PGRPOConfig
from tw_recipes.grpo.pgrpo_trainer import PGRPOTrainer
from tw_recipes.tokens import add_tag_tokens


def block(*bodies: str) -> str:
    """A canonical block, one thread a body."""
    plans = "".join(f"<Outline>{number}: p</Outline>\n" for number in range(1, len(bodies) + 1))
    threads = "".join(f"<Thread>\n{number}: {body}\n</Thread>" for number, body in enumerate(bodies, 1))
    return f"\n<Parallel>\n<Outlines>\n{plans}</Outlines>\n{threads}\n</Parallel>\n"


# Right (7) and wrong answers, with and without blocks, of uneven lengths; the last nests.
TEXTS = (
    f"go{block('two', 'three and more')}so \\boxed{{7}}",
    "plain \\boxed{7}",
    f"x{block('a', 'bb', 'ccc')}y{block('d', 'e')}\\boxed{{3}}",
    f"n{block(f'i{block(chr(106), chr(107))}m', 'o')}\\boxed{{7}}",
)
ROWS = [{"prompt": prompt, "answer": "7"} for prompt in ("What is 3+4?", "Seven, how?", "1+6", "Days of a week:")]


@lru_cache(maxsize=1)
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and one a tag."""
    made = byte_tokenizer()
    made.padding_side = "left"
    add_tag_tokens(tiny_model("qwen3", vocab_size=260), made)
    return made


def policy(dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    """A random model for `tokenizer()`; the same weights every time."""
    torch.manual_seed(0)
    model = tiny_model("qwen3", vocab_size=288, max_position_embeddings=1024, **options)
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer().eos_token_id
    model.config.pad_token_id = tokenizer().pad_token_id
    return in_float64(model) if dtype == torch.float64 else model.to(dtype)


@lru_cache(maxsize=2)
def _taught(choice: tuple[str, ...]) -> dict[str, Tensor]:
    """Weights of `policy()` after a few seconds: it forks, mostly well, and is often right."""
    model = policy()
    pairs = [(row, text) for row in ROWS for text in choice] or zip(ROWS, TEXTS, strict=True)
    units = [unit for row, text in pairs for unit in finished_units(row["prompt"], text)]
    width = max(len(context) + len(completion) for context, completion in units)
    ids, labels = np.zeros((len(units), width), np.int64), np.full((len(units), width), -100)
    for row, (context, completion) in enumerate(units):
        end = len(context) + len(completion)
        ids[row, :end] = [*context, *completion]
        labels[row, len(context) : end] = completion
    batch = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model.state_dict()


def taught_policy(*choice: str) -> PreTrainedModel:
    """A fresh copy of a model that answers prompt k with `TEXTS[k]`, or every prompt with one of the texts given."""
    model = policy()
    model.load_state_dict(_taught(choice))
    return model


def finished_units(prompt: str, text: str) -> list[Unit]:
    """What an engine is asked and writes for one response, end of sequence included."""
    units = encode_units(text, tokenizer(), prompt)
    return [*units[:-1], Unit(units[-1].context, [*units[-1].completion, tokenizer().eos_token_id])]


def scripted(choose: Callable[[str], str | Exception], logprob: float | None = None) -> ScriptedEngine:
    """An engine that writes, call by call, the text that `choose` names for the key of a rollout."""
    eos = int(tokenizer().eos_token_id)
    outlines_close = tokenizer().convert_tokens_to_ids("</Outlines>")

    @lru_cache(maxsize=64)
    def units(text: str) -> list[Unit]:
        return encode_units(text, tokenizer())

    def answer(request: Request) -> Any:
        text = choose(request.key)
        if isinstance(text, Exception):
            raise text
        if not text:
            return [eos]
        if outlines_close not in request.stop_ids and not _in_thread(request):
            return [*tokenizer().encode(text, add_special_tokens=False), eos]
        context = request.context
        fitting = [
            unit for unit in units(text) if np.array_equal(context[len(context) - len(unit.context) :], unit.context)
        ]
        best = max(fitting, key=lambda unit: len(unit.context))
        return [*best.completion.tolist(), *([eos] if best is units(text)[-1] else [])]

    return ScriptedEngine(answer, [eos], logprob=logprob)


def _in_thread(request: Request) -> bool:
    return tokenizer().convert_tokens_to_ids("</Thread>") in request.stop_ids


def by_place(key: str) -> str:
    """Texts in turn over the rollouts of a batch, whatever the process."""
    rank, place = key.split("/")[0].split(".")
    return TEXTS[(int(rank) + int(place)) % len(TEXTS)]


def failing(choose: Callable[[str], str], places: Sequence[int], times: int = 1_000_000) -> Callable[[str], Any]:
    """`choose`, with an engine error for the rollouts at `places`, `times` in all."""
    left = [times]

    def chosen(key: str) -> Any:
        if int(key.split("/")[0].split(".")[1]) in places and left[0] > 0:
            left[0] -= 1
            return EngineError("the engine was killed")
        return choose(key)

    return chosen


def pgrpo_trainer(
    output_dir: Path | str,
    *,
    model: Any = None,
    engine: Any = None,
    rows: list[dict[str, Any]] | None = None,
    eval_rows: list[dict[str, Any]] | None = None,
    reward_funcs: Any = None,
    callbacks: Any = None,
    **options: Any,
) -> PGRPOTrainer:
    """A trainer on the scripted rollouts, or on `engine`; `engine="model"` decodes with the model."""
    chosen = {
        **grpo_options(output_dir),
        "max_completion_length": 300,
        "acceleration_rho": 8.0,
        "acceleration_max": 2**-6,
        "retry_wait_s": 0.0,
        **options,
    }
    return PGRPOTrainer(
        policy() if model is None else model,
        PGRPOConfig(**chosen),
        Dataset.from_list(rows or ROWS),
        reward_funcs=reward_funcs,
        eval_dataset=None if eval_rows is None else Dataset.from_list(eval_rows),
        processing_class=tokenizer(),
        grader=ExactGrader(),
        engine=None if engine == "model" else engine or scripted(by_place),
        callbacks=callbacks,
    )


def exact_head(model: PreTrainedModel) -> None:
    """Replace TRL's fused head, which rounds log-probs to float32, by one in the model's own dtype."""

    def forward(fused_lm_head: bool = False, shift_labels: Tensor | None = None, **inputs: Any) -> Any:
        output = type(model).forward(model, **inputs)
        if not fused_lm_head:
            return output
        logps = output.logits.log_softmax(-1)
        chosen = logps.gather(-1, shift_labels[..., None])[..., 0]
        return SimpleNamespace(log_probs=chosen, entropy=-(logps.exp() * logps).sum(-1))

    model.forward = forward


def formula_gradients(
    model: PreTrainedModel, groups: Sequence[Sequence[tuple[Sequence[Unit], float]]], items: int | None = None
) -> dict[str, Tensor]:
    """Gradient of L = -(1 / tokens) sum_i A_i sum_units log pi(completion | context), one forward a unit.

    Args:
        model: The policy.
        groups: For each prompt, its trajectories as (units, reward); A = reward - mean of the group.
        items: Generated tokens, counted if None.
    """
    trajectories = [
        (units, reward - sum(r for _, r in group) / len(group)) for group in groups for units, reward in group
    ]
    tokens = items or sum(len(unit.completion) for units, _ in trajectories for unit in units)
    model.zero_grad()
    for units, advantage in trajectories:
        for context, completion in units:
            ids = torch.from_numpy(np.concatenate([context, completion]))[None]
            logits = model(input_ids=ids, use_cache=False).logits[0, len(context) - 1 : -1]
            logps = logits.log_softmax(-1).gather(1, torch.from_numpy(completion)[:, None])
            (-advantage * logps.sum() / tokens).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found
