"""Token-in, token-out: the ids of a turn in its message, and a later turn that continues them.

Training needs the tokens that were sampled. Their text may have other ids, so nothing that was
generated may be tokenized again. With `return_token_ids` a message of the assistant (in responses
the last item of the turn) has NeMo Gym's fields:

- `prompt_token_ids`: the whole prompt, earlier turns included
- `generation_token_ids`: what was sampled after it, the token that ended the turn included
- `generation_log_probs`: log-probability of each
- `weight_versions`: of the weights that sampled each
- `routed_experts`, with `return_routed_experts`: the experts of each token of prompt and answer,
  `[tokens][mixtures][choices]`. No layer has read the last token; its row is 0, 1, 2, ..., with
  which NeMo RL pads.

A client sends the messages back as they are. The ids of the last message that has them are then the
beginning of the prompt, and only what was said since is rendered and tokenized.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from nemotron3.errors import DataError
from nemotron3.inference.output_processor import CompletionOutput, Prompt
from nemotron3.server.http.errors import invalid_request

PROMPT_IDS, ANSWER_IDS = "prompt_token_ids", "generation_token_ids"
TOKEN_FIELDS = (
    PROMPT_IDS,
    ANSWER_IDS,
    "generation_log_probs",
    "weight_versions",
    "routed_experts",
)
REQUIRED_PREFIX = "required_prefix_token_ids"


@dataclass(frozen=True, kw_only=True)
class TokenPrefix:
    """The beginning of a prompt as ids, and how many messages it stands for."""

    ids: tuple[int, ...]
    num_messages: int


def token_fields(
    prompt: Prompt, answer: CompletionOutput, *, with_routes: bool | None
) -> dict[str, Any]:
    """The fields of a turn's message; its request must have asked for log-probabilities."""
    routes = {"routed_experts": routed_experts(answer)} if with_routes else {}
    return {
        PROMPT_IDS: list(prompt.ids),
        ANSWER_IDS: list(answer.token_ids),
        "generation_log_probs": [entry.logprob for entry in answer.logprobs],
        "weight_versions": list(answer.weight_versions),
        **routes,
    }


def routed_experts(answer: CompletionOutput) -> list[list[list[int]]]:
    """The experts of every token of prompt and answer, the last one's made up."""
    found = answer.routed_experts
    assert found is not None
    last = torch.arange(found.shape[2], dtype=found.dtype).expand(1, *found.shape[1:])
    whole: Any = torch.cat([found, last])
    return whole.tolist()


def token_prefix(
    messages: Sequence[Mapping[str, Any]], required: Sequence[int] | None = None
) -> TokenPrefix | None:
    """The ids that the conversation begins with; None where it is to be rendered as a whole.

    They are `required` if given, up to the last message of the assistant, and else those of the
    last message that has them. Raises `DataError` with the place of what is wrong.
    """
    of_assistant = [i for i, each in enumerate(messages) if each.get("role") == "assistant"]
    if required is not None:
        if not of_assistant or not required:
            raise DataError(
                "are the tokens up to the last message of the assistant; give both",
                field=REQUIRED_PREFIX,
            )
        return TokenPrefix(ids=tuple(required), num_messages=of_assistant[-1] + 1)
    for i in reversed(of_assistant):
        ids = history_ids(messages[i], f"messages[{i}]")
        if ids is not None:
            return TokenPrefix(ids=ids, num_messages=i + 1)
    return None


def history_ids(fields: Mapping[str, Any], where: str) -> tuple[int, ...] | None:
    """Prompt and answer of an earlier turn; None for a message that has no ids."""
    if fields.get(PROMPT_IDS) is None and fields.get(ANSWER_IDS) is None:
        return None
    prompt = _ids(fields.get(PROMPT_IDS), f"{where}.{PROMPT_IDS}")
    if not prompt:
        raise DataError("is empty; a turn has a prompt", field=f"{where}.{PROMPT_IDS}")
    return (*prompt, *_ids(fields.get(ANSWER_IDS), f"{where}.{ANSWER_IDS}"))


def without_token_fields(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without the fields of its tokens."""
    return {name: value for name, value in message.items() if name not in TOKEN_FIELDS}


def assert_routes(*, is_wanted: bool | None, are_recorded: bool, is_stream: bool | None) -> None:
    """Refuse a request for experts that this server or a stream does not give."""
    if not is_wanted:
        return
    name = "return_routed_experts"
    if not are_recorded:
        raise invalid_request(
            f"{name} needs a server that records them; start it with "
            "--enable-return-routed-experts",
            name,
        )
    if is_stream:
        raise invalid_request(f"{name} is not part of a stream; leave one out", name)


def _ids(value: Any, where: str) -> list[int]:
    if not isinstance(value, list):
        raise DataError(
            f"is of type {type(value).__name__}, a list of ids was expected", field=where
        )
    for place, each in enumerate(cast(list[Any], value)):
        if not isinstance(each, int) or isinstance(each, bool) or each < 0:
            raise DataError(f"is {each!r}; a token id was expected", field=f"{where}[{place}]")
    return cast(list[int], value)
