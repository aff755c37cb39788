"""Lists to be copied, reversed, sorted and more, answered by the items alone.

At difficulty 0 three or four letters; then up to a dozen words or numbers, and two operations one
after the other.
"""

from random import Random
from typing import Any, ClassVar

from nemotron3.environments.answers import answer_turn, with_format
from nemotron3.environments.environment import Environment
from nemotron3.environments.response import TaskResponse
from nemotron3.environments.rows import Row, field_of
from nemotron3.environments.verification import Verification
from nemotron3.environments.words import LETTERS, WORDS
from nemotron3.text import AssistantMessage

OPERATIONS = ("copy", "reverse", "sort", "rotate left", "drop the first", "sort down")


class ListOperations(Environment):
    """Copy, reverse, sort and rotate a list of letters, words or numbers."""

    name: ClassVar[str] = "list_operations"

    def draw(self, random: Random) -> Row:
        """A list and one operation; two from difficulty 0.5 on."""
        num_items = random.randint(3 + round(3 * self.difficulty), 5 + round(7 * self.difficulty))
        items = _items(random, num_items, self.difficulty)
        known = OPERATIONS[: 3 + round(3 * self.difficulty)]
        num_operations = 2 if random.random() < 2 * self.difficulty - 1 else 1
        names = random.sample(known[1:], 2) if num_operations == 2 else [random.choice(known)]
        steps = [items]
        for name in names:
            steps.append(apply(name, steps[-1]))
        prompt = f"{', then '.join(names).capitalize()}: {' '.join(items)}"
        return self.row(
            with_format(
                prompt, "Answer with the items alone, separated by spaces.", self.difficulty
            ),
            expected_answer=" ".join(steps[-1]),
            steps=[
                f"{name}: {' '.join(step)}"
                for name, step in zip(names[:-1], steps[1:], strict=False)
            ]
            + names[-1:],
        )

    def solve(self, row: Row) -> list[AssistantMessage]:
        """The list after each operation but the last, then the last one."""
        reasoning = "\n".join(field_of(row, "steps", list))
        return [answer_turn(field_of(row, "expected_answer", str), reasoning)]

    async def verify(self, row: Row, response: TaskResponse, session: Any) -> Verification:
        """1 for the items in their order, and nothing beside them."""
        del session
        expected = field_of(row, "expected_answer", str).split()
        given = response.answer.split()
        components = {"items": sorted(given) == sorted(expected), "order": given == expected}
        return Verification.all_of(components, answer=" ".join(given))


def apply(operation: str, items: list[str]) -> list[str]:
    """The list after an operation; numbers are sorted by value."""
    key = int if all(item.isdecimal() for item in items) else str
    match operation:
        case "copy":
            return list(items)
        case "reverse":
            return items[::-1]
        case "sort":
            return sorted(items, key=key)
        case "sort down":
            return sorted(items, key=key, reverse=True)
        case "rotate left":
            return items[1:] + items[:1]
        case "drop the first":
            return items[1:]
    raise AssertionError(f"no operation {operation}")


def _items(random: Random, num_items: int, difficulty: float) -> list[str]:
    kinds = ["letters", "letters", "words", "numbers"]
    match random.choice(kinds[: 2 + round(2 * difficulty)]):
        case "letters":
            return random.sample(LETTERS, num_items)
        case "words":
            return random.sample(WORDS, num_items)
        case _:
            return [str(n) for n in random.sample(range(1000), num_items)]
