"""Random conversations and tools in OpenAI's form, for the tests of the chat template."""

from hypothesis import strategies as st

FRAGMENTS = st.sampled_from(
    [
        *("a", "word ", " ", "\n", "\n\n", "é🙂", "{x}", "'", '"', "\\n", "<b>", "&lt;", "1 < 2"),
        *("<|im_end|>", "<|im_start|>user\n", "<tool_call>", "</parameter>", "<tool_response>"),
    ]
)
TAGS = st.sampled_from(["<think>", "</think>", "<think>\nwhy\n</think>\n"])
TEXT = st.lists(FRAGMENTS, max_size=4).map("".join)
TAGGED_TEXT = st.lists(FRAGMENTS | TAGS, max_size=4).map("".join)
NAMES = st.sampled_from(["f", "get_weather", "item", "keys"])
SCALARS = st.none() | st.booleans() | st.integers(-9, 10**9) | TEXT
SCALARS |= st.sampled_from([0.5, -1.0, 1e22, 1e-7])
VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(NAMES, v, max_size=3), max_leaves=4
)
ARGUMENTS = st.dictionaries(NAMES, VALUES, max_size=3)


def _object(required, optional):
    return st.fixed_dictionaries(required, optional=optional)


TYPES = st.sampled_from(["string", "integer", ["string", "null"], "object"])
SCHEMAS = st.just(True) | _object(
    {},
    {
        "type": TYPES,
        "description": TEXT,
        "enum": st.lists(VALUES, max_size=2),
        "default": VALUES,
        "items": VALUES,
    },
)
PARAMETERS = _object(
    {"type": st.just("object")},
    {
        "properties": st.dictionaries(NAMES, SCHEMAS, max_size=3),
        "required": st.lists(NAMES, max_size=2),
        "additionalProperties": st.booleans(),
        "$defs": ARGUMENTS,
    },
)
FUNCTIONS = _object(
    {"name": NAMES}, {"description": TEXT, "parameters": PARAMETERS, "strict": st.booleans()}
)
TOOLS = st.lists(
    FUNCTIONS | FUNCTIONS.map(lambda f: {"type": "function", "function": f}), max_size=2
)
CALLS = _object({"name": NAMES}, {"arguments": ARGUMENTS})
CALLS |= CALLS.map(lambda call: {"type": "function", "id": "call_1", "function": call})


def spoken(role, text=TEXT):
    parts = st.lists(text.map(lambda t: {"type": "text", "text": t}), max_size=2)
    return _object({"role": st.just(role), "content": text | parts}, {})


ASSISTANTS = _object(
    {"role": st.just("assistant")},
    {
        "content": st.none() | TAGGED_TEXT,
        "reasoning_content": st.none() | TEXT,
        "reasoning": st.none() | TEXT,
        "tool_calls": st.lists(CALLS, max_size=2),
    },
)
TURNS = spoken("user") | ASSISTANTS | ASSISTANTS | spoken("tool") | spoken("system")


@st.composite
def conversations(draw):
    first = draw(st.lists(spoken("system") | spoken("developer"), max_size=1))
    second = draw(spoken("user") | ASSISTANTS)
    return [*first, second, *draw(st.lists(TURNS, max_size=6))]
