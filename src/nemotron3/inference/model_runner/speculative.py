"""Speculative decoding by multi-token prediction (MTP).

The MTP block writes drafts, and the model verifies all of them in one step.

The inputs of the block at a position are the hidden state there and the next token, so in a prompt
it is one token behind the model. Its keys and values are in the same pages as the model's:

- A chunk of a prompt is prefilled in the block right after the model, without its last position,
  whose next token is not yet known; the hidden state there is stored in the cache (`DraftState`).
  The prefill computes keys and values only.
- After tokens are chosen, the block processes the accepted ones, and its output at the last
  position gives the first draft. Further drafts feed the block's own output back, as it was trained
  (white paper, section 2.3), and leave no state.
- While the engine does not draft, the inputs of the block are deferred (`DraftState.defer`) and
  processed in one call before the next drafts, so that a step without drafts costs almost nothing
  more. They may remain deferred at the end of an answer; a continuation processes them.

In training each depth attends to keys of its own depth; here later depths attend to the first one's
keys (docs/decisions/0013).
"""

from collections.abc import Sequence as Many

import torch
from torch import Tensor

from nemotron3.errors import ConfigError
from nemotron3.inference.model_runner import ModelRunner
from nemotron3.inference.sampling.sampler import draft
from nemotron3.inference.sequences import Sequence
from nemotron3.models.cache.draft_state import DraftState
from nemotron3.models.layout import MAX_STEPS
from nemotron3.models.nemotron_h import LanguageModel

DEFAULT_DRAFTS = 3
"""Most drafts of a step if `max_draft_tokens` is not given. One block drafts at all depths, so the
number of depths in training is no limit, and published checkpoints do not contain it."""


def most_drafts(model: LanguageModel, wanted: int | None) -> int:
    """The most drafts of a step: `wanted`, or the default if it is None.

    Raises ConfigError if the model cannot draft that many.
    """
    if wanted == 0 or (wanted is None and model.mtp is None):
        return 0
    if model.mtp is None:
        raise ConfigError(
            f"is {wanted}, but the model has no multi-token-prediction block; set it to 0",
            field="max_draft_tokens",
        )
    for mixer in model.config.mtp_layers:
        if mixer.state_size.per_sequence:
            raise ConfigError(
                f"the model's multi-token-prediction block has {mixer.label} layers, whose state "
                "rejected drafts would change; set max_draft_tokens to 0"
            )
    wanted = DEFAULT_DRAFTS if wanted is None else wanted
    if wanted >= MAX_STEPS:
        raise ConfigError(f"is {wanted}; it must be below {MAX_STEPS}", field="max_draft_tokens")
    return wanted


_MOST_PENDING = 128
"""Most steps of a sequence that are deferred, which bounds their memory."""


class Drafter:
    """Runs the MTP block beside the model."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        self.cache = runner.cache
        assert self.cache.drafts is not None, "the cache was made without drafts"
        self._drafts: DraftState = self.cache.drafts

    def read(self, chunks: Many[tuple[Sequence, int]], hidden: Tensor) -> None:
        """Prefill the chunks of prompts that the model has just prefilled, with output `hidden`."""
        drafts = self._drafts
        tokens: list[list[int]] = []
        inputs: list[Tensor] = []
        slots: list[int] = []
        cached_lengths: list[int] = []
        at = 0
        for sequence, count in chunks:
            slot = sequence.running_slot
            part, at = hidden[at : at + count], at + count
            start, end = drafts.lengths[slot], self.cache.lengths[slot]
            if end - 1 > start:
                # Deferred tokens of an earlier answer are a part of this prompt.
                inputs += [*drafts.waiting(slot, end - count), part[:-1]]
                tokens.append(sequence.tokens[start + 1 : end])
                slots.append(slot)
                cached_lengths.append(start)
            drafts.advance_prompt(slot, end, part[-1])
        if slots:
            self.runner.read_drafts(tokens, torch.cat(inputs), slots, cached_lengths)

    def advance(
        self, sequences: Many[Sequence], accepted: Many[Many[int]], hidden: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Process the accepted tokens; returns the block's output and logits after them.

        `hidden` [rows, steps, d_model] is the model's output of the step that the tokens were
        chosen from; rows beyond the accepted tokens are of rejected drafts.
        """
        self.flush(sequences)
        drafts, (rows, steps, _) = self._drafts, hidden.shape
        if rows == 1:  # with several sequences, one nearly always needs all steps
            steps = max(len(accepted[0]), 1)
            hidden = hidden[:, :steps]  # rejected tokens would load experts of their own
        slots = [sequence.running_slot for sequence in sequences]
        tokens = [[*new_tokens, *[0] * (steps - len(new_tokens))] for new_tokens in accepted]
        cached_lengths = [drafts.lengths[slot] for slot in slots]
        last = [max(len(new_tokens), 1) - 1 for new_tokens in accepted]
        after = self.runner.draft(tokens, hidden.flatten(0, 1), slots, cached_lengths, last)
        counts = [place + 1 for place in last]
        drafts.advance(slots, counts, hidden[torch.arange(rows), last])
        return after

    def defer(self, sequences: Many[Sequence], accepted: Many[Many[int]], hidden: Tensor) -> None:
        """Keep the input of `advance` in the cache, to be processed later."""
        steps = hidden.shape[1]
        kept = hidden.clone()  # the next step overwrites it
        full: list[Sequence] = []
        for sequence, new_tokens, part in zip(sequences, accepted, kept.unbind(0), strict=True):
            if not new_tokens:
                continue
            settled = part if len(new_tokens) == steps else part[: len(new_tokens)]
            if self._drafts.defer(sequence.running_slot, new_tokens, settled) >= _MOST_PENDING:
                full.append(sequence)
        self.flush(full)

    def flush(self, sequences: Many[Sequence]) -> None:
        """Process the deferred tokens of these sequences."""
        drafts = self._drafts
        pending = {
            slot: part
            for slot in [sequence.running_slot for sequence in sequences]
            if (part := drafts.pending(slot)) is not None
        }
        if not pending:
            return
        slots, parts = list(pending), list(pending.values())
        tokens, hidden = [part.tokens for part in parts], [part.hidden for part in parts]
        cached_lengths = [drafts.lengths[slot] for slot in slots]
        self.runner.read_drafts(tokens, torch.cat(hidden), slots, cached_lengths)
        last = torch.stack([part.hidden[-1] for part in parts])
        drafts.advance(slots, [len(part.tokens) for part in parts], last)

    def write(self, sequences: Many[Sequence], hidden: Tensor, logits: Tensor, count: int) -> None:
        """Draft `count` tokens for each sequence, from the results of `advance`."""
        choosers = [sequence.chooser for sequence in sequences]
        slots = [sequence.running_slot for sequence in sequences]
        drafts: list[list[int]] = [[] for _ in sequences]
        for ahead in range(count):
            if ahead:
                cached_lengths = [self._drafts.lengths[slot] + ahead - 1 for slot in slots]
                tokens, last = [[drafted[-1]] for drafted in drafts], [0] * len(slots)
                hidden, logits = self.runner.draft(tokens, hidden, slots, cached_lengths, last)
            written = draft(choosers, logits.float(), drafts)
            for drafted, token in zip(drafts, written, strict=True):
                drafted.append(token)
        for sequence, drafted in zip(sequences, drafts, strict=True):
            sequence.drafts = drafted
