"""What a run of `reproduce` depends on: one frozen object, two presets, one field an ablation.

Tests: tests/recipes/pipelines/test_reproduce_stages.py.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from tw_recipes.tasks import Task, get_task

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class ModelSize:
    """A Qwen3 trained from scratch.

    Attributes:
        hidden_size: A multiple of `heads`; feed-forward layers are three times as wide.
        layers: Decoder layers.
        heads: Attention heads.
        context: Longest sequence.
        init: Standard deviation of the random weights.
        composed: Whether embeddings of labels start as sums over their characters (`tiny_model`).
    """

    hidden_size: int = 64
    layers: int = 3
    heads: int = 4
    context: int = 2048
    init: float = 0.08
    composed: bool = False


@dataclass(frozen=True)
class Training:
    """Supervised training; both sides take the same number of steps on the same problems.

    Attributes:
        batch: Problems of a step.
        start_steps: Steps of the common start, on sequential solutions. 0: each side starts from random weights.
        steps: Steps of each side's own solutions.
        retained_share: Share of the fork/join side's problems that keep the sequential solution meanwhile: without
            any, the model forgets how to write one.
        mixed_steps: Further steps in which the fork/join side sees `sequential_share` sequential solutions. 0: none, as
            where neither self-training nor reinforcement follows.
        sequential_share: There; about the share of responses that will not fork, which reinforcement learning changes.
        second_lr: Learning rates of `steps`, relative to those of the start.
        mixed_lr: Likewise of `mixed_steps`.
        leaky_loss: Ablation: the published behaviour, loss on every token after the prompt, joined copies included.
        compiled: Compile the layers: the same steps, rounded otherwise.
    """

    batch: int = 8
    start_steps: int = 800
    steps: int = 560
    retained_share: float = 0.1
    mixed_steps: int = 100
    sequential_share: float = 0.4
    second_lr: float = 0.75
    mixed_lr: float = 0.4
    leaky_loss: bool = False
    compiled: bool = False


@dataclass(frozen=True)
class SelfTraining:
    """A model's own correct, well-formed responses as training data.

    Attributes:
        rounds: How often: 0, 1 or 2.
        prompts: New training problems decoded in a round, one response each.
        steps: Steps of training on what was kept.
        temperature: Of decoding.
        lr: Learning rates, relative to those of the start.
        sequential_share: The most sequential responses among those of the fork/join side that are kept. They are right
            more often while forks are still learned, and training on what is right alone would end the forking.
    """

    rounds: int = 1
    prompts: int = 128
    steps: int = 32
    temperature: float = 1.0
    lr: float = 0.2
    sequential_share: float = 0.4


@dataclass(frozen=True)
class Reinforcement:
    """P-GRPO for the fork/join side, GRPO without forks and without bonus for the sequential side.

    Attributes:
        steps: Optimizer steps of each; 0 leaves reinforcement learning out.
        prompts: Prompts of a step.
        generations: Responses of a prompt.
        lr: Learning rate of AdamW at the first steps; it falls to 0 at the last.
        incorrect: Reward of a wrong answer; the published runs use -1.
        rho: Weight of the acceleration; 0 rewards correctness alone.
        eta_max: Acceleration above it earns no more.
        std_normalisation: Ablation: divide the fork/join side's advantages by the standard deviation of the group.
    """

    steps: int = 22
    prompts: int = 8
    generations: int = 4
    lr: float = 7e-4
    incorrect: float = -1.0
    rho: float = 0.5
    eta_max: float = 0.2
    std_normalisation: bool = False


@dataclass(frozen=True)
class Evaluation:
    """Decoding of held-out problems, one response each.

    Attributes:
        problems: How many.
        between: How many after stages that are neither the first nor the last of their side; None: as many.
        temperature: 0.6 with top-p 0.95 is the paper's setting. Greedy decoding would hide how often a model forks.
        top_p: Nucleus.
        batches: Problems in flight when the wall clock is measured; none: it is not.
        timed: Problems that are decoded for each of `batches`; at least so many as are in flight.
    """

    problems: int = 200
    between: int | None = None
    temperature: float = 0.6
    top_p: float = 0.95
    batches: tuple[int, ...] = (1, 4, 16)
    timed: int = 5


@dataclass(frozen=True)
class Settings:
    """One run.

    Attributes:
        task: A name of `tw_recipes.tasks.TASKS`.
        nested: Ablation: fork/join solutions with blocks inside threads (multiply only).
        seed: Of problems, weights, training and sampling.
        device: Where models run.
        threads: CPU threads of a process that works alone. Two sides at once take one each.
        at_once: Whether both sides run at the same time, each in a process of one thread.
    """

    task: str = "products"
    nested: bool = False
    seed: int = 0
    device: Device = "cpu"
    threads: int = 2
    at_once: bool = True
    model: ModelSize = field(default_factory=ModelSize)
    training: Training = field(default_factory=Training)
    self_training: SelfTraining = field(default_factory=SelfTraining)
    reinforcement: Reinforcement = field(default_factory=Reinforcement)
    evaluation: Evaluation = field(default_factory=Evaluation)

    def __post_init__(self) -> None:
        if self.self_training.rounds not in (0, 1, 2):
            raise ValueError(f"rounds must be 0, 1 or 2, got {self.self_training.rounds}")
        if self.training.steps < 1 or self.training.batch < 1 or self.evaluation.problems < 1:
            raise ValueError("training.steps, training.batch and evaluation.problems must be at least 1")
        for name in ("retained_share", "sequential_share"):
            if not 0 <= getattr(self.training, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self.training, name)}")
        if self.nested and self.task != "multiply":
            raise ValueError(f"nested=True needs the task multiply, got {self.task!r}: its solutions have one block")
        self.make_task()

    @property
    def last(self) -> str:
        """Name of the last stage that trains a side."""
        if self.reinforcement.steps:
            return "rl"
        if self.self_training.rounds:
            return f"self_training_{self.self_training.rounds}"
        return "sft"

    @property
    def mixes(self) -> bool:
        """Whether there is a mixed stage: what follows it needs responses of both kinds."""
        return bool(self.training.mixed_steps and (self.self_training.rounds or self.reinforcement.steps))

    def make_task(self) -> Task:
        """The task; `nested` gives another layout of the same problems."""
        return get_task(self.task, **({"nested": True} if self.nested else {}))

    def as_json(self) -> dict[str, Any]:
        """Plain values, read back by `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Settings":
        """The settings that `as_json` wrote."""
        parts = {
            "model": ModelSize,
            "training": Training,
            "self_training": SelfTraining,
            "reinforcement": Reinforcement,
            "evaluation": Evaluation,
        }
        made = {name: parts[name](**value) if name in parts else value for name, value in values.items()}
        evaluation = made["evaluation"]
        made["evaluation"] = Evaluation(**{**asdict(evaluation), "batches": tuple(evaluation.batches)})
        return cls(**made)


PRESETS: dict[str, Settings] = {
    # Two CPU cores, at most eight minutes: the quickstart's task and model.
    "cpu": Settings(),
    # One H100: the paper's public reproduction task, a model from scratch.
    "h100": Settings(
        task="multiply",
        device="cuda",
        threads=8,
        at_once=False,
        model=ModelSize(hidden_size=512, layers=8, heads=8, context=8192, init=0.02, composed=True),
        # After 600 common steps and 500 of its own the fork/join loss was still falling, the sequential one was not:
        # fewer for the common start, more of each side's own.
        training=Training(batch=16, start_steps=500, steps=1000, mixed_steps=200),
        self_training=SelfTraining(prompts=256, steps=40),
        # The rate of the CPU preset times the ratio of the widths, 64 / 512.
        reinforcement=Reinforcement(steps=16, prompts=8, generations=8, lr=8e-5),
        evaluation=Evaluation(problems=500, between=128, timed=16),
    ),
}


def fingerprint(values: Any) -> str:
    """Eight hexadecimal digits that differ where the values differ."""
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
