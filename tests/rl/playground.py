"""A small policy, and environments that need no skill to be played."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from nemotron3.environments.environment import Environment
from nemotron3.environments.verification import FailureKind, RolloutFailedError, Verification
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.text import AssistantMessage, Tokenizer
from nemotron3.text.messages import Tool
from tests.tiny import tiny_config

VOCABULARY = 320


def save_policy(folder, pattern="ME*-E/*E/*E", **changes):
    """A model directory with random weights and a tokenizer with the tokens of chats."""
    config = tiny_config(pattern, vocab_size=VOCABULARY, hidden_size=32, **changes)
    LanguageModel.from_config(config, seed=0).save_pretrained(folder)
    text = ["user\nassistant\n", *(f"say {n} {word}" for n in range(9) for word in ("up", "down"))]
    Tokenizer.train(text * 4, vocab_size=VOCABULARY).save(folder)
    return folder


class Parity(Environment):
    """Rewards an answer of an even number of characters: any policy gets some right."""

    name: ClassVar[str] = "parity"

    def draw(self, random):
        number = random.randrange(10**6)
        return self.row(f"say {number}", number=number)

    def solve(self, row):
        del row
        return [AssistantMessage(content="up")]

    async def verify(self, row, response, session):
        del row, session
        said = "".join(turn.content + (turn.reasoning or "") for turn in response.turns)
        return Verification(reward=float(len(said) % 2 == 0), info={"answer": said})


class OtherParity(Parity):
    """The same with odd numbers."""

    name: ClassVar[str] = "odd"

    async def verify(self, row, response, session):
        even = await super().verify(row, response, session)
        return Verification(reward=1.0 - even.reward)


@dataclass
class Talk:
    """What was said in a rollout."""

    turns: list[Any] = field(default_factory=list)


class Chatter(Environment):
    """Says something back until the third turn, and counts."""

    name: ClassVar[str] = "chatter"
    max_turns = 3

    def draw(self, random):
        return self.row(f"say {random.randrange(10**6)}")

    async def seed_session(self, row):
        del row
        return Talk()

    async def step(self, session, turn):
        session.turns.append(turn)
        return None if len(session.turns) == 3 else f"and {len(session.turns)} <|im_end|>"

    async def verify(self, row, response, session):
        del row, response
        return Verification(reward=float(len(session.turns)))


class Failing(Environment):
    """Fails as often as it is told to, in the method that it is told."""

    name: ClassVar[str] = "failing"
    tools = (Tool(name="look", parameters={"type": "object"}),)
    max_turns = 4

    def __init__(self, *, difficulty=0.5, where="verify", times=0):
        super().__init__(difficulty=difficulty)
        self.where, self.left = where, times

    def _fail(self, where):
        if where == self.where and self.left > 0:
            self.left -= 1
            raise RolloutFailedError(FailureKind.JUDGE, f"no {where} today")

    def draw(self, random):
        return self.row(f"say {random.randrange(10**6)}")

    async def seed_session(self, row):
        del row
        self._fail("seed_session")

    async def step(self, session, turn):
        del session, turn
        self._fail("step")

    async def verify(self, row, response, session):
        del row, response, session
        self._fail("verify")
        return Verification(reward=1.0)
