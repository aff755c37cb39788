r"""A task on which thinking helps: sums of two to eight digits, as conversations.

    <|im_start|>user
    7+5+9<|im_end|>
    <|im_start|>assistant
    <think>
    7+5=12
    12+9=21
    </think>
    21<|im_end|>

Five of eight conversations are like this. One answers without thinking; one takes two
numbers a line, where the prompt asks for low effort; and in one the thinking breaks off
somewhere and the answer is given all the same, which is what an enforced budget asks for.

    python examples/sums.py     # shows one of each kind
"""

import random
from itertools import accumulate
from pathlib import Path

from nemotron3.data import LoadTokenizerConfig, TokenizedConfig, TokenizedSource
from nemotron3.data.token_files import TokenFileWriter
from nemotron3.text import ChatTemplate, RenderedChat, Tokenizer, chat_style

KINDS = (*["think"] * 5, "brief", "cut", "direct")
TEMPLATE = ChatTemplate(chat_style("super"))
VOCABULARY = 320


def problem(draw: random.Random, *, held_out: bool = False) -> list[int]:
    """Digits to add up; one list in ten is held out, whoever draws it."""
    while True:
        numbers = [draw.randint(1, 9) for _ in range(draw.randint(2, 8))]
        if (random.Random(repr(numbers)).random() < 0.1) == held_out:
            return numbers


def question(numbers: list[int]) -> dict[str, str]:
    """The user's message."""
    return {"role": "user", "content": "+".join(map(str, numbers))}


def reasoning(numbers: list[int], *, stride: int) -> str:
    """Running totals, with `stride` more numbers in each line."""
    totals = list(accumulate(numbers))
    lines: list[str] = []
    for start in range(0, len(numbers) - 1, stride):
        end = min(start + stride, len(numbers) - 1)
        added = "".join(f"+{number}" for number in numbers[start + 1 : end + 1])
        lines.append(f"{totals[start]}{added}={totals[end]}\n")
    return "".join(lines)


def conversation(draw: random.Random, kind: str, *, held_out: bool = False) -> RenderedChat:
    """A sum and its answer."""
    numbers = problem(draw, held_out=held_out)
    thinking = reasoning(numbers, stride=2 if kind == "brief" else 1)
    if kind == "cut":
        thinking = thinking[: draw.randrange(len(thinking))]
    if thinking and not thinking.endswith("\n"):
        thinking += "\n"
    answer = str(sum(numbers))
    if kind != "direct":  # spelled out, since a cut may leave nothing between the tags
        answer = f"<think>\n{thinking}</think>\n{answer}"
    messages = [question(numbers), {"role": "assistant", "content": answer}]
    effort = "low" if kind == "brief" else None
    return TEMPLATE.render(messages, effort=effort, add_generation_prompt=False)


def write_corpus(folder: Path, *, conversations: int) -> TokenizedConfig:
    """Token files of many conversations, and the vocabulary, learned from some of them."""
    draw = random.Random(0)
    some = (conversation(draw, draw.choice(KINDS)).text for _ in range(min(conversations, 2000)))
    tokenizer = Tokenizer.train(some, vocab_size=VOCABULARY)
    tokenizer.chat_template = TEMPLATE.to_jinja()
    tokenizer.save(folder / "tokenizer")
    for name, count in (("train", conversations), ("held_out", conversations // 50 + 10)):
        with TokenFileWriter(folder / name, vocab_size=tokenizer.vocab_size) as writer:
            for _ in range(count):
                chat = conversation(draw, draw.choice(KINDS), held_out=name == "held_out")
                writer.add([*chat.tokens(tokenizer).ids, tokenizer.eos_id])
    files = {name: str(folder / name) for name in ("train", "held_out")}
    return TokenizedConfig(
        sources=(TokenizedSource(name="sums", licence="Apache-2.0", **files),),
        tokenizer=LoadTokenizerConfig(path=str(folder / "tokenizer")),
    )


if __name__ == "__main__":
    for each in dict.fromkeys(KINDS):
        print(f"--- {each}\n{conversation(random.Random(1), each).text}")
