"""Continuations of texts and ids, tokens of texts and texts of tokens."""

import pytest

from tests.server.serving import MODEL


def complete(client, prompt="Hello there", *, extra=None, **options):
    options = {"model": MODEL, "max_tokens": 6, "seed": 1} | options
    return client.completions.create(prompt=prompt, extra_body=extra, **options)


def test_a_text_and_its_ids_are_continued_alike(client, served):
    ids = served.llm.tokenizer.encode("Hello there")
    texts = [complete(client, prompt).choices[0].text for prompt in ("Hello there", ids, [ids])]
    assert texts[0] == texts[1] == texts[2]


def test_several_prompts_are_answered_in_their_order(client):
    alone = [complete(client, prompt).choices[0].text for prompt in ("Hello", "Paris")]
    together = complete(client, ["Hello", "Paris"], n=1)
    assert [choice.text for choice in together.choices] == alone
    assert [choice.index for choice in together.choices] == [0, 1]
    assert together.usage.completion_tokens == 12
    many = complete(client, ["Hello", "Paris"], n=2)
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
    assert many.choices[2].text == alone[1]


def test_a_stream_adds_up_to_the_whole(client):
    whole = complete(client, ["Hello", "Paris"], logprobs=1, stop=["\x00"])
    texts, tokens = ["", ""], [[], []]
    usage = None
    options = {"include_usage": True}
    for chunk in complete(
        client, ["Hello", "Paris"], logprobs=1, stop=["\x00"], stream=True, stream_options=options
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens if choice.logprobs else []
    assert texts == [choice.text for choice in whole.choices]
    assert tokens == [choice.logprobs.tokens for choice in whole.choices]
    assert usage.prompt_tokens == whole.usage.prompt_tokens
    assert usage.completion_tokens == whole.usage.completion_tokens == 12


def test_echo_alone_measures_a_text(client, served):
    ids = served.llm.tokenizer.encode("Hello there, why?")
    answer = complete(client, "Hello there, why?", echo=True, max_tokens=0, logprobs=2)
    choice = answer.choices[0]
    assert choice.text == "Hello there, why?"
    assert len(choice.logprobs.tokens) == len(ids)
    assert "".join(choice.logprobs.tokens) == choice.text
    assert choice.logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in choice.logprobs.token_logprobs[1:])
    assert choice.logprobs.text_offset[0] == 0
    assert answer.usage.completion_tokens == 0
    # What comes first and what follows is scored as what is written is.
    written = complete(client, "Hello there", temperature=0, logprobs=0)
    again = complete(
        client, "Hello there" + written.choices[0].text, echo=True, max_tokens=0, logprobs=0
    )
    if again.usage.prompt_tokens == written.usage.total_tokens:
        assert again.choices[0].logprobs.token_logprobs[-6:] == pytest.approx(
            written.choices[0].logprobs.token_logprobs, abs=1e-4
        )


def test_echo_before_an_answer(client):
    plain = complete(client, logprobs=1).choices[0]
    echoed = complete(client, echo=True, logprobs=1).choices[0]
    assert echoed.text == "Hello there" + plain.text
    assert echoed.logprobs.token_logprobs[-6:] == pytest.approx(plain.logprobs.token_logprobs)
    assert echoed.logprobs.text_offset[-6] == len("Hello there")


def test_ids_come_where_they_are_asked_for(client, served):
    choice = complete(client, extra={"return_token_ids": True}).choices[0]
    assert choice.prompt_token_ids == served.llm.tokenizer.encode("Hello there")
    assert len(choice.token_ids) == 6


def test_tokens_of_a_text_and_back(served):
    said = served.post("/tokenize", {"prompt": "Hello → there", "return_token_strs": True}).json()
    assert said["tokens"] == served.llm.tokenizer.encode("Hello → there")
    assert said["count"] == len(said["tokens"]) == len(said["token_strs"])
    assert said["max_model_len"] == 4096
    back = served.post("/detokenize", {"tokens": said["tokens"]}).json()
    assert back == {"prompt": "Hello → there"}
    assert served.post("/tokenize", {"prompt": "x"}).json()["token_strs"] is None


def test_tokens_of_a_conversation_are_those_that_a_chat_reads(served, client):
    messages = [{"role": "user", "content": "Hello"}]
    chat = {"messages": messages, "tools": [{"name": "f"}]}
    counted = served.post("/tokenize", chat).json()["count"]
    answer = client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=1, extra_body={"tools": [{"name": "f"}]}
    )
    assert answer.usage.prompt_tokens == counted
    closed = chat | {"chat_template_kwargs": {"enable_thinking": False}}
    assert served.post("/tokenize", closed).json()["tokens"][-1] == 13
    bare = served.post("/tokenize", chat | {"add_generation_prompt": False}).json()
    assert bare["count"] < counted


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": []}, "prompt"),
        ("/tokenize", {"prompt": "x", "tools": []}, "tools"),
        ("/tokenize", {"messages": [{"role": "x"}]}, "messages[0].role"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [10**30]}, "tokens"),
        ("/detokenize", {"tokens": "abc"}, "tokens"),
        ("/v1/completions", {"prompt": []}, "prompt"),
        ("/v1/completions", {"prompt": ""}, None),
        ("/v1/completions", {"prompt": [[]]}, "prompt"),
        ("/v1/completions", {"prompt": [-1]}, None),
        ("/v1/completions", {"prompt": [10**30]}, None),
        ("/v1/completions", {"prompt": "x", "suffix": "y"}, "suffix"),
        ("/v1/completions", {"prompt": "x" * 5000}, "prompt"),
        ("/v1/completions", {"prompt": "x" * 2_000_000}, "prompt"),
        ("/v1/completions", {"prompt": "x", "max_tokens": 4096}, "max_tokens"),
    ],
)
def test_what_cannot_be_is_refused_by_name(served, path, body, param):
    answer = served.post(path, body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert error["param"].startswith(param)


def test_logprobs_tell_bytes_of_characters_apart_and_where_they_stand(client):
    """Half a character has no text: its bytes are spelled out, or one would hide the other."""
    text = "naïve 🙂🙃 日本"
    echoed = complete(client, text, echo=True, logprobs=5, max_tokens=24, temperature=1.5)
    said, logprobs = echoed.choices[0].text, echoed.choices[0].logprobs
    assert said.startswith(text)
    assert any(token == "bytes:\\xf0" for token in logprobs.tokens)
    assert logprobs.text_offset == sorted(logprobs.text_offset)
    places = dict(zip(logprobs.text_offset, logprobs.tokens, strict=True))
    assert len(places) < len(logprobs.tokens)  # all bytes of one character have the same offset
    for place, token in places.items():
        if not token.startswith(("bytes:", "<")):
            assert said[place:].startswith(token)
    for token, top in zip(logprobs.tokens[1:], logprobs.top_logprobs[1:], strict=True):
        assert token in top
        assert len(top) >= 5


def test_a_streams_logprobs_stand_where_the_wholes_do(client):
    options = {"logprobs": 2, "temperature": 1.5, "max_tokens": 40}
    whole = complete(client, **options).choices[0].logprobs
    pieces = [
        chunk.choices[0].logprobs
        for chunk in complete(client, stream=True, **options)
        if chunk.choices and chunk.choices[0].logprobs
    ]
    for name in ("tokens", "text_offset", "top_logprobs"):
        assert [v for piece in pieces for v in getattr(piece, name)] == getattr(whole, name)
