"""Hypothesis draws chat templates, in the manner of published ones and from single features, and conversations."""
# ruff: noqa: E501 (a template's line breaks are part of it)

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

Message = dict[str, Any]
THINK = "</think>"


@dataclass(frozen=True, slots=True, eq=False)
class Family:
    """A way of writing chats. `specials`: spellings that its template writes; `plain`: those of them added as not
    special; `roles`: bos, eos, pad and unk."""

    name: str
    specials: tuple[str, ...]
    roles: Mapping[str, str]
    source: str
    before: str  # the mark before a turn, `{role}` in it stands for the role
    after: str
    plain: tuple[str, ...] = ()


CHATML = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
LLAMA2 = """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}
{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}
{% set system_message = false %}{% endif %}{% for message in loop_messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{% if loop.index0 == 0 and system_message != false %}
{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}
{% else %}{% set content = message['content'] %}{% endif %}
{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""
LLAMA3 = """{% set loop_messages = messages %}{% for message in loop_messages %}
{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}
{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
MISTRAL = """{%- if messages[0]["role"] == "system" %}{%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- set ns = namespace() %}{%- set ns.index = 0 %}
{{- bos_token }}{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}{%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}{{- "[INST] " + message["content"] + "[/INST]" }}{%- endif %}
    {%- elif message["role"] == "assistant" %}{{- " " + message["content"]|trim + eos_token}}
    {%- else %}{{- raise_exception("Only user and assistant roles are supported!") }}{%- endif %}
    {%- set ns.index = ns.index + 1 %}{%- endfor %}"""
GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}
{% else %}{% set role = message['role'] %}{% endif %}
{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"""
QWEN3 = """{%- if tools %}{{- '<|im_start|>system\n# Tools\n' + tools | tojson }}{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}{%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}{%- set ns.last_query_index = index %}{%- endif %}{%- endfor %}
{%- for message in messages %}{%- if message.content is string %}{%- set content = message.content %}
    {%- else %}{%- set content = '' %}{%- endif %}
    {%- if (message.role == "user") or (message.role == "system") %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}{%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}{%- set reasoning_content = message.reasoning_content %}
        {%- else %}{%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}{%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
            {{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
        {%- else %}{{- '<|im_start|>' + message.role + '\n' + content }}{%- endif %}
        {%- for call in message.tool_calls or [] %}{{- '<tool_call>' ~ call.function.name ~ call.function.arguments | tojson }}
        {%- endfor %}{{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\n<tool_response>\n' }}{{- content }}{{- '\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\n' }}{%- endif %}
    {%- endif %}{%- endfor %}"""
DEEPSEEK = """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{%- set ns = namespace(is_first=false, is_tool=false, system_prompt='', is_first_sp=true) %}
{%- for message in messages %}{%- if message['role'] == 'system' %}
{%- set ns.system_prompt = ns.system_prompt + message['content'] %}{%- endif %}{%- endfor %}
{{- bos_token }}{{- ns.system_prompt }}{%- for message in messages %}
{%- if message['role'] == 'user' %}{{- '<｜User｜>' + message['content'] }}{%- endif %}
{%- if message['role'] == 'assistant' %}{% set content = message['content'] %}
{%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
{{- '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}{%- endif %}{%- endfor %}"""

FAMILIES = (
    Family(
        "chatml", ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        {"eos": "<|im_end|>", "pad": "<|endoftext|>"}, CHATML, "<|im_start|>{role}\n", "<|im_end|>\n",
    ),
    Family(
        "llama2", ("<unk>", "<s>", "</s>"),
        {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": "</s>"}, LLAMA2, "[INST] ", " [/INST]",
    ),
    Family(
        "llama3", ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        {"bos": "<|begin_of_text|>", "eos": "<|eot_id|>", "pad": "<|eot_id|>"},
        LLAMA3, "<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>",
    ),
    Family(
        "mistral", ("<unk>", "<s>", "</s>", "[INST]", "[/INST]"),
        {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}, MISTRAL, "[INST]", "[/INST]", plain=("[INST]", "[/INST]"),
    ),
    Family(
        "gemma", ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        {"bos": "<bos>", "eos": "<eos>", "pad": "<eos>"}, GEMMA, "<start_of_turn>{role}\n", "<end_of_turn>\n",
        plain=("<start_of_turn>", "<end_of_turn>"),
    ),
    Family(
        "qwen3", ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", THINK, "<tool_response>"),
        {"eos": "<|im_end|>", "pad": "<|endoftext|>"}, QWEN3, "<|im_start|>{role}\n", "<|im_end|>\n",
        plain=("<think>", THINK, "<tool_response>"),
    ),
    Family(
        "deepseek", ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<think>", THINK),
        {"bos": "<｜begin▁of▁sentence｜>", "eos": "<｜end▁of▁sentence｜>", "pad": "<｜end▁of▁sentence｜>"},
        DEEPSEEK, "<｜User｜>", "<｜end▁of▁sentence｜>", plain=("<｜User｜>", "<｜Assistant｜>", "<think>", THINK),
    ),
)  # fmt: skip


@lru_cache(maxsize=4096)
def pick(*options: Any) -> SearchStrategy[Any]:
    """One of these. A strategy is costly to make and cheap to draw from: each is made once."""
    return st.sampled_from(options)


def families() -> SearchStrategy[Family]:
    return pick(*FAMILIES)


OPENINGS = (
    "", "", "{{ bos_token }}", "{{- bos_token -}}\n", "{% if bos_token is defined %}{{ bos_token }}{% endif %}",
    "{{ undefined_variable }}", "{% if tools is none %}no tools{% endif %}", "{%- if tools %}tools{% endif %}",
    "{% if documents is not none and documents %}documents{% endif %}", "{{ pad_token }} ", "{{ unk_token }}",
    "{{ image_token }}", "{{ audio_token if audio_token is defined else 'none' }}", "{{ eos_token ~ '\\n' }}",
    "{% if not add_generation_prompt %}{% set add_generation_prompt = false %}{% endif %}",
    "{% set ns = namespace(found=false) %}", "{{ strftime_now('%Y-%m-%d') }}\n", "{{ messages | length }}: ",
    "{{ 'A ' if messages[0].role == 'system' }}", "{% for x in tools or [] %}{{ x }}{% endfor %}",
    "{% set today = strftime_now('%d %b %Y') if strftime_now is defined else '' %}{{ today }}",
    "{# a comment #}\n", "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}",
    "{{ range(3) | list }}", "{{ dict(a=1) | tojson }}", "{{ cls_token if cls_token else '' }}", "\n  ",
    "{% macro say(text) %}<{{ text }}>{% endmacro %}{{ say('x') }}", "{{ bos_token + 'x' }}",
)  # fmt: skip
LOOPS = (
    "{% for message in messages %}",
    "{% for message in messages %}",
    "{%- for message in messages -%}\n",
    "{% for message in messages %}\n  ",
    "{% for message in messages if message.role != 'system' %}",
    "{% for message in messages[1:] %}",
    "{% for message in messages %}{% if loop.index0 > 2 %}{% break %}{% endif %}",
    "{% for message in messages %}{% if message.role == 'system' %}{% continue %}{% endif %}",
    "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}",
)
CONTENTS = (
    "message['content']", "message['content']", "message.content", "message.content | trim", "message.content.strip()",
    "message['content'].split('</think>')[-1]", "message.content.split('</think>')[-1].lstrip('\\n')",
    "message.get('content', '')", "message.content | default('')", "message['content'] ~ ''", "message.content.rstrip()",
    "message.content | replace('\\n', ' ')", "message.content[:12]", "message.content | upper", "message.content.lower()",
    "message.content | tojson", "(message.content if message.content is string else '')", "message.content | string",
    "' ' + message.content + ' '", "(message | tojson)", "message.content.split('\\n') | join('|')", "message.name",
    "message.content | title", "message.content | length", "message.content.replace('a', 'b')", "message.content | e",
    "message.content | wordcount", "message.content | first", "message.content | string | reverse", "message.content | indent(2)",
    "message.content.startswith('<think>')", "('</think>' in message.content)", "message.content.removeprefix('<think>')",
    "message.content * 2", "'%s' | format(message.content)", "message.content | list | join", "message.items() | list",
    "(message.content if message.content is string else message.content | map(attribute='text') | join('\n'))",
    "(message.content if message.content is string else message.content[0].text | trim)",
    "(message.content if message.content is string else '')",
    "message.reasoning_content", "(message.thinking or '') ~ message.content", "(message.tool_calls or []) | tojson",
    "(message.tool_calls | map(attribute='function.arguments') | list if message.tool_calls else message.content)",
)  # fmt: skip
AFTER = (
    "{{ eos_token }}", "{{ eos_token }}\n", "\n", "", " ", "{{ '\\n' }}", "\n\n", "{% if not loop.last %}\n{% endif %}",
    "{% if loop.last %}{{ eos_token }}{% endif %}",
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}", "{{ pad_token if loop.last }}",
    "{% if loop.index0 % 2 %}{{ eos_token }}{% endif %}", "{% set ns.found = true %}",
)  # fmt: skip
CLOSINGS = (
    "", "", "", "{{ eos_token }}", "\n", "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}", "{{ ns.found }}",
    "{{ loop is defined }}", "{{ message is defined }}", "{{ bos_token }}",
)  # fmt: skip


@st.composite
def generated(draw: DrawFn, family: Family) -> str:
    """A template made of single features."""
    before = draw(pick(family.before, family.before, "{role}: ", "", "\n{role}\n"))
    before = before.replace("{role}", draw(pick("{{ message.role }}", "{{ message['role'] }}", "user")))
    content = "{{ " + draw(pick(*CONTENTS)) + " }}"
    if draw(pick(False, False, False, True)):
        wrapped = draw(pick("{% generation %}", "{%- generation -%}\n"))
        content = f"{wrapped}{content}{{% endgeneration %}}"
    if draw(pick(False, False, False, True)):
        content = f"{{% if message.role == 'assistant' %}}{content}{{% else %}}{{{{ message.content }}}}{{% endif %}}"
    after = draw(pick(family.after, *AFTER))
    opening = draw(pick(*OPENINGS)) + draw(pick(*OPENINGS))
    return "".join([opening, draw(pick(*LOOPS)), before, content, after, "{% endfor %}", draw(pick(*CLOSINGS))])


@st.composite
def sources(draw: DrawFn, family: Family) -> str:
    return str(draw(generated(family)) if draw(pick(True, True, False)) else family.source)


FRAGMENTS = (
    " ", "  ", "\n", "\n\n", "\t", "\r\n", "hello", "Hello world", " the", "weather", "?", "!", ".", ": ", "12345", "7",
    "你好", "今天天气", "，", "é", "e\u0301", "\u0301", "😀", "👩‍👩‍👧", "שלום", "مرحبا", "<", "|", ">", "<|", "|>", "<|im_",
    "end|>", "</s", "[INST", "\x00", "\x7f", "\x1b", "\u00a0", "\u3000", "\u200b", "\ufeff", "\u2581", "\u2581\u2581",
    "\ue000", "\U000f0000", "\ufffd", "ﬁ", "Å", "İ", "\u2028", "\x85", "a" * 300, " " * 60, "<0x0A>", "{{ 7*7 }}",
    "{% raw %}", "&lt;", "\\n", '"', "'", "def f(x):\n    return", THINK, "<think>", "<tool_response>", "assistant",
    "Ġ", "##", "<unk>x", "ab" * 20,
)  # fmt: skip


@lru_cache(maxsize=4096)
def texts(specials: tuple[str, ...] = ()) -> SearchStrategy[str]:
    """What a user may write; with `specials`, their spellings too. Lone surrogates are no text: both refuse them."""
    parts = [pick(*FRAGMENTS), pick(*FRAGMENTS), st.text(st.characters(exclude_categories=["Cs"]), max_size=6)]
    if specials:
        parts.append(pick(*specials))
    return st.lists(st.one_of(*parts), max_size=6).map("".join)


@st.composite
def conversations(draw: DrawFn, specials: tuple[str, ...] = ()) -> list[Message]:
    """Turns as a chat has them; the last one is the answer that is scored."""
    content = texts(specials)
    roles = ["system"] if draw(pick(False, False, True)) else []
    for _ in range(draw(pick(0, 0, 1))):
        roles += ["user", "assistant"]
    if draw(pick(*[False] * 9, True)):
        roles += ["user", "assistant", "tool"]
    else:
        roles.append("user")
    turns: list[Message] = [{"role": role, "content": draw(content)} for role in [*roles, "assistant"]]
    listed = draw(pick(*[False] * 4, True))
    for turn in turns[:-1]:
        if listed and draw(pick(False, True)):
            texts_in_it = [turn["content"], *draw(pick((), ("\n two ",), ("", "more")))]
            turn["content"] = [{"type": "text", "text": text} for text in texts_in_it]
        if turn["role"] == "assistant" and draw(pick(False, True)):
            turn.update(draw(beside(specials)))
            if "tool_calls" in turn and draw(pick(False, True)):
                turn["content"] = None
    return turns


@st.composite
def beside(draw: DrawFn, specials: tuple[str, ...]) -> Message:
    """What an assistant's turn holds beside its content: its reasoning, a call of a tool."""
    content = texts(specials)
    found: Message = {"reasoning_content": draw(content)} if draw(pick(False, True)) else {}
    if draw(pick(False, True)):
        function = {"name": "weather", "arguments": {"city": draw(content), "days": 2}}
        found["tool_calls"] = [{"type": "function", "function": function}]
    return found
