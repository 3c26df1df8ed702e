"""Chat templates: rendered as transformers renders them, and kept inside their sandbox."""

import pytest
from transformers.utils.chat_template_utils import _compile_jinja_template

from services.gateway.adapters.templates import (
    ChatTemplate,
    ChatTemplateError,
    special_tokens,
    template_source,
)
from tests.unit.gateway.made import CHAT_TEMPLATE

MESSAGES = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": "Où est Paris?"},
    {"role": "assistant", "content": "en France"},
]
LLAMA_LIKE = """
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- set ns = namespace(turns=0) %}
{%- for message in loop_messages %}
    {%- if message['role'] not in ['user', 'assistant'] %}{% continue %}{% endif %}
    {%- set ns.turns = ns.turns + 1 %}
    {%- if loop.first and system_message is defined %}[{{ system_message | tojson }}]{% endif %}
    {% generation %}{{ message['content'] | trim }}{% endgeneration %}
{% endfor %}
{% if tools %}TOOLS{% endif %}{% if add_generation_prompt %}>> {{ ns.turns }}{% endif %}
"""


RAG = {"name": "rag", "template": "r"}


def render(source, messages=MESSAGES, output_chars_max=10_000, **variables):
    template = ChatTemplate(source, variables, output_chars_max=output_chars_max)
    return template.render(messages, add_generation_prompt=True)


@pytest.mark.parametrize("source", [CHAT_TEMPLATE, LLAMA_LIKE])
def test_rendering_equals_transformers(source):
    oracle = _compile_jinja_template(source).render(
        messages=MESSAGES, tools=None, documents=None, add_generation_prompt=True, bos_token="<s>"
    )
    assert render(source, bos_token="<s>") == oracle


def test_json_is_not_escaped_for_html():
    assert render("{{ messages[0].content | tojson }}") == '"Be <brief> & kind."'


def test_what_the_template_raises_is_its_refusal():
    with pytest.raises(ChatTemplateError, match="only one user"):
        render("{{ raise_exception('only one user') }}")


@pytest.mark.parametrize("source", ["{{ messages[9].content }}", "{{ 1 / 0 }}", "{{ messages.foo() }}"])
def test_what_goes_wrong_inside_the_template_is_a_refusal_too(source):
    with pytest.raises(ChatTemplateError):
        render(source)


def test_a_template_that_does_not_compile_says_so():
    with pytest.raises(ChatTemplateError, match="does not compile"):
        render("{% for %}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ namespace(__class__=1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ dict.__subclasses__() }}",
    ],
)
def test_a_template_cannot_climb_out_of_its_sandbox(source):
    with pytest.raises(ChatTemplateError):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 100000000 }}",
        "{{ 100000000 * [1] }}",
        "{{ 10 ** 10000000 }}",
        "{% for i in range(99999) %}{{ 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa' }}{% endfor %}",
    ],
)
def test_a_template_cannot_make_more_than_its_bound(source):
    with pytest.raises(ChatTemplateError):
        render(source)


def test_small_repetitions_are_fine():
    assert render("{{ '-' * 3 }}{{ 2 ** 3 }}{{ 3 * 2 }}") == "---86"


def test_today_can_be_asked_for():
    assert len(render("{{ strftime_now('%Y-%m-%d') }}")) == 10


@pytest.mark.parametrize(
    ("files", "config", "found"),
    [
        ({"chat_template.jinja": b"file"}, {"chat_template": "config"}, "file"),
        ({}, {"chat_template": "config"}, "config"),
        (
            {},
            {"chat_template": [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]},
            "d",
        ),
        ({}, {"chat_template": [{"name": "rag", "template": "r"}]}, None),
        ({}, {}, None),
    ],
)
def test_a_versions_template_is_its_own_file_or_its_configs(files, config, found):
    assert template_source(files, config) == found


def test_special_tokens_may_be_objects():
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": None, "model_max_length": 5}
    assert dict(special_tokens(config)) == {"bos_token": "<s>", "eos_token": "</s>"}
