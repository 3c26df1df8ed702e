"""A model's chat template, rendered as transformers renders it, in Jinja's immutable sandbox.

Templates come with models, so they are not trusted: no attribute that begins with an underscore, no
mutation, no repetition beyond `REPEAT_MAX`, and no more output than a bound.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import jinja2.utils

REPEAT_MAX = 100_000
"""The longest that `*` may make a string or list, and the largest exponent."""


class ChatTemplateError(Exception):
    """The template refused the messages, or is broken; one line says which."""


class ChatTemplate:
    """A compiled template. `variables` are what every rendering sees (`bos_token`, …)."""

    def __init__(self, source: str, variables: Mapping[str, object], *, output_chars_max: int) -> None:
        """Raises ChatTemplateError for a source that does not compile."""
        self._variables = dict(variables)
        self._output_chars_max = output_chars_max
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"it does not compile: {error}") from None

    def render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        """The prompt. Raises ChatTemplateError for everything that goes wrong in the template."""
        values: dict[str, object] = {
            "tools": None,
            "documents": None,
            **self._variables,
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
        }
        parts: list[str] = []
        size = 0
        try:
            for part in self._template.generate(values):
                size += len(part)
                if size > self._output_chars_max:
                    raise ChatTemplateError(f"it makes more than {self._output_chars_max} characters")
                parts.append(part)
        except ChatTemplateError:
            raise
        except Exception as error:  # A template is foreign code: whatever it raises is its refusal.
            raise ChatTemplateError(str(error) or type(error).__name__) from None
        return "".join(parts)


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The immutable sandbox, with bounds on what one expression can make."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and max(abs(left), abs(right)) > REPEAT_MAX:
            raise jinja2.TemplateError(f"{left} ** {right} is too large")
        for sequence, times in ((left, right), (right, left)):
            if hasattr(sequence, "__len__") and len(sequence) * times > REPEAT_MAX:
                raise jinja2.TemplateError(f"a repetition beyond {REPEAT_MAX}")
        return super().call_binop(context, operator, left, right)


class _Namespace(jinja2.utils.Namespace):
    """`namespace()` that takes no underscored names, the door to Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # Without a named self, so that `namespace(self=1)` works as in Jinja's own.
        self, rest = args[0], args[1:]
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: object) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace takes no name that begins with '_': {name!r}")


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`, which marks the assistant's turns for training."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _environment() -> jinja2.Environment:
    environment = _Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[jinja2.ext.loopcontrols, _Generation],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _dict
    environment.globals["namespace"] = _Namespace
    return environment


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which no model was trained on.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    # A function has no attributes to climb through, unlike the class itself.
    return dict(*args, **kwargs)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def template_source(files: Mapping[str, bytes], config: Mapping[str, object]) -> str | None:
    """A version's template: a file of its own, or tokenizer_config.json's, the one named "default"."""
    for name in TEMPLATE_FILES:
        if name in files:
            return files[name].decode()
    found = config.get("chat_template")
    if isinstance(found, list):
        named = {item.get("name"): item.get("template") for item in found if isinstance(item, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


TEMPLATE_FILES = ("chat_template.jinja", "chat_template")
"""Where a version may keep its template, the first that exists."""


def special_tokens(config: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """(`bos_token`, its text) and so on, from tokenizer_config.json."""
    for key, value in config.items():
        if not key.endswith("_token"):
            continue
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            yield key, text
