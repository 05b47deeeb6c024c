"""Policy gradients on tries: TRL's GRPO with every shared token computed once, and P-GRPO on fork/join rollouts."""
