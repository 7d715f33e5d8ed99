"""Strangers' chat templates: what transformers gives them works, and what would never end is refused."""

from __future__ import annotations

import time

import pytest

from lightrm.errors import TemplateError
from lightrm.text import allowance
from lightrm.text.sandbox import render, template_of

MESSAGES = [{"role": "user", "content": "hi <there>"}]
# A list that holds another twice, which holds another twice: little memory, and no end of text.
DOUBLED = "{% set ns = namespace(l=['a']) %}{% for i in range(40) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}"

# Values that are each short enough, and all kept.
KEPT = (
    "{% set ns = namespace(l=[]) %}{% set s = 'a' * 9999999 %}{% macro f() %}{{ s }}{% endmacro %}"
    "{% for i in range(999) %}{% set ns.l = ns.l + [MADE] %}{% endfor %}"
)


def rendered(source: str) -> str:
    return render(template_of(source, {}), {"messages": MESSAGES})


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% for m in messages %}{{ m.content ~ loop.index ~ loop.length ~ loop.last }}{% else %}x{% endfor %}\n\n",
         "hi <there>11True"),
        ("{% generation %}{{ messages[0].content + '!' }}{% endgeneration %}-", "hi <there>!-"),
        ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "13"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "hi <there>"}]'),
        ("{{ {'b': 'é', 'a': 123456} | tojson(sort_keys=true, separators=(',', ':')) }}", '{"a":123456,"b":"é"}'),
        ("{% set ns = namespace(function=1, self=2) %}{% set ns.function = 3 %}{{ ns.function + ns.self }}", "5"),
        ("{{ dict(a=1)['a'] }}{{ dict.fromkeys('ab') }}", "1{'a': None, 'b': None}"),
        ("{{ '%05d' % 3 }}{{ '%s-%s' | format(1, 2) }}{{ '{:>4}'.format(7) }}{{ 'ab' * 2 }}{{ 2 ** 8 }}",
         "000031-2   7abab256"),
        ("{{ [1, {'a': 'b'}] }}{{ {'a': [2]}.items() }}{{ 'a\nb' | indent(2) }}{{ b }}",
         "[1, {'a': 'b'}]dict_items([('a', [2])])a\n  b"),
        ("{{ {'a': [1, 2.5], 'b': {}} | tojson(indent=2) }}", '{\n  "a": [\n    1,\n    2.5\n  ],\n  "b": {}\n}'),
        ("{{ 'abc'[1:] }}{{ messages[0:1][0].role[::-1] }}{% set a, b = [1, 2][:2] %}{{ a }}", "bcresu1"),
        ("{{ 'é' | tojson }}{{ messages | map(attribute='role') | join(',') }}", '"é"user'),
        ("{{ undefined }}{{ undefined is defined }}", "False"),
        ("{% for x in [[1, [2]]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}", "12"),
        ("{% macro f(x) %}{{ x }}{% endmacro %}{{ f(1) ~ f('a') }}", "1a"),
    ],
)  # fmt: skip
def test_what_transformers_gives_templates(source: str, text: str) -> None:
    assert rendered(source) == text


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% set l = range(9999) | list %}{% for i in l %}{% for j in l %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(s='a') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "{% set ns = namespace(s='a') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
        "{% set ns = namespace(s='a') %}{% for i in range(60) %}{% set ns.s %}{{ ns.s * 2 }}{% endset %}{% endfor %}",
        "{% set ns = namespace(s='a') %}{% for i in range(60) %}"
        "{% set ns.s = ns.s.replace('a', ns.s + 'a') %}{% endfor %}",
        "{% set ns = namespace(s='a') %}{% for i in range(60) %}"
        "{% set ns.s = ns.s | replace('a', ns.s * 2) %}{% endfor %}",
        "{% set ns = namespace(l=[1]) %}{% for i in range(60) %}{% set ns.l = ns.l + ns.l %}{% endfor %}",
        "{% set ns = namespace(n=7) %}{% for i in range(60) %}{% set ns.n = ns.n * ns.n %}{% endfor %}{{ ns.n }}",
        "{{ 'a' * 10 ** 9 }}",
        "{{ 9 ** (9 ** 9) }}",
        "{{ 'a' | center(10 ** 9) }}",
        "{{ 'a'.ljust(10 ** 9) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (10 ** 9, 1) }}",
        "{{ '{:>1000000000}'.format(1) }}",
        "{{ '{:>{}}'.format(1, 10 ** 9) }}",
        "{{ [1] | tojson(indent=10 ** 9) }}",
        "{{ [1] | tojson(indent='a' * 10 ** 7 * 2) }}",
        f"{DOUBLED}{{{{ ns.l }}}}",
        f"{DOUBLED}{{{{ ns.l | string }}}}",
        f"{DOUBLED}{{{{ ns.l | tojson }}}}",
        f"{DOUBLED}{{{{ ns.l ~ 1 }}}}",
        f"{DOUBLED}{{{{ '%s' % ns.l }}}}",
        f"{DOUBLED}{{{{ '{{}}'.format(ns.l) }}}}",
        f"{DOUBLED}{{{{ {{'a': ns.l}}.items() }}}}",
        "{{ 'a'.encode() * 10 ** 9 }}",
        "{{ ('%(x)s' * 5000) % {'x': 'a' * 9999} }}",
        "{{ ('{0}' * 5000).format('a' * 9999) }}",
        "{{ '%99999d' * 500 % ((1,) * 500) }}",
        "{{ (['a' * 9999] * 5000) | map('upper') | join }}",
        "{{ range(9999) | map('string') | join('a' * 9999) }}",
        "{{ ('\t' * 5000).expandtabs(9999) }}",
        "{{ ('a\n' * 5000) | indent(9999) }}",
        "{{ ('a\n' * 5000) | indent('a' * 9999) }}",
        "{{ ('a ' * 5000) | wordwrap(1, wrapstring='a' * 9999) }}",
        *(KEPT.replace("MADE", made) for made in ("s ~ i", "s + 'a'", "s[1:]", "s.upper()", "s | upper", "f()")),
        "{{ (['a' * 9999999] * 999) | map('upper') | list }}",
        "{{ lipsum(n=10 ** 6) }}",
        "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{{ 1 + none }}",
        "{{ [].pop() }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% set ns = namespace(_x=1) %}",
        "{{ raise_exception('roles must alternate') }}",
    ],
)
def test_what_does_not_end_or_fails_is_refused(source: str) -> None:
    template, started = template_of(source, {}), time.monotonic()
    with pytest.raises(TemplateError, match="refuses this conversation"):
        render(template, {"messages": MESSAGES})
    assert time.monotonic() - started < allowance.SECONDS + 5, "not a speed: that it ends at all"


@pytest.mark.parametrize("source", ["{{ '%s' | format(text) }}", "{{ '%s' % text }}", "{{ '{}'.format(text) }}"])
def test_what_a_format_is_given_is_no_format(source: str) -> None:
    """A caller's text with braces, percents and wide numbers is text."""
    text = "{x:>12345678} %99999999d %*d " + "{ } % " * 20000
    assert render(template_of(source, {}), {"text": text}) == text


@pytest.mark.parametrize(
    "twice",
    [
        "[{0}, {0}]", "({0}, {0})", "{{1: {0}, 2: {0}}}", "[{0}] * 2", "[{0}] + [{0}]", "dict(x={0}, y={0})",
        "dict.fromkeys('ab', {0})", "{{'a': {0}, 'b': {0}}}.items() | list", "[1] | batch(3, {0}) | list",
        "[1, 2] | slice(4, {0}) | list", "[1, 2] | map(attribute='a', default={0}) | list", "cycler({0}, {0}).items",
        "both({0}, {0})",
    ],
)  # fmt: skip
def test_what_holds_itself_twice_is_never_compared(twice: str) -> None:
    """Python compares and hashes part by part, and nothing ends that: 2^40 parts here."""
    source = "{% macro both() %}{% set ns.found = varargs %}{% endmacro %}{% set ns = namespace(a=[1], b=[1]) %}"
    source += "{% for i in range(40) %}"
    for name in ("ns.a", "ns.b"):
        made = twice.format(name)
        source += f"{{{{ {made} }}}}{{% set {name} = ns.found %}}" if "both" in made else f"{{% set {name} = {made} %}}"
    with pytest.raises(TemplateError, match="a value of more than"):
        rendered(source + "{% endfor %}{{ ns.a == ns.b }}")


def test_slow_steps_end_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allowance, "SECONDS", 0.2)
    with pytest.raises(TemplateError, match="does not come to an end within"):
        rendered("{% for x in [1, 2] recursive %}{{ loop([1, 2]) if loop.depth < 40 }}{% endfor %}")


@pytest.mark.parametrize(
    "source", ["{% for %}", "{{ x", "{% nothing %}", "{{ (" + "(" * 3000 + "1" + ")" * 3000 + ") }}"]
)
def test_what_is_no_jinja_is_refused(source: str) -> None:
    with pytest.raises(TemplateError, match="not valid Jinja"):
        template_of(source, {})
