"""Chat templates of published families, in short forms, on each kind of tokenizer: text and ids are transformers'.

Each form has what tells its family from others: who writes BOS, a date, a system text of its own, what becomes of tools,
reasoning and lists of text parts. `chat_draws` has Llama-2, Llama-3, Gemma-2, Qwen3 and DeepSeek.
"""
# ruff: noqa: E501 (a template's line breaks are part of it)

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, processors

from lightrm.text.conversation import turns_of
from tests import chat_draws
from tests.text_parity import Made, Ours, Refused, Theirs, equal_ids
from tests.vocabularies import Json, add_tokens, as_json, ids_of, sentencepiece_model, tokenizer_json

LLAMA31 = """{{- bos_token }}{%- set date = strftime_now("%d %b %Y") if strftime_now is defined else "26 Jul 2024" %}
{%- if messages[0].role == 'system' %}{%- set system = messages[0].content | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}{%- if tools is not none %}{{- "Environment: ipython\n" }}{%- endif %}
{{- "Cutting Knowledge Date: December 2023\nToday Date: " + date + "\n\n" + system + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role in ('ipython', 'tool') or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if message.tool_calls | length != 1 %}{{- raise_exception("one tool call at once") }}{%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}{{- "}<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\n\n" }}
        {{- message.content | tojson if message.content is mapping or message.content is iterable else message.content }}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}"""
QWEN25 = """{%- if messages[0]['role'] != 'system' %}{{- '<|im_start|>system\nYou are Qwen.<|im_end|>\n' }}{%- endif %}
{%- for message in messages %}
    {%- if message.role in ("user", "system") or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}{%- if message.content %}{{- '\n' + message.content }}{%- endif %}
        {%- for call in message.tool_calls %}{%- if call.function is defined %}{%- set call = call.function %}{%- endif %}
            {{- '\n<tool_call>\n{"name": "' + call.name + '", "arguments": ' }}{{- call.arguments | tojson }}{{- '}\n</tool_call>' }}
        {%- endfor %}{{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.index0 == 0 or messages[loop.index0 - 1].role != "tool" %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != "tool" %}{{- '<|im_end|>\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}"""
GEMMA3 = """{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}{%- set first = messages[0]['content'] + '\n\n' -%}
    {%- else -%}{%- set first = messages[0]['content'][0]['text'] + '\n\n' -%}{%- endif -%}
    {%- set turns = messages[1:] -%}
{%- else -%}{%- set first = "" -%}{%- set turns = messages -%}{%- endif -%}
{%- for message in turns -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception("Roles must alternate") }}{%- endif -%}
    {{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' + (first if loop.first else "") }}
    {%- if message['content'] is string -%}{{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}{%- if item['type'] == 'image' -%}{{ '<image>' }}{%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}{%- endfor -%}
    {%- else -%}{{ raise_exception("Invalid content type") }}{%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}"""
TEKKEN = """{{- bos_token }}{%- for message in messages %}
    {%- set content = message.content if message.content is string else message.content | map(attribute='text') | join('') if message.content else '' %}
    {%- if message.role == 'system' %}{{- '[SYSTEM_PROMPT]' + content + '[/SYSTEM_PROMPT]' }}
    {%- elif message.role == 'user' %}{{- '[INST]' + content + '[/INST]' }}
    {%- elif message.role == 'tool' %}
        {%- if message.tool_call_id is undefined or message.tool_call_id | length != 9 %}{{- raise_exception('ids have nine letters') }}{%- endif %}
        {{- '[TOOL_RESULTS]' + content + '[/TOOL_RESULTS]' }}
    {%- elif message.role == 'assistant' %}
        {%- if message.tool_calls is defined and message.tool_calls is not none %}{{- '[TOOL_CALLS][' }}
            {%- for call in message.tool_calls %}{{- call.function | tojson }}{%- if not loop.last %}{{- ', ' }}{%- endif %}{%- endfor %}{{- ']' + eos_token }}
        {%- else %}{{- content + eos_token }}{%- endif %}
    {%- else %}{{- raise_exception('Only user, system, assistant and tool roles') }}{%- endif %}
{%- endfor %}"""
PHI3 = """{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}{{'<|system|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"""
TULU = """{% for message in messages %}{% if message['role'] in ['system', 'user'] %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '\n' }}
{%- elif not loop.last %}{{ '<|assistant|>\n' + message['content'] + eos_token + '\n' }}
{%- else %}{{ '<|assistant|>\n' + message['content'] + eos_token }}{% endif %}{% endfor %}"""
MARKED = """{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}{% if message.role == 'assistant' %}{% generation %}{{ (message.reasoning_content or '') ~ (message.content or '') + '<|im_end|>' }}{% endgeneration %}
{% else %}{{ message.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"""
INTERNLM2 = "{{ bos_token }}" + chat_draws.CHATML
FAMILIES = {
    "chatml": chat_draws.CHATML, "llama-2": chat_draws.LLAMA2, "llama-3": chat_draws.LLAMA3, "llama-3.1": LLAMA31,
    "qwen2.5": QWEN25, "qwen3": chat_draws.QWEN3, "gemma-2": chat_draws.GEMMA, "gemma-3": GEMMA3,
    "mistral-v0.3": chat_draws.MISTRAL, "mistral-tekken": TEKKEN, "phi-3": PHI3, "internlm2": INTERNLM2, "tulu": TULU,
    "deepseek-r1": chat_draws.DEEPSEEK, "marked": MARKED,
}  # fmt: skip
MARKS = (
    "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>",
    "<end_of_turn>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<｜User｜>", "<｜Assistant｜>",
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
)  # fmt: skip
PLAIN = MARKS[-6:]
KINDS = ("bytes", "metaspace", "wordpiece", "model, legacy", "model, not legacy")


def turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


CALL = {
    "id": "abcdefghi",
    "type": "function",
    "function": {"name": "weather", "arguments": {"days": 2, "city": "東京"}},
}
TOOL = turn("tool", " 7 °C ", name="weather", tool_call_id="abcdefghi")
CHATS: dict[str, Sequence[dict[str, Any]]] = {
    "one turn": [turn("user", "  what is it?\n")],
    "turns": [turn("user", "what"), turn("assistant", " it is "), turn("user", "天气 <|im_end")],
    "system": [turn("system", " be brief "), turn("user", "x")],
    "tool": [turn("user", "x"), turn("assistant", None, tool_calls=[CALL]), TOOL],
    "tool, said": [turn("user", "x"), turn("assistant", "so", tool_calls=[CALL]), TOOL, turn("assistant", "7"), turn("user", "y")],
    "thought": [turn("user", "x"), turn("assistant", "<think>\nhm\n</think>\n\ny"), turn("user", "z")],
    "reasoning": [turn("user", "x"), turn("assistant", "y", reasoning_content="hm"), turn("user", "z")],
    "thinking": [turn("user", "x"), turn("assistant", "y", thinking="hm"), turn("user", "z")],
    "parts": [turn("system", parts(" s ", "t")), turn("user", parts(" a ", " b\n")), turn("assistant", "c"), turn("user", parts("d "))],
}  # fmt: skip
ANSWERS = ("it is warm.", "<think>\nso\n</think>\n\n warm \n")


def write(folder: Path, kind: str, template: str) -> Path:
    """A tokenizer that adds BOS to any text, with every family's marks."""
    flags = {name: {"special": name not in PLAIN, "normalized": False} for name in ("<s>", "</s>", *MARKS)}
    config: Json = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    if kind.startswith("model"):
        (folder / "tokenizer.model").write_bytes(sentencepiece_model())
        config |= {"tokenizer_class": "LlamaTokenizer", "legacy": kind == "model, legacy", "add_bos_token": True}
        config["added_tokens_decoder"] = {
            str(600 + k): {"content": name, **flags[name], "lstrip": False, "rstrip": False, "single_word": False}
            for k, name in enumerate(MARKS)
        }
    else:
        base = {"bytes": "qwen", "metaspace": "metaspace first"}.get(kind, kind)
        description = add_tokens(tokenizer_json(base), list(flags.items()))
        tokenizer = Tokenizer.from_str(json.dumps(description))
        bos = ("<s>", ids_of(description)["<s>"])
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
        (folder / "tokenizer.json").write_text(json.dumps(as_json(tokenizer)))
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_text_and_ids_are_transformers(family: str, kind: str, tmp_path: Path) -> None:
    folder = write(tmp_path, kind, FAMILIES[family])
    theirs, ours = Theirs(folder), Ours(folder, parse_specials=False)
    wrong, rendered = [], 0
    for name, chat in CHATS.items():
        for answer in ANSWERS:
            expected = theirs.chat([*chat, turn("assistant", answer)])
            found = ours.encode("chat", turns_of(chat), answer)
            if (fault := equal_ids(found, expected)) is not None:
                wrong.append(f"{name}: {fault}")
            if isinstance(found, Made):
                rendered += 1
                bos = found.ids.count(theirs.tokenizer.bos_token_id)
                assert bos == (found.text or "").count("<s>"), "BOS as the template writes it, never doubled"
    assert not wrong, "\n".join(wrong)
    assert rendered >= 4


REFUSED = {"gemma-2": "System role not supported", "gemma-3": "Roles must alternate", "mistral-v0.3": "Only user and"}


@pytest.mark.parametrize("family", REFUSED)
def test_what_a_template_refuses(family: str, tmp_path: Path) -> None:
    ours = Ours(write(tmp_path, "bytes", FAMILIES[family]), parse_specials=False)
    chats = {
        "gemma-2": CHATS["system"],
        "gemma-3": [turn("user", "x"), turn("user", "y")],
        "mistral-v0.3": CHATS["tool"],
    }
    found = ours.encode("chat", turns_of(chats[family]), "z")
    assert isinstance(found, Refused)
    assert "TemplateError" in found.message
    assert REFUSED[family] in found.message


def test_lists_of_parts_reach_a_template_that_reads_them(tmp_path: Path) -> None:
    """Gemma 3's trims each; Qwen3's would leave them out, Tulu's would refuse them: both get one string."""
    shown = {}
    for family in ("gemma-3", "qwen3", "tulu"):
        (tmp_path / family).mkdir()
        ours = Ours(write(tmp_path / family, "bytes", FAMILIES[family]), parse_specials=False)
        found = ours.encode("chat", turns_of([turn("user", parts(" a ", " b "))]), "c")
        assert isinstance(found, Made)
        shown[family] = (found.text or "").split("user")[1].split("<")[0]
    assert shown == {"gemma-3": "\nab", "qwen3": "\n a  b ", "tulu": "|>\n a  b \n"}
