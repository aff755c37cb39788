"""Usage: the tokens of a request, in OpenAI's fields.

Drafts are reported in the fields of predicted outputs: `accepted_prediction_tokens` are drafted
tokens that verification accepted, `rejected_prediction_tokens` the others. `completion_tokens`
includes the accepted ones only.
"""

from dataclasses import dataclass
from typing import Any

from nemotron3.inference.output_processor import RequestOutput


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens of one request, summed over its answers."""

    prompt: int
    completion: int = 0
    cached: int = 0
    reasoning: int = 0
    drafted: int = 0
    accepted: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            prompt=self.prompt + other.prompt,
            completion=self.completion + other.completion,
            cached=self.cached + other.cached,
            reasoning=self.reasoning + other.reasoning,
            drafted=self.drafted + other.drafted,
            accepted=self.accepted + other.accepted,
        )

    def body(self) -> dict[str, Any]:
        """`usage` of chats and completions."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
            "completion_tokens_details": {
                "reasoning_tokens": self.reasoning,
                "accepted_prediction_tokens": self.accepted,
                "rejected_prediction_tokens": self.drafted - self.accepted,
            },
        }

    def responses_body(self) -> dict[str, Any]:
        """`usage` of responses."""
        return {
            "input_tokens": self.prompt,
            "input_tokens_details": {"cached_tokens": self.cached, "cache_write_tokens": 0},
            "output_tokens": self.completion,
            "output_tokens_details": {"reasoning_tokens": self.reasoning},
            "total_tokens": self.prompt + self.completion,
        }


def usage_of(output: RequestOutput) -> Usage:
    """The usage of a finished request."""
    return Usage(
        prompt=len(output.prompt.ids),
        completion=sum(len(answer.token_ids) for answer in output.outputs),
        cached=output.num_cached_tokens,
        reasoning=sum(answer.num_reasoning_tokens for answer in output.outputs),
        drafted=sum(answer.acceptance.drafted for answer in output.outputs),
        accepted=sum(answer.acceptance.accepted for answer in output.outputs),
    )
