"""Token-in, token-out over HTTP: many turns of calls, as agents of NeMo Gym play them."""

import json

import pytest
import torch

from nemotron3.models.layout import SequenceLayout
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.text import ChatTemplate, Tokenizer, UserMessage
from tests.server.serving import MODEL, running, write_model

WEATHER = {
    "type": "function",
    "name": "get_weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
        "required": ["city"],
    },
}
CHAT_WEATHER = {"type": "function", "function": {k: v for k, v in WEATHER.items() if k != "type"}}
# How each turn of the assistant is sampled, and so how it ends: 11 is <|im_end|>, 15 </tool_call>.
TURNS = [
    {"tool_choice": "required", "max": 120, "reasoning_budget": 3, "logit_bias": {"11": 50}},
    {"tool_choice": "required", "max": 120, "reasoning_budget": 2, "parallel_tool_calls": False},
    {"tool_choice": "auto", "max": 5},
    {"tool_choice": "auto", "max": 24, "reasoning_budget": 4},
    {"tool_choice": "required", "max": 9, "reasoning_budget": 1},  # a call that is cut off
    {"tool_choice": "auto", "max": 24, "reasoning_budget": 0, "logit_bias": {"11": 100}},
    {"tool_choice": "auto", "max": 24, "parallel_tool_calls": False, "logit_bias": {"15": 100}},
    {"tool_choice": "auto", "max": 24},
]


@pytest.fixture(scope="module")
def model(model_folder):
    return LanguageModel.from_pretrained(model_folder)


@pytest.fixture(scope="module")
def recording(model_folder):
    """A server that records the experts of every token."""
    with running(model_folder, return_routed_experts=True) as server:
        yield server


def asked(server, path, body):
    answer = server.post(path, {"model": MODEL, "temperature": 1.0, "top_p": 1.0, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def chat_turns(server, **options):
    """A conversation by chats, each message sent back as it came: the messages of the assistant."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Weather?"}]
    for seed, turn in enumerate(TURNS):
        settings = {k: v for k, v in turn.items() if k != "max"}
        body = {"messages": messages, "tools": [CHAT_WEATHER], "seed": seed, **settings, **options}
        message = asked(server, "/v1/chat/completions", body | {"max_tokens": turn["max"]})
        messages.append(message["choices"][0]["message"])
        yield messages[-1]
        for each in messages[-1].get("tool_calls", ()):
            said = {"role": "tool", "tool_call_id": each["id"], "content": '{"sky": "blue"}'}
            messages.append(said)
        if not messages[-1].get("content", "").startswith("{"):
            messages.append({"role": "user", "content": "And <|im_end|> tomorrow?"})


def response_turns(server, *, stored=False, stream=False):
    """The same by responses: the last items of the turns."""
    items, previous = [{"role": "user", "content": "Weather?"}], None
    for seed, turn in enumerate(TURNS):
        settings = {k: v for k, v in turn.items() if k != "max"}
        body = {
            "input": items, "tools": [WEATHER], "seed": seed, "return_token_ids": True,
            "max_output_tokens": turn["max"], "previous_response_id": previous, **settings,
        }  # fmt: skip
        if stream:
            answer = server.post(
                "/v1/responses",
                {"model": MODEL, "temperature": 1.0, "top_p": 1.0, "stream": True, **body},
            )
            events = [
                json.loads(line[6:])
                for line in answer.text.splitlines()
                if line.startswith("data: ")
            ]
            done = [each["item"] for each in events if each["type"] == "response.output_item.done"]
            output = events[-1]["response"]["output"]
            assert done == output
        else:
            response = asked(server, "/v1/responses", body)
            output = response["output"]
        yield output[-1]
        assert not any("prompt_token_ids" in item for item in output[:-1])
        said = [
            {"type": "function_call_output", "call_id": item["call_id"], "output": "blue"}
            for item in output
            if item["type"] == "function_call"
        ] or [{"role": "user", "content": "And tomorrow?"}]
        items = said if stored else [*items, *output, *said]
        previous = response["id"] if stored else None


def agree(model, turns, end_id):
    """Each prompt begins with all that was before, and one forward pass has the log-probabilities.

    Returns the ids of the whole conversation.
    """
    seen, logprobs, sampled = [], [], []
    for turn in turns:
        prompt, generated = turn["prompt_token_ids"], turn["generation_token_ids"]
        assert prompt[: len(seen)] == seen
        new = prompt[len(seen) :]
        assert not seen or end_id in (seen[-1], *new)
        seen = prompt + generated
        logprobs += [0.0] * len(new) + turn["generation_log_probs"]
        sampled += [False] * len(new) + [True] * len(generated)
        assert len(turn["weight_versions"]) == len(generated) == len(turn["generation_log_probs"])
    with torch.inference_mode():
        rows = model(torch.tensor([seen]))[0].log_softmax(-1)
    found = rows[:-1].gather(1, torch.tensor(seen[1:])[:, None])[:, 0]
    mask = torch.tensor(sampled[1:])
    assert mask.sum() > 60
    error = (found - torch.tensor(logprobs[1:]))[mask].abs().max()
    assert error <= 1e-5, float(error)
    return seen


def test_chats_continue_the_ids_that_were_sampled(served, model):
    turns = list(chat_turns(served, return_token_ids=True))
    tokenizer = served.llm.tokenizer
    agree(model, turns, tokenizer.im_end_id)
    ends = [turn["generation_token_ids"][-1] for turn in turns]
    assert tokenizer.token_to_id("</tool_call>") in ends
    assert tokenizer.im_end_id in ends
    assert any(
        end not in (tokenizer.im_end_id, tokenizer.token_to_id("</tool_call>")) for end in ends
    )


@pytest.mark.parametrize("way", [{}, {"stored": True}, {"stream": True}], ids=str)
def test_responses_continue_the_ids_that_were_sampled(served, model, way):
    agree(model, list(response_turns(served, **way)), served.llm.tokenizer.im_end_id)


def test_what_is_said_between_is_what_the_template_writes(served):
    """Where no turn is cut and none has other ids than its text, all is as if rendered anew."""
    tokenizer = served.llm.tokenizer
    template = ChatTemplate()
    head = [
        UserMessage(content="Hi"),
        {"role": "assistant", "reasoning": "Hm.", "content": "Hello"},
    ]
    whole = [*head, {"role": "user", "content": "Why?"}]
    options = {"truncate_history_thinking": False}
    rendered = template.render(whole, **options).tokens(tokenizer).ids
    before = template.render(head, add_generation_prompt=False, **options).tokens(tokenizer).ids
    prefix = before[: len(before) - before[::-1].index(tokenizer.im_end_id)]
    messages = [
        {"role": "user", "content": "other text, never read"},
        {"role": "assistant", "prompt_token_ids": prefix[:3], "generation_token_ids": prefix[3:]},
        {"role": "user", "content": "Why?"},
    ]
    body = {"messages": messages, "max_tokens": 1, "return_token_ids": True}
    got = asked(served, "/v1/chat/completions", body)["choices"][0]["message"]
    assert got["prompt_token_ids"] == rendered
    named = [{"role": "assistant", "content": "x"}, {"role": "user", "content": "Why?"}]
    body = {**body, "messages": named, "required_prefix_token_ids": prefix}
    got = asked(served, "/v1/chat/completions", body)["choices"][0]["message"]
    assert got["prompt_token_ids"] == rendered
    items = [{"role": "assistant", "content": "x"}, {"role": "user", "content": "Why?"}]
    body = {"input": items, "max_output_tokens": 1, "return_token_ids": True}
    got = asked(served, "/v1/responses", body | {"required_prefix_token_ids": prefix})
    assert got["output"][-1]["prompt_token_ids"] == rendered


def test_what_nemo_gym_asks_for(served):
    """The fields that its `vllm_model` sends with `return_token_id_information: true`."""
    body = {
        "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "logprobs": True,
        "top_logprobs": 0, "return_tokens_as_token_ids": True,
    }  # fmt: skip
    choice = asked(served, "/v1/chat/completions", body)["choices"][0]
    message, content = choice["message"], choice["logprobs"]["content"]
    ids = message["generation_token_ids"]
    assert [entry["token"] for entry in content] == [f"token_id:{token}" for token in ids]
    assert [entry["logprob"] for entry in content] == message["generation_log_probs"]
    assert "token_ids" not in choice  # vLLM's, for those who ask by its name
    plain = asked(served, "/v1/chat/completions", {**body, "return_tokens_as_token_ids": None})
    assert "prompt_token_ids" not in plain["choices"][0]["message"]
    long = {"messages": [{"role": "user", "content": "x" * 5000}]}
    refused = served.post("/v1/chat/completions", long)
    assert refused.status_code == 400
    assert "context length" in refused.text  # by which NeMo Gym knows that a rollout is full


def test_experts_are_those_of_the_forward_pass(recording, model):
    turns = list(chat_turns(recording, return_routed_experts=True))
    seen = agree(model, turns, recording.llm.tokenizer.im_end_id)
    with torch.inference_mode():
        layout = SequenceLayout.packed([len(seen)])
        output = model(torch.tensor([seen]), layout=layout, head=lambda output: output)
    chosen = torch.stack(list(output.routes.backbone), 1)
    for turn in turns:
        routes = torch.tensor(turn["routed_experts"])
        size = len(turn["prompt_token_ids"]) + len(turn["generation_token_ids"])
        assert routes.shape == (size, *chosen.shape[1:])
        assert torch.equal(routes[:-1].sort(-1).values, chosen[: size - 1].sort(-1).values)
        assert torch.equal(routes[-1], torch.arange(routes.shape[2]).expand(routes.shape[1:]))
    body = {"prompt": "Hello", "max_tokens": 3, "return_routed_experts": True}
    choice = asked(recording, "/v1/completions", body)["choices"][0]
    assert len(choice["routed_experts"]) == len(recording.llm.tokenizer.encode("Hello")) + 3
    body = {"input": "Hello", "max_output_tokens": 3, "return_routed_experts": True}
    item = asked(recording, "/v1/responses", body)["output"][-1]
    assert len(item["routed_experts"]) == len(item["prompt_token_ids"]) + 3


HI = {"role": "user", "content": "Hi"}
TURN = {"role": "assistant", "content": "x", "prompt_token_ids": [1], "generation_token_ids": [2]}
WRONG = {
    "no list": ({**TURN, "prompt_token_ids": "1"}, {}, "messages[0].prompt_token_ids"),
    "no id": ({**TURN, "generation_token_ids": [True]}, {}, "messages[0].generation_token_ids[0]"),
    "negative": (
        {**TURN, "generation_token_ids": [1, -1]},
        {},
        "messages[0].generation_token_ids[1]",
    ),
    "half": ({**TURN, "generation_token_ids": None}, {}, "messages[0].generation_token_ids"),
    "no prompt": ({**TURN, "prompt_token_ids": []}, {}, "messages[0].prompt_token_ids"),
    "an empty prefix": (TURN, {"required_prefix_token_ids": []}, "required_prefix_token_ids"),
    "no turn": (HI, {"required_prefix_token_ids": [1]}, "required_prefix_token_ids"),
    "too long": ({**TURN, "prompt_token_ids": [1] * 5000}, {}, "messages"),
    "a message after it": (TURN, {"messages": [TURN, {"role": "user"}]}, "messages[1].content"),
    "no experts": (TURN, {"return_routed_experts": True}, "return_routed_experts"),
}


@pytest.mark.parametrize(("message", "more", "param"), WRONG.values(), ids=WRONG.keys())
def test_ids_that_are_none_are_refused(served, message, more, param):
    answer = served.post(
        "/v1/chat/completions", {"messages": [message, HI], "max_tokens": 1, **more}
    )
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_more_that_is_refused(served, recording):
    beyond = {**TURN, "prompt_token_ids": [10**6]}
    answer = served.post("/v1/chat/completions", {"messages": [beyond, HI]})
    assert answer.status_code == 400, answer.text
    item = {**TURN, "generation_token_ids": [None]}
    answer = served.post("/v1/responses", {"input": [item, HI]})
    assert answer.json()["error"]["param"] == "input[0].generation_token_ids[0]"
    streamed = {"messages": [HI], "stream": True, "return_routed_experts": True}
    answer = recording.post("/v1/chat/completions", streamed)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "return_routed_experts")
    answer = recording.post("/v1/completions", {"prompt": "x", "return_tokens_as_token_ids": True})
    assert answer.json()["error"]["param"] == "return_tokens_as_token_ids"


def test_models_with_a_template_of_others_say_so(tmp_path):
    folder = write_model(tmp_path)
    tokenizer = Tokenizer.from_directory(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save(folder)
    with running(folder) as server:
        answer = server.post("/v1/chat/completions", {"messages": [TURN, HI], "max_tokens": 1})
    assert answer.status_code == 400, answer.text
    assert "the model has another one" in answer.text
