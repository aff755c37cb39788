"""A tiny model that has learned two conversations by heart, and calls tools of its own accord.

A random model can be made to call; only a trained one decides to. Some hundred steps on two
rendered conversations are enough, and are the published template's own tokens throughout.
"""

from pathlib import Path

import torch

from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.text import ChatTemplate, Tokenizer
from tests.tiny import tiny_config

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
QUESTION = {"role": "user", "content": "Paris and Rome?"}
REASONING = "Two cities, two calls."
CALLS = [
    {
        "type": "function",
        "function": {"name": "weather", "arguments": {"city": "Paris", "days": 2}},
    },
    {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}},
]
GREETING = {"role": "user", "content": "Hi!"}
GREETED = "Hello.\n\nHow are you?"
GREETING_REASONING = "A greeting."

LEARNED = [
    ([WEATHER], [QUESTION, {"role": "assistant", "reasoning": REASONING, "tool_calls": CALLS}]),
    (
        None,
        [GREETING, {"role": "assistant", "reasoning": GREETING_REASONING, "content": GREETED}],
    ),
]
MAX_STEPS = 400


def write_learned_model(folder: Path) -> Path:
    """Train the model and write its directory."""
    template = ChatTemplate()
    rendered = [
        template.render(messages, tools=tools, add_generation_prompt=False)
        for tools, messages in LEARNED
    ]
    tokenizer = Tokenizer.train([r.text for r in rendered] * 9, vocab_size=600)
    tokenizer.chat_template = template.to_jinja()
    tokenizer.save(folder)
    torch.manual_seed(0)
    config = tiny_config("MEM*E", vocab_size=tokenizer.vocab_size, max_position_embeddings=2048)
    model = LanguageModel.from_config(config)
    samples = [r.tokens(tokenizer) for r in rendered]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(MAX_STEPS):
        losses = torch.stack([loss_of(model, s.ids, s.loss_mask) for s in samples])
        if losses.max() < 0.01:
            break
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
    assert losses.max() < 0.05, "the conversations were not learned"
    model.save_pretrained(folder)
    return folder


def loss_of(model: LanguageModel, ids: list[int], mask: list[bool]) -> torch.Tensor:
    """Cross-entropy of the tokens that are trained."""
    logits = model(torch.tensor([ids[:-1]]))[0]
    targets = torch.where(torch.tensor(mask[1:]), torch.tensor(ids[1:]), -100)
    return torch.nn.functional.cross_entropy(logits, targets)
