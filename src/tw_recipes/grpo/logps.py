"""`TrieLogps`: the log-probs and entropies of a GRPO batch, with every shared token computed once.

TRL's GRPOTrainer computes policy, old and reference log-probs in one method, `_get_per_token_logps_and_entropies`, and
everything after it (losses, clipping, KL, importance correction, entropy mask, metrics) works on its (B, C) result.
This mixin overrides that method alone: rows lose their padding, fold into tries, go through the model in packed rows of
at most `max_tokens_per_forward` tokens, and the results are gathered back into (B, C), with gradients that add up at
shared tokens. Completions may branch: see `completion_parents` in `layout.scored_sequences`.

Guarded by tests/recipes/grpo/test_logps.py (against TRL's method) and test_trainer.py (against TRL's trainer).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import pad

from tw_recipes.attention import native_attention
from tw_recipes.checkpoint_graphs import CheckpointGraphs, padded_rows
from tw_recipes.grpo.layout import (
    NO_TOKEN,
    PackedForward,
    ScoredSequences,
    idle_forward,
    plan_forwards,
    scored_sequences,
)


class Structure(NamedTuple):
    """What the log-probs of the batch at hand need to know beside TRL's arguments; (B, C) each, None: nothing."""

    parents: Tensor | None = None
    generated: Tensor | None = None


class SharingError(RuntimeError):
    """The shared computation differs from the unshared one (`verify_first_step`)."""


class TrieLogps:
    """Mixin for TRL's GRPOTrainer, before it in the bases; the model must have passed `install`.

    `rollout_func` (or an override of `_generate`) may return `completion_parents` beside its other keys: one list of
    parents a completion. Tokens that `env_mask` (TRL's `tool_mask`) masks are not scored: their log-prob is 0.
    """

    _structure = Structure()
    _graphs: CheckpointGraphs | None = None
    _verified = False
    _logical_tokens = 0
    _computed_tokens = 0

    def _generate(self, prompts: list[Any]) -> Any:
        output = super()._generate(prompts)
        _, completion_ids, tool_mask, _, _, extra_fields, _, _ = output
        parents = extra_fields.pop("completion_parents", None)
        for i, (ids, own) in enumerate(zip(completion_ids, parents or [], strict=parents is not None)):
            if len(ids) != len(own):
                raise ValueError(
                    f"completion_parents[{i}] must have one parent a token, {len(ids)}, got {len(own)}; see "
                    "tw_recipes.grpo.layout.scored_sequences"
                )
        self._structure = Structure(self._padded(parents, NO_TOKEN), self._padded(tool_mask, 0))
        return output

    def _padded(self, rows: list[list[int]] | None, value: int) -> Tensor | None:
        """Rows of ints as (B, C), padded as TRL pads the completions."""
        if rows is None:
            return None
        tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
        return pad(tensors, padding_value=value, padding_side="right", pad_to_multiple_of=self.pad_to_multiple_of)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        try:
            batch = super()._generate_and_score_completions(inputs)
            parents = self._structure.parents
        finally:
            self._structure = Structure()
        return batch if parents is None else batch | {"completion_parents": parents}

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        self._structure = Structure(inputs.get("completion_parents"), inputs.get("tool_mask"))
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self._structure = Structure()

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **multimodal: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """As in TRL: log-probs (B, C), entropies (B, C) or None, load-balancing loss () or None; 0 where not scored.

        `batch_size` does not apply: forwards are cut by `max_tokens_per_forward`.
        """
        if given := sorted(name for name, value in multimodal.items() if value is not None):
            raise ValueError(f"a trie holds text alone, got {', '.join(given)}; train on images with TRL's GRPOTrainer")
        sequences = scored_sequences(input_ids, attention_mask, logits_to_keep, *self._structure)
        forwards = self._plan(sequences)
        training = torch.is_grad_enabled() and self.model.training
        if training:
            self._logical_tokens += sequences.num_tokens
            self._computed_tokens += sum(forward.packed.num_tokens for forward in forwards)
        missing = self._largest_over_ranks(max(len(forwards), 1)) - len(forwards)
        forwards += [idle_forward() for _ in range(missing)]
        results = [self._run(model, forward, compute_entropy, compute_aux_loss) for forward in forwards]
        places = torch.cat([forward.slots for forward in forwards]).to(input_ids.device)
        shape = (input_ids.shape[0], logits_to_keep)
        logps = _scatter([result[0] for result in results], places, shape)
        entropies = _scatter([result[1] for result in results], places, shape) if compute_entropy else None
        aux_loss = None
        if compute_aux_loss:
            rows = [forward.packed.num_rows if forward.slots.numel() else 0 for forward in forwards]
            losses = torch.stack([result[2] for result in results])
            aux_loss = (losses * losses.new_tensor(rows)).sum() / max(sum(rows), 1)
        if training and self.args.verify_first_step and not self._verified:
            self._verify(model, sequences, logps, entropies)
            self._verified = True
        return logps, entropies, aux_loss

    def _plan(self, sequences: ScoredSequences) -> list[PackedForward]:
        """The packed rows that compute a call's sequences."""
        return plan_forwards(sequences, self.args.max_tokens_per_forward)

    def _run(
        self, model: nn.Module, forward: PackedForward, compute_entropy: bool, compute_aux_loss: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Log-probs and entropies (T,) of one packed row, and its load-balancing loss."""
        packed = forward.packed
        if self.args.graph_rows and torch.is_grad_enabled() and self.model.training:
            self._graphs = self._graphs or CheckpointGraphs(self.model, self.args.graph_rows)
            self._graphs.install()
            if (size := padded_rows(packed.num_rows)) <= self.args.graph_rows:
                packed = packed.pad_to(size)
        packed = packed.to(self.accelerator.device)
        targets = forward.targets.to(packed.device)
        with self.accelerator.autocast():
            output = model(
                input_ids=packed.input_ids[None],
                position_ids=packed.position_ids[None],
                subtree_end=packed.subtree_end[None],
                target_rows=packed.target_rows[None],
                shift_labels=packed.target_ids[None],
                fused_lm_head=True,
                **({"output_router_logits": True} if compute_aux_loss else {}),
            )
        return (
            _pick(output.log_probs, targets),
            _pick(output.entropy, targets) if compute_entropy else None,
            output.aux_loss if compute_aux_loss else None,
        )

    def _largest_over_ranks(self, count: int) -> int:
        """Wrapped models synchronise in every forward, so all ranks must run as many as the one with most."""
        if self.accelerator.num_processes == 1:
            return count
        return int(self.accelerator.gather(torch.tensor([count], device=self.accelerator.device)).max())

    def _verify(self, model: nn.Module, sequences: ScoredSequences, logps: Tensor, entropies: Tensor | None) -> None:
        """Compare with TRL's own method on the sequences one by one, under the attention that the model came with.

        Raises:
            SharingError: The log-probs or entropies differ by more than rounding.
        """
        largest = self._largest_over_ranks(max(len(sequences.tokens), 1))
        rows = [torch.from_numpy(tokens) for tokens in sequences.tokens]
        rows += [torch.zeros(2, dtype=torch.int64)] * (largest - len(rows))
        ids = pad(rows).to(logps.device)
        mask = pad([torch.ones_like(row) for row in rows]).to(logps.device)
        with (
            torch.no_grad(),
            native_attention(self.model),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
        ):
            expected = super()._get_per_token_logps_and_entropies(
                model,
                ids,
                mask,
                ids.shape[1] - 1,
                batch_size=self.args.per_device_train_batch_size,
                compute_entropy=entropies is not None,
            )
        worst = mean = 0.0
        if sequences.tokens:
            at = torch.cat([torch.from_numpy(own[1:]) for own in sequences.masks])
            slots = torch.cat([torch.from_numpy(slots) for slots in sequences.slots])
            for found, stock in zip((logps, entropies), expected[:2], strict=True):
                if found is None:
                    continue
                alone = torch.cat([row[: len(own) - 1] for row, own in zip(stock.cpu(), sequences.masks, strict=False)])
                error = (found.detach().flatten().cpu()[slots] - alone[at]).abs()
                worst, mean = max(worst, float(error.max())), max(mean, float(error.mean()))
        self._metrics["train"]["verified_logp_difference"].append(worst)
        precise = self.model.dtype in (torch.float32, torch.float64) and self.accelerator.mixed_precision == "no"
        # Half precision rounds single tokens (and experts) apart, so there the mean is held to a limit.
        error, limit, kind = (worst, 1e-3, "largest") if precise else (mean, 5e-2, "mean")
        if not error <= limit:
            raise SharingError(
                f"verify_first_step: log-probs or entropies on the trie differ from TRL's unshared ones, {kind} "
                f"difference {error:.1e} (limit {limit:.0e}); this model does not follow tries under "
                f"attention_impl={self.args.attention_impl!r}: try another attention_impl, and report the model"
            )


def _pick(values: Tensor, targets: Tensor) -> Tensor:
    """values[0, targets], connected to the model even where `targets` is empty: a rank without rows still steps."""
    return values[0, targets] + 0.0 * values.sum() if targets.numel() == 0 else values[0, targets]


def _scatter(values: list[Tensor], places: Tensor, shape: tuple[int, int]) -> Tensor:
    flat = torch.cat(values)
    return flat.new_zeros(shape[0] * shape[1]).index_put((places,), flat).view(shape)
