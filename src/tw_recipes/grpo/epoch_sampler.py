"""Prompts in an order that depends on the seed and the epoch alone, so that a resumed run meets the same prompts.

TRL's sampler draws a new permutation each time it is iterated; a run that resumes in its second epoch would draw the
first one again. Tests: tests/recipes/grpo/test_pgrpo_trainer.py (a resumed run repeats the reward curve).
"""

from collections.abc import Iterator

from trl.trainer.utils import RepeatSampler


class EpochRepeatSampler(RepeatSampler):
    """TRL's RepeatSampler whose permutation is that of `seed` and of the epoch that accelerate sets."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's data loader before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            self.generator.manual_seed((self.seed or 0) + 1_000_003 * self.epoch)
        return super().__iter__()
