"""The chat template as Jinja source, for engines that read one beside the weights.

It renders the same text as `ChatTemplate.render`; a property test checks this for random
conversations. It cannot provide what depends on pieces: its text is encoded as a whole, so special
tokens in a message are tokens, and there is no loss mask.

It is written for transformers' environment (`trim_blocks`, `lstrip_blocks`, a `tojson` that escapes
nothing, `raise_exception`). Every tag strips white space on both sides, so the result does not
depend on the first two settings. Arguments of calls must be objects: Jinja cannot parse JSON text.
"""

import json

from nemotron3.text import tool_listing
from nemotron3.text.chat_style import ChatStyle
from nemotron3.text.vocabulary import THINK_END

_HEAD = """\
{#- Chat template of the Nemotron 3 family, style @NAME@, written by the package nemotron3. -#}
{%- set thinks = enable_thinking if enable_thinking is defined else true -%}
{%- set cuts = truncate_history_thinking if truncate_history_thinking is defined else true -%}
{%- set state = namespace(hint='', last_user=-1, in_tools=false) -%}
"""

_EFFORT = """\
{%- if @EFFORT@_effort is defined and @EFFORT@_effort -%}
    {%- set state.hint = state.hint ~ '\\n\\n' ~ @HINT@ -%}
{%- endif -%}
"""

_BUDGET = """\
{%- if reasoning_budget is defined and reasoning_budget is not none -%}
    {%- set state.hint = state.hint ~ '\\n\\n' ~ @BEFORE@ ~ reasoning_budget ~ @AFTER@ -%}
{%- endif -%}
"""

_MACROS = """\
{%- macro text_of(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- elif content is sequence -%}
        {%- for part in content -%}{{- part if part is string else part.text -}}{%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- macro value_of(value) -%}
    {%- if value is mapping or (value is sequence and value is not string) -%}
        {{- value | tojson -}}
    {%- else -%}
        {{- value | string -}}
    {%- endif -%}
{%- endmacro -%}
{%- macro others(fields, named) -%}
    {%- for key, value in fields | items -%}
        {%- if key not in named -%}
            {{- '\\n<' ~ key ~ '>' ~ value_of(value) ~ '</' ~ key ~ '>' -}}
        {%- endif -%}
    {%- endfor -%}
{%- endmacro -%}
{%- macro describe(tool) -%}
    {%- set schema = tool.parameters if tool.parameters is mapping else {} -%}
    {{- '\\n<function>\\n<name>' ~ tool.name ~ '</name>' -}}
    {%- if tool.description is string -%}
        {{- '\\n<description>' ~ (tool.description | trim) ~ '</description>' -}}
    {%- endif -%}
    {{- '\\n<parameters>' -}}
    {%- if schema['properties'] is mapping -%}
        {%- for name, fields in schema['properties'] | items -%}
            {{- '\\n<parameter>\\n<name>' ~ name ~ '</name>' -}}
            {%- if fields is mapping -%}
                {%- if 'type' in fields -%}
                    {{- '\\n<type>' ~ (fields['type'] | string) ~ '</type>' -}}
                {%- endif -%}
                {%- if 'description' in fields -%}
                    {%- set told = fields['description'] | string | trim -%}
                    {{- '\\n<description>' ~ told ~ '</description>' -}}
                {%- endif -%}
                {%- if 'enum' in fields -%}
                    {{- '\\n<enum>' ~ (fields['enum'] | tojson) ~ '</enum>' -}}
                {%- endif -%}
                {{- others(fields, @PARAMETER_KEYS@) -}}
            {%- endif -%}
            {{- '\\n</parameter>' -}}
        {%- endfor -%}
    {%- endif -%}
    {{- others(schema, @SCHEMA_KEYS@) -}}
    {%- if 'required' in schema -%}
        {{- '\\n<required>' ~ (schema['required'] | tojson) ~ '</required>' -}}
    {%- endif -%}
    {{- '\\n</parameters>' -}}
    {{- others(tool, @TOOL_KEYS@) -}}
    {{- '\\n</function>' -}}
{%- endmacro -%}
{%- macro write_call(call) -%}
    {{- '<tool_call>\\n<function=' ~ call.name ~ '>\\n' -}}
    {%- if call.arguments is string -%}
        {{- raise_exception('the arguments of a tool call must be an object, not JSON text') -}}
    {%- elif call.arguments is mapping -%}
        {%- for name, value in call.arguments | items -%}
            {{- '<parameter=' ~ name ~ '>\\n' ~ value_of(value) ~ '\\n</parameter>\\n' -}}
        {%- endfor -%}
    {%- endif -%}
    {{- '</function>\\n</tool_call>\\n' -}}
{%- endmacro -%}
{%- macro assistant(message, is_history) -%}
    {%- set answer = text_of(message.content) -%}
    {%- set reasoning = message.reasoning if message.reasoning is string else '' -%}
    {%- if message.reasoning_content is string -%}
        {%- set reasoning = message.reasoning_content -%}
    {%- endif -%}
    {%- set head = '<think></think>' -%}
    {%- if reasoning | trim -%}
        {%- set head = '<think>\\n' ~ reasoning ~ @BEFORE_END@ ~ '</think>' -%}
        {%- set answer = @GLUE@ ~ answer -%}
    {%- elif (answer | trim)[:7] == '<think>' and '</think>' in answer -%}
        {%- set block = answer.split('</think>')[0] ~ '</think>' -%}
        {%- set head = block | trim -%}
        {%- set answer = answer[block | length:] -%}
    {%- endif -%}
    {%- if is_history -%}
        {%- set head = '<think></think>' -%}
    {%- endif -%}
    {{- '<|im_start|>assistant\\n' -}}
    {%- if message.tool_calls -%}
        {%- if is_history -%}
            {{- head ~ @CUT_ANSWER@ ~ '\\n' -}}
        {%- else -%}
            {{- ((head ~ answer) | trim) ~ '\\n' -}}
        {%- endif -%}
        {%- for call in message.tool_calls -%}
            {{- write_call(call.function if call.function is defined else call) -}}
        {%- endfor -%}
    {%- else -%}
        {{- (head ~ answer) | trim -}}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endmacro -%}
"""

_TOOLS = """\
{%- if tools is defined and tools -%}
    {{- ('\\n\\n' if first else '') ~ @HEADING@ -}}
    {%- for tool in tools -%}
        {{- describe(tool.function if tool.function is defined else tool) -}}
    {%- endfor -%}
    {{- @INSTRUCTIONS@ -}}
{%- endif -%}
"""

_TURNS = """\
{%- set first = '' -%}
{%- set turns = messages -%}
{%- if messages and messages[0].role in ['system', 'developer'] -%}
    {%- set first = text_of(messages[0].content) -%}
    {%- set turns = messages[1:] -%}
{%- endif -%}
{%- for message in turns -%}
    {%- if message.role == 'user' -%}{%- set state.last_user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{{- '<|im_start|>system\\n' ~ first -}}
@TOOLS@{{- '<|im_end|>\\n' -}}
{%- for message in turns -%}
    {%- if state.in_tools and message.role != 'tool' -%}
        {%- set state.in_tools = false -%}
        {{- '<|im_end|>\\n' -}}
    {%- endif -%}
    {%- if message.role == 'assistant' -%}
        {{- assistant(message, cuts and loop.index0 < state.last_user) -}}
    {%- elif message.role == 'tool' -%}
        {{- '' if state.in_tools else '<|im_start|>user\\n' -}}
        {%- set state.in_tools = true -%}
        {{- '<tool_response>\\n' ~ text_of(message.content) ~ '\\n</tool_response>\\n' -}}
    {%- elif message.role in ['user', 'system', 'developer'] -%}
        {{- '<|im_start|>' ~ ('user' if message.role == 'user' else 'system') ~ '\\n' -}}
        {{- text_of(message.content) -}}
        {{- (state.hint if loop.index0 == state.last_user else '') ~ '<|im_end|>\\n' -}}
    {%- else -%}
        {{- raise_exception('unknown role: ' ~ message.role) -}}
    {%- endif -%}
{%- endfor -%}
{{- '<|im_end|>\\n' if state.in_tools else '' -}}
{%- if add_generation_prompt is defined and add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' ~ ('<think>\\n' if thinks else '<think></think>') -}}
{%- endif -%}
"""


def jinja_source(style: ChatStyle) -> str:
    """The template of a style as Jinja text."""
    before_end, glue = style.reasoning_end.split(THINK_END)
    hints = [
        _fill(_EFFORT, EFFORT=effort, HINT=_literal(hint)) for effort, hint in style.efforts.items()
    ]
    if style.budget_hint is not None:
        before, after = style.budget_hint.split("{}")
        hints.append(_fill(_BUDGET, BEFORE=_literal(before), AFTER=_literal(after)))
    macros = _fill(
        _MACROS,
        PARAMETER_KEYS=json.dumps(tool_listing.PARAMETER_KEYS),
        SCHEMA_KEYS=json.dumps(tool_listing.SCHEMA_KEYS),
        TOOL_KEYS=json.dumps(tool_listing.TOOL_KEYS),
        BEFORE_END=_literal(before_end),
        GLUE=_literal(glue),
        CUT_ANSWER="(answer | trim)" if style.strips_content_before_calls else "answer",
    )
    tools = _fill(
        _TOOLS,
        HEADING=_literal(tool_listing.HEADING),
        INSTRUCTIONS=_literal(tool_listing.INSTRUCTIONS),
    )
    turns = _fill(_TURNS, TOOLS=tools if style.lists_tools else "")
    return _fill(_HEAD, NAME=style.name) + "".join(hints) + macros + turns


def _fill(source: str, **values: str) -> str:
    for name, value in values.items():
        source = source.replace(f"@{name}@", value)
    return source


def _literal(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"
