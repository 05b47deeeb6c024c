r"""`threadweaver rollout`: a file of prompts in, a JSONL file of trajectories out.

    threadweaver rollout prompts.jsonl --model out/sft --out trajectories.jsonl --samples 8
    threadweaver rollout prompts.jsonl --model Qwen/Qwen3-8B --base-url http://localhost:8000/v1 --out t.jsonl

The same command again goes on where a killed run stopped. Exit status: 0 all done, 1 some trajectories failed or the
input is bad, 2 wrong flags.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from tw_core import TagIds
from tw_core.errors import ThreadWeaverError
from tw_recipes.data import content_setting, read_rows, require_local
from tw_recipes.decoding.decoder import ForkJoinDecoder
from tw_recipes.decoding.engine import Engine, Sampling
from tw_recipes.decoding.limits import Limits
from tw_recipes.rollout import THINK, Prompt, RolloutSummary, rollout, settings_file


@dataclass(frozen=True)
class EngineOptions:
    """Which engine decodes, and how.

    Attributes:
        model: Folder or Hub name of the model; with `base_url`, of its tokenizer.
        base_url: OpenAI-compatible servers (vLLM, SGLang), e.g. http://localhost:8000/v1; several are replicas.
            None: transformers, in this process.
        served_name: Name of the model on the servers. Defaults to `model`.
        device: Where transformers runs.
        dtype: Its dtype, "auto" for the checkpoint's.
        temperature: 0 is greedy.
        top_p: Nucleus.
        top_k: 0 keeps every token.
        seed: Of sampling.
        max_total_tokens: Tokens of a response.
        max_thread_tokens: Tokens of a thread.
        max_blocks: Blocks one after another; 0 never forks.
        max_threads: Threads of a block.
        max_depth: Nesting; 1 is flat, 0 never forks.
        max_seconds: Wall-clock time of a trajectory.
        max_calls: Engine calls in flight.
        warm_prefix: Send the prefix of a fork alone first.
    """

    model: str
    base_url: tuple[str, ...] = ()
    served_name: str | None = None
    device: str = "cpu"
    dtype: str = "auto"
    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 0
    seed: int | None = 0
    max_total_tokens: int = 32_768
    max_thread_tokens: int = 16_384
    max_blocks: int = 64
    max_threads: int = 16
    max_depth: int = 4
    max_seconds: float | None = None
    max_calls: int = 256
    warm_prefix: bool = False

    @property
    def limits(self) -> Limits:
        """Budgets of a trajectory."""
        names = ("max_total_tokens", "max_thread_tokens", "max_blocks", "max_threads", "max_depth", "max_seconds")
        return Limits(**{name: getattr(self, name) for name in names})

    @property
    def sampling(self) -> Sampling:
        """How tokens are drawn."""
        return Sampling(self.temperature, self.top_p, self.top_k, self.seed)

    def settings(self) -> dict[str, Any]:
        """What trajectories depend on: everything but the place where they are computed."""
        free = ("base_url", "device", "max_calls", "warm_prefix")
        return {name: value for name, value in asdict(self).items() if name not in free}


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a model whose tags are single tokens."""
    from transformers import AutoTokenizer

    require_local("model", model)
    return AutoTokenizer.from_pretrained(model)


def make_engine(options: EngineOptions, tokenizer: Any) -> Engine:
    """The engine that the flags describe."""
    if options.base_url:
        from tw_recipes.decoding import OpenAIEngine

        return OpenAIEngine(list(options.base_url), options.served_name or options.model, tokenizer)
    import torch
    from transformers import AutoModelForCausalLM

    from tw_recipes.decoding import TransformersEngine

    try:
        torch.empty(0, device=options.device)
    except (AssertionError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"device must be one that torch can use here, got {options.device!r} ({reason}); give cpu, or install a "
            "torch for that device"
        ) from error
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype).to(options.device).eval()
    eos = model.generation_config.eos_token_id if model.generation_config else None
    if eos is None:
        eos = tokenizer.eos_token_id
    return TransformersEngine(model, eos_ids=[eos] if isinstance(eos, int) else eos)


def make_decoder(options: EngineOptions, tokenizer: Any, engine: Engine | None = None) -> ForkJoinDecoder:
    """The decoder that the flags describe, on their engine or a given one."""
    return ForkJoinDecoder(
        engine if engine is not None else make_engine(options, tokenizer),
        TagIds.from_tokenizer(tokenizer),
        options.limits,
        options.sampling,
        max_calls=options.max_calls,
        warm_prefix=options.warm_prefix,
    )


def encode_prompt(tokenizer: Any, text: str, *, raw: bool = False, think: bool = False) -> list[int]:
    """Token ids of a prompt: through the chat template, or `raw`; with `think`, "<think>\\n" opens the response."""
    if not raw:
        if tokenizer.chat_template is None:
            raise ValueError("the tokenizer has no chat template; pass --raw to encode prompts as they are")
        chat = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text + (THINK if think else ""), add_special_tokens=raw)


def with_content(settings: dict[str, Any], source: str | Path, out: Path) -> dict[str, Any]:
    """Settings of the trajectories at `out`, and the content of the file that their prompts come from."""
    return settings | content_setting(source, settings_file(out))


@dataclass(frozen=True)
class RolloutOptions:
    """A file of prompts in, a JSONL file of trajectories out; the same command again goes on after a kill.

    Attributes:
        prompts: .jsonl or .parquet file.
        out: The .jsonl file of trajectories.
        engine: The model and how it decodes.
        column: Column of the prompt.
        id_column: Column of unique names; without it, rows are named by their place.
        raw: Encode prompts as they are, without the chat template.
        think: Let the response start after "<think>".
        samples: Trajectories per prompt.
        concurrency: Trajectories in flight.
        limit: Only the first so many prompts.
        units: Write the units (what SFT reads); off keeps files small.
        progress: Show a progress bar on stderr.
    """

    prompts: Annotated[Path, tyro.conf.Positional]
    out: Path
    engine: Annotated[EngineOptions, tyro.conf.arg(name="")]
    column: str = "prompt"
    id_column: str | None = None
    raw: bool = False
    think: bool = False
    samples: int = 1
    concurrency: int = 256
    limit: int | None = None
    units: bool = True
    progress: bool = field(default_factory=lambda: sys.stderr.isatty())


def run_rollout(options: RolloutOptions, engine: Engine | None = None) -> RolloutSummary:
    """What `threadweaver rollout` does; `engine` replaces the one that the flags describe."""
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"limit must be at least 1, got {options.limit}; leave it out for all prompts")
    columns = [options.column] if options.id_column is None else [options.column, options.id_column]
    rows = read_rows(options.prompts, columns[:1]).rows[: options.limit]
    tokenizer = load_tokenizer(options.engine.model)
    for place, row in enumerate(rows, 1):
        if options.id_column is not None and options.id_column not in row:
            raise ValueError(f"{options.prompts}, row {place} has no column {options.id_column!r}; check id_column")

    def prompts() -> Iterator[Prompt]:
        for place, row in enumerate(rows):
            name = str(place if options.id_column is None else row[options.id_column])
            text = row[options.column]
            ids = encode_prompt(tokenizer, text, raw=options.raw, think=options.think)
            yield Prompt(name, ids, {"prompt": text} | {k: v for k, v in row.items() if k not in columns})

    settings = options.engine.settings() | {"raw": options.raw, "think": options.think, "column": options.column}
    return rollout(
        prompts(),
        make_decoder(options.engine, tokenizer, engine),
        tokenizer,
        options.out,
        samples=options.samples,
        concurrency=options.concurrency,
        settings=with_content(settings, options.prompts, options.out),
        units=options.units,
        total=len(rows),
        progress=options.progress,
    )


def main(argv: Sequence[str]) -> int:
    """Parse flags, decode, print the counts; the result is the exit status."""
    options = tyro.cli(RolloutOptions, args=list(argv), prog="threadweaver rollout")
    try:
        summary = run_rollout(options)
    except (ThreadWeaverError, OSError, ValueError) as error:
        print(f"threadweaver rollout: {error}", file=sys.stderr)
        return 1
    print(summary)
    if summary.failed:
        print(f"threadweaver rollout: {summary.failed} trajectories failed; their lines say why", file=sys.stderr)
    return int(summary.failed > 0)
