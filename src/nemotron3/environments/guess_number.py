"""A game with steps: guess a number, and be told "higher" or "lower" after each guess.

The range is in the prompt and the number is not, so nothing can be learned by heart; what can be
learned is to keep the bounds and halve them. Difficulty makes the range wider and the guesses
scarcer: halving needs log2 of the range, and at difficulty 0 there are three more than that, at 1
one more.
"""

from dataclasses import dataclass
from random import Random
from typing import ClassVar

from nemotron3.environments.answers import with_format
from nemotron3.environments.environment import Environment
from nemotron3.environments.response import TaskResponse
from nemotron3.environments.rows import Row, field_of
from nemotron3.environments.verification import Verification
from nemotron3.text import AssistantMessage

HIGHER, LOWER, INVALID = "higher", "lower", "give one number of the range"
MAX_GUESSES = 14


@dataclass
class GuessSession:
    """One game: the number, the range, the guesses that are left."""

    secret: int
    low: int
    high: int
    guesses_left: int
    is_found: bool = False
    num_guesses: int = 0


class GuessNumber(Environment):
    """Find a number by guesses that are answered with higher or lower."""

    name: ClassVar[str] = "guess_number"
    max_turns = MAX_GUESSES

    def draw(self, random: Random) -> Row:
        """A range and a number in it."""
        size = round(8 * 64**self.difficulty) + random.randrange(8)
        low = random.randrange(1, 1000)
        high = low + size - 1
        num_guesses = min(MAX_GUESSES, size.bit_length() + 3 - round(2 * self.difficulty))
        prompt = f"Guess my number from {low} to {high}. You have {num_guesses} guesses."
        return self.row(
            with_format(prompt, "Say one number at a time, and nothing else.", self.difficulty),
            secret=random.randint(low, high),
            low=low,
            high=high,
            num_guesses=num_guesses,
        )

    def solve(self, row: Row) -> list[AssistantMessage]:
        """Halve what is left until the number is found."""
        secret = field_of(row, "secret", int)
        low, high = field_of(row, "low", int), field_of(row, "high", int)
        turns: list[AssistantMessage] = []
        while True:
            guess = (low + high) // 2
            turns.append(AssistantMessage(content=str(guess), reasoning=f"{low}-{high}"))
            if guess == secret:
                return turns
            low, high = (guess + 1, high) if secret > guess else (low, guess - 1)

    async def seed_session(self, row: Row) -> GuessSession:
        """A game at its beginning."""
        return GuessSession(
            secret=field_of(row, "secret", int),
            low=field_of(row, "low", int),
            high=field_of(row, "high", int),
            guesses_left=field_of(row, "num_guesses", int),
        )

    async def step(self, session: GuessSession, turn: AssistantMessage) -> str | None:
        """Higher, lower, or the end: found, or no guess left. What is no guess costs one too."""
        said = turn.content.strip().removesuffix(".")
        session.guesses_left -= 1
        session.num_guesses += 1
        is_guess = said.isascii() and said.isdecimal() and len(said) <= 9
        is_guess = is_guess and session.low <= int(said) <= session.high
        session.is_found = is_guess and int(said) == session.secret
        if session.is_found or session.guesses_left == 0:
            return None
        if not is_guess:
            return INVALID
        return HIGHER if int(said) < session.secret else LOWER

    async def verify(self, row: Row, response: TaskResponse, session: GuessSession) -> Verification:
        """1 where the number was found with the guesses there were."""
        del row
        found = session.is_found and response.is_complete
        return Verification.all_of(
            {"found": found}, answer=response.answer[:20], num_guesses=session.num_guesses
        )
