"""Drafting by multi-token prediction: the shared block writes ahead, the model checks in one step.

The block reads, for each position, the hidden state there and the token after it, so in a prompt it
is one token behind the state. Its keys and values lie in the same pages as the model's:

- a prompt's chunk is read right after the model has read it, but for the last position, whose next
  token is not known yet; its hidden state waits in the cache (`DraftState`). To read is to
  make keys and values: nobody asks for outputs there;
- after tokens were chosen, the block reads what they settle, and its output at the last position
  gives the first draft; further drafts feed its own output back, as it was trained to (white paper,
  section 2.3), and leave nothing behind;
- while nothing is drafted, what it would read is deferred (`DraftState.defer`), and
  read in one go when drafts are wanted again, so that drafting nothing costs next to nothing. An
  answer may end with it: whoever goes on from there reads it first.

Training gives each depth keys of its own depth; here later depths look back at the first one's.
"""

from collections.abc import Sequence as Many

import torch
from torch import Tensor

from nemotron3.errors import ConfigError
from nemotron3.inference.model_runner import ModelRunner
from nemotron3.inference.sampler import draft
from nemotron3.inference.sequences import Sequence
from nemotron3.models.cache.draft_state import DraftState
from nemotron3.models.layout import MAX_STEPS
from nemotron3.models.nemotron_h import LanguageModel

DEFAULT_DRAFTS = 3
"""Most drafts where nobody says how many. One block drafts at all depths, so the number that it was
trained at is no limit, and published checkpoints do not tell it."""


def most_drafts(model: LanguageModel, wanted: int | None) -> int:
    """How many tokens may be drafted: what is wanted, else the default."""
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
                f"the model's multi-token-prediction block has {mixer.label} layers, which drafts "
                "cannot be taken back from; set max_draft_tokens to 0"
            )
    wanted = DEFAULT_DRAFTS if wanted is None else wanted
    if wanted >= MAX_STEPS:
        raise ConfigError(f"is {wanted}; it must be below {MAX_STEPS}", field="max_draft_tokens")
    return wanted


_MOST_PENDING = 128
"""Steps of a sequence that are deferred: a bound of memory, and enough to make reading cheap."""


class Drafter:
    """Runs the draft block along with the model."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        self.cache = runner.cache
        assert self.cache.drafts is not None, "the cache was made without drafts"
        self._drafts: DraftState = self.cache.drafts

    def read(self, chunks: Many[tuple[Sequence, int]], hidden: Tensor) -> None:
        """Follow the model over chunks of prompts that it has just read; `hidden` is its output."""
        drafts = self._drafts
        tokens: list[list[int]] = []
        inputs: list[Tensor] = []
        slots: list[int] = []
        cached_lengths: list[int] = []
        at = 0
        for sequence, count in chunks:
            slot = _slot(sequence)
            part, at = hidden[at : at + count], at + count
            start, end = drafts.lengths[slot], self.cache.lengths[slot]
            if end - 1 > start:
                # What was deferred before this prompt is a part of it, so its tokens are here.
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
        """Read what newly chosen tokens settle; returns the block's output and logits after it.

        `hidden` [rows, steps, d_model] is the model's, at and before the last of the tokens that
        each sequence's state holds; what is beyond the accepted tokens was refused.
        """
        self.flush(sequences)
        drafts, (rows, steps, _) = self._drafts, hidden.shape
        if rows == 1:  # of several one is long nearly always
            steps = max(len(accepted[0]), 1)
            hidden = hidden[:, :steps]  # what is beyond would choose experts of its own
        slots = [_slot(sequence) for sequence in sequences]
        tokens = [[*new_tokens, *[0] * (steps - len(new_tokens))] for new_tokens in accepted]
        cached_lengths = [drafts.lengths[slot] for slot in slots]
        last = [max(len(new_tokens), 1) - 1 for new_tokens in accepted]
        after = self.runner.draft(tokens, hidden.flatten(0, 1), slots, cached_lengths, last)
        counts = [place + 1 for place in last]
        drafts.advance(slots, counts, hidden[torch.arange(rows), last])
        return after

    def defer(self, sequences: Many[Sequence], accepted: Many[Many[int]], hidden: Tensor) -> None:
        """Read later what `advance` would read now."""
        steps = hidden.shape[1]
        kept = hidden.clone()  # the next step writes over it
        full: list[Sequence] = []
        for sequence, new_tokens, part in zip(sequences, accepted, kept.unbind(0), strict=True):
            if not new_tokens:
                continue
            settled = part if len(new_tokens) == steps else part[: len(new_tokens)]
            if self._drafts.defer(_slot(sequence), new_tokens, settled) >= _MOST_PENDING:
                full.append(sequence)
        self.flush(full)

    def flush(self, sequences: Many[Sequence]) -> None:
        """Read what was deferred."""
        drafts = self._drafts
        pending = {
            slot: part
            for slot in map(_slot, sequences)
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
        """Draft `count` tokens for each sequence, from what `advance` returned."""
        choosers = [sequence.chooser for sequence in sequences]
        slots = [_slot(sequence) for sequence in sequences]
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


def _slot(sequence: Sequence) -> int:
    assert sequence.slot is not None
    return sequence.slot
