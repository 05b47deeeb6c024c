"""`PGRPOConfig`: how rollouts are decoded, rewarded, and which of them are trained; one knob, one home.

Tests: tests/recipes/grpo/test_pgrpo_config.py.
"""

from dataclasses import dataclass, field

from tw_recipes.decoding.limits import Limits
from tw_recipes.grpo.config import TrieGRPOConfig

ENGINES = ("auto", "lockstep", "transformers", "vllm")


@dataclass
class PGRPOConfig(TrieGRPOConfig):
    """Options of `PGRPOTrainer`, beside those of `TrieGRPOConfig` and TRL's GRPOConfig.

    Defaults that differ from TRL's: scale_rewards "none" (mean-centred advantages; "group" is the published ablation),
    epsilon_high 0.28, and vllm_importance_sampling_mode "token_truncate" (a fork/join row is long, and one ratio a
    sequence would mask most rows). `max_completion_length` bounds the joined response, glue included.
    """

    scale_rewards: str = field(
        default="none",
        metadata={"help": 'Divide advantages by a standard deviation: "none", "group" or "batch".'},
    )
    epsilon_high: float | None = field(default=0.28, metadata={"help": "Upper clip ratio; the lower one is epsilon."})
    vllm_importance_sampling_mode: str = field(
        default="token_truncate", metadata={"help": "As in GRPOConfig, with another default."}
    )
    forking: bool = field(
        default=True,
        metadata={"help": "False: the sequential baseline, each response one call and no acceleration reward."},
    )

    rollout_engine: str = field(
        default="auto",
        metadata={
            "help": 'Who decodes: "lockstep" and "transformers" run the trained model in this process, "vllm" the '
            'server or the colocated vLLM of use_vllm, whose weights TRL keeps in step. "auto": vllm if use_vllm is '
            "set, else lockstep on a CPU and transformers on a GPU."
        },
    )
    rollout_model_name: str | None = field(
        default=None, metadata={"help": "Name of the model on the server. Default: the name it was loaded by."}
    )
    max_thread_tokens: int | None = field(
        default=None, metadata={"help": "Tokens of a thread. Default: max_completion_length."}
    )
    max_blocks: int = field(default=64, metadata={"help": "Blocks one after another."})
    max_threads: int = field(default=16, metadata={"help": "Threads of a block."})
    max_depth: int = field(default=4, metadata={"help": "Nesting; 1 is the paper's flat format."})
    max_rollout_seconds: float | None = field(default=None, metadata={"help": "Wall-clock time of a rollout."})
    max_calls: int = field(default=512, metadata={"help": "Engine calls in flight, per process."})
    warm_prefix: bool = field(default=False, metadata={"help": "At a fork, send the shared prefix alone first."})
    think: bool = field(default=False, metadata={"help": 'Let the response start after "<think>\\n".'})

    answer_column: str = field(default="answer", metadata={"help": "Column of the reference answers."})
    incorrect_reward: float = field(default=0.0, metadata={"help": "Reward of a wrong answer; published runs: -1."})
    acceleration_rho: float = field(default=0.5, metadata={"help": "Weight of the acceleration of right answers."})
    acceleration_max: float = field(default=0.2, metadata={"help": "Acceleration above it earns no more."})
    format_weight: float = field(default=0.0, metadata={"help": "Reward of a well-formed response; 0: not asked."})
    length_beta: float = field(default=0.0, metadata={"help": "Largest length penalty; 0: none."})
    length_window: float = field(default=10_000.0, metadata={"help": "Excess length that is penalised in full."})
    reward_errors: str = field(
        default="raise",
        metadata={"help": 'A reward function that raises or runs out of time: "raise", or "none" (no reward).'},
    )
    reward_timeout_s: float | None = field(
        default=None, metadata={"help": "Seconds for one call of a reward function. Grading has its own clock."}
    )

    dynamic_sampling: bool = field(
        default=False, metadata={"help": "Drop groups whose advantages are all 0 from loss and token count."}
    )
    signal_threshold: float | None = field(
        default=None,
        metadata={"help": "A group whose rewards are all >= or all <= it has no signal: its advantages are 0."},
    )
    max_staleness: int | None = field(
        default=None,
        metadata={
            "help": "Most optimizer steps between a rollout and its last use. None: what the other options give."
        },
    )
    rollout_retries: int = field(default=2, metadata={"help": "How often rollouts that failed are decoded again."})
    retry_wait_s: float = field(default=1.0, metadata={"help": "Wait before the first retry; doubles each time."})
    train_failed_rollouts: bool = field(
        default=False, metadata={"help": "Train rollouts that an engine error or the clock ended, too."}
    )
    max_failed_share: float = field(
        default=0.5, metadata={"help": "The run stops when more of a batch's rollouts than this fail."}
    )
    log_rollouts: int = field(
        default=1,
        metadata={"help": "Prompts whose rollouts are written to OUTPUT_DIR/rollouts, per batch; -1: all, 0: none."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rollout_engine not in ENGINES:
            raise ValueError(f"rollout_engine must be one of {', '.join(ENGINES)}, got {self.rollout_engine!r}")
        if self.rollout_engine != "auto" and self.use_vllm != (self.rollout_engine == "vllm"):
            raise ValueError(
                f'rollout_engine="vllm" and use_vllm=True go together, got {self.rollout_engine!r} and '
                f"{self.use_vllm}: TRL keeps the weights of its vLLM in step; set both, or neither"
            )
        if self.use_vllm and self.vllm_mode == "colocate" and self.vllm_tensor_parallel_size != 1:
            raise ValueError(
                "vllm_tensor_parallel_size must be 1 in colocate mode, where each process decodes its own rollouts, "
                f'got {self.vllm_tensor_parallel_size}; use vllm_mode="server" for models that need several GPUs'
            )
        if self.loss_type == "dr_grpo" and self.dynamic_sampling:
            raise ValueError(
                "dynamic_sampling drops responses, and dr_grpo divides by a constant for all of them; use "
                'loss_type="dapo"'
            )
        if not 0 <= self.max_failed_share <= 1:
            raise ValueError(f"max_failed_share must be in [0, 1], got {self.max_failed_share}")
        if self.rollout_retries < 0 or self.retry_wait_s < 0:
            raise ValueError(
                f"rollout_retries and retry_wait_s must be >= 0, got {self.rollout_retries} and {self.retry_wait_s}"
            )
        if self.temperature <= 0:
            raise ValueError(f"temperature must be > 0, got {self.temperature}: groups need different responses")
        if self.repetition_penalty != 1.0 or self.min_p:
            raise ValueError("repetition_penalty and min_p are not known to the engines; leave them at their defaults")
        if self.max_staleness is not None and self.staleness > self.max_staleness:
            raise ValueError(
                f"rollouts would be used up to {self.staleness} optimizer steps after they were made "
                f"(steps_per_generation * num_iterations / gradient_accumulation_steps), more than "
                f"max_staleness={self.max_staleness}; lower steps_per_generation or num_iterations"
            )
        self.limits  # noqa: B018 - checks the budgets

    @property
    def staleness(self) -> int:
        """Optimizer steps between a rollout and its last use; 0: one update a batch, fully on-policy."""
        uses = self.steps_per_generation * self.num_iterations
        return -(-uses // self.gradient_accumulation_steps) - 1

    @property
    def limits(self) -> Limits:
        """Budgets of a rollout."""
        total = self.max_completion_length
        limits = Limits(
            max_total_tokens=total,
            max_thread_tokens=self.max_thread_tokens or total,
            max_blocks=self.max_blocks,
            max_threads=self.max_threads,
            max_depth=self.max_depth,
            max_seconds=self.max_rollout_seconds,
        )
        return limits if self.forking else limits.sequential()
