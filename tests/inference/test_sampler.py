import torch

from nemotron3.inference.requests import SamplingParams
from nemotron3.inference.sampler import TokenChooser, choose, draft, token_logprobs

VOCAB = 23


def chooser(index=0, seed=5, stop_ids=frozenset(), prompt=(1, 2), **params):
    return TokenChooser(
        SamplingParams(**params),
        prompt=prompt,
        seed=seed,
        index=index,
        stop_ids=stop_ids,
        vocab_size=VOCAB,
    )


def table(history, salt):
    """Logits that depend on all that came before, as a model's do."""
    seed = hash((salt, *history)) % 2**62
    return 2 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed))


def write(one, length, drafts=0, salt=0, head=1):
    tokens = []
    while len(tokens) < length:
        window = []
        for _ in range(drafts):
            window += draft([one], table((*tokens, *window), head)[None], [window])
        rows = [table((*tokens, *window[:i]), salt) for i in range(len(window) + 1)]
        (gain,) = choose([one], torch.stack(rows), [window])
        tokens += gain
        if gain[-1] in one.stop_ids:
            break
    return tokens[:length]


def test_speculation_changes_nothing():
    for params in ({"temperature": 0}, {}, {"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.2}):
        for drafts in (1, 3):
            for head in (0, 1):
                plain = write(chooser(**params), 40)
                assert write(chooser(**params), 40, drafts, head=head) == plain


def test_logprobs():
    logits = torch.tensor([[1.0, 3.0, 2.0], [0.0, 0.0, 5.0]])
    first, second = token_logprobs(logits, [2, 0], top=2)
    assert (first.rank, second.rank) == (2, 3)
    assert [token for token, _ in first.top] == [1, 2]
