"""An environment of your own: change words by rules, with a tool that knows the rules.

    nemotron3 env show examples/own_environment.py
    nemotron3 env check examples/own_environment.py

The policy is told a word and rules. The tool `rule` says what a rule does; the answer is the word
after all of them. A right word without asking for the rules is not rewarded: their names mean
something else in every task, so it would have been a guess.
"""

from collections.abc import Mapping
from random import Random
from string import ascii_lowercase
from typing import Any

from nemotron3.environments import Environment, Row, TaskResponse, Verification
from nemotron3.text import AssistantMessage, Tool, ToolCall

EFFECTS = {
    "write it backwards": lambda word: word[::-1],
    "leave out the first letter": lambda word: word[1:],
    "write it twice": lambda word: word * 2,
    "add an s": lambda word: word + "s",
}
RULE = Tool(
    name="rule",
    description="Say what a rule does.",
    parameters={
        "type": "object",
        "properties": {"name": {"type": "string"}},
        "required": ["name"],
    },
)


class WordRules(Environment):
    """Words that are changed by rules which a tool explains."""

    name = "word_rules"
    tools = (RULE,)
    max_turns = 6

    def draw(self, random: Random) -> Row:
        """One task, from random numbers alone; harder tasks have more rules and longer words."""
        word = "".join(random.choices(ascii_lowercase, k=3 + round(5 * self.difficulty)))
        num_rules = random.randint(1, 1 + round(3 * self.difficulty))
        names = random.sample(["red", "blue", "pink", "gray", "gold"], num_rules)
        rules = {name: random.choice(list(EFFECTS)) for name in names}
        return self.row(f"Change {word} by the rules {', '.join(rules)}.", word=word, rules=rules)

    async def seed_session(self, row: Row) -> dict[str, Any]:
        """The state of one rollout. Two rollouts never share one."""
        return {"rules": row["rules"], "asked": set()}

    async def run_tool(self, session: Any, name: str, arguments: Mapping[str, Any]) -> str:
        """Called with arguments that fit the schema; wrong calls are answered for you."""
        del name  # there is one tool
        rule = arguments["name"]
        if rule not in session["rules"]:
            return f"error: there is no rule {rule}"
        session["asked"].add(rule)
        return session["rules"][rule]

    async def verify(self, row: Row, response: TaskResponse, session: Any) -> Verification:
        """All components must hold for a reward of 1."""
        return Verification.all_of(
            {
                "asked": session["asked"] == set(row["rules"]),
                "correct": response.answer == changed(row),
            },
            answer=response.answer,
        )

    def solve(self, row: Row) -> list[AssistantMessage]:
        """A right solution, turn by turn: for supervised training, and for `env check`."""
        calls = [
            AssistantMessage(
                reasoning=f"I need {name}",
                tool_calls=(ToolCall(name="rule", arguments={"name": name}, id=f"call_{i}"),),
            )
            for i, name in enumerate(row["rules"])
        ]
        reasoning = "; ".join(row["rules"].values())
        return [*calls, AssistantMessage(content=changed(row), reasoning=reasoning)]


def changed(row: Row) -> str:
    """The word after every rule."""
    word = row["word"]
    for effect in row["rules"].values():
        word = EFFECTS[effect](word)
    return word
