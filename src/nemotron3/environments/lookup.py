"""Looking up a key among many, over several hops, and saying so where the answer is not there.

    bo=41 ka=ni ni=17 te=ka. Follow te.    ->  17
    bo=41 ka=ni ni=17. Find ru.            ->  unknown

Answerable and unanswerable questions are in one environment, about 15% of the latter. Alone,
"unknown" would be learned as a trick; never asked for, inventing an answer would. A verification's
`is_answerable` keeps the two rates apart. At difficulty 0 three pairs and one hop, at 1 some sixty
pairs and up to four hops, with sentences between them that do not matter.
"""

from random import Random
from typing import Any, ClassVar

from nemotron3.environments.answers import answer_turn, with_format
from nemotron3.environments.environment import Environment
from nemotron3.environments.response import TaskResponse
from nemotron3.environments.rows import Row, field_of
from nemotron3.environments.verification import Verification
from nemotron3.environments.words import WORDS
from nemotron3.text import AssistantMessage

UNKNOWN = "unknown"
UNANSWERABLE_SHARE = 0.15
_FORM = f"Answer with the number alone, or {UNKNOWN} if there is none."
_KEYS = tuple(a + b for a in "bcdfghjklmnprstvwz" for b in "aeiou")


class Lookup(Environment):
    """Keys and values, chains of keys, and questions without an answer."""

    name: ClassVar[str] = "lookup"

    def draw(self, random: Random) -> Row:
        """Pairs with one chain to follow; where there is no answer, its last link is missing."""
        num_hops = random.randint(1, 1 + round(3 * self.difficulty))
        num_others = random.randint(2, 3) + round(55 * self.difficulty**2)
        is_answerable = random.random() >= UNANSWERABLE_SHARE
        keys = random.sample(_KEYS, num_hops + num_others)
        chain, others = keys[:num_hops], keys[num_hops:]
        value = str(random.randint(10, 99))
        links = list(zip(chain, [*chain[1:], value], strict=True))
        pairs = links if is_answerable else links[:-1]
        # Some of the others lead to keys too: the kind of a value does not give the chain away.
        pairs += [(key, _value(random, others, num_hops)) for key in others]
        random.shuffle(pairs)
        facts = [f"{key}={value}" for key, value in pairs]
        if self.difficulty > 0.5:
            num_sentences = round(240 * (self.difficulty - 0.5))
            words = random.choices(WORDS, k=4 * num_sentences)
            facts += [f"The {' '.join(words[i : i + 4])}." for i in range(0, len(words), 4)]
            random.shuffle(facts)
        ask = f"Find {chain[0]}." if num_hops == 1 else f"Follow {chain[0]} to a number."
        return self.row(
            with_format(f"{' '.join(facts)}\n{ask}", _FORM, self.difficulty),
            expected_answer=value if is_answerable else UNKNOWN,
            is_answerable=is_answerable,
            chain=chain,
        )

    def solve(self, row: Row) -> list[AssistantMessage]:
        """The chain, then its end."""
        chain = field_of(row, "chain", list)
        answer = field_of(row, "expected_answer", str)
        return [answer_turn(answer, "=".join([*chain, answer]))]

    async def verify(self, row: Row, response: TaskResponse, session: Any) -> Verification:
        """1 for the value alone, or `unknown` where there is none."""
        del session
        expected = field_of(row, "expected_answer", str)
        given = response.answer.removesuffix(".")
        return Verification.all_of(
            {"correct": given == expected},
            answer=given[:40],
            is_answerable=field_of(row, "is_answerable", bool),
        )


def _value(random: Random, keys: list[str], num_hops: int) -> str:
    leads_on = num_hops > 1 and random.random() < 0.3
    return random.choice(keys) if leads_on else str(random.randint(10, 99))
