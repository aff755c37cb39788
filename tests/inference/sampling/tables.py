"""A model that is a table: logits that depend on all that came before, as a language model's do."""

import torch

from nemotron3.inference.sampling.sampler import choose, draft


def table(history, vocab, salt):
    """The logits after a history; another salt gives another model, such as a draft head."""
    seed = hash((salt, *history)) % 2**62  # of integers, so the same in every process
    return 2 * torch.randn(vocab, generator=torch.Generator().manual_seed(seed))


def write(choosers, length, *, vocab, drafts=0, salt=0, head=0):
    """The tokens that the choosers generate together, with drafts from the table of `head`."""
    answers = [[] for _ in choosers]
    running = list(range(len(choosers)))
    while running:
        those = [choosers[i] for i in running]
        windows = [[] for _ in running]
        for _ in range(drafts):
            logits = [table((*answers[i], *windows[j]), vocab, head) for j, i in enumerate(running)]
            for window, token in zip(
                windows, draft(those, torch.stack(logits), windows), strict=True
            ):
                window.append(token)
        rows = [
            table((*answers[i], *window[:ahead]), vocab, salt)
            for i, window in zip(running, windows, strict=True)
            for ahead in range(drafts + 1)
        ]
        accepted = choose(those, torch.stack(rows), windows)
        for i, new_tokens in zip(list(running), accepted, strict=True):
            assert choosers[i].error is None, choosers[i].error
            assert 1 <= len(new_tokens) <= drafts + 1
            answers[i] += new_tokens
            if new_tokens[-1] in choosers[i].stop_ids or len(answers[i]) >= length:
                running.remove(i)
    return [answer[:length] for answer in answers]
