"""Reading typed fields out of a JSON object, collecting what is wrong instead of stopping at it.

Knows types and names; which fields a body has is `openai_body`'s business. `null` means absent, as
in OpenAI's API.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from services.gateway.core.refusal import Violation

PROBLEMS_MAX = 64
"""More problems than this are not reported one by one."""


class Fields:
    """One JSON object being read. What was asked for is known; the rest is unknown in the end."""

    def __init__(self, body: Mapping[str, object], path: str = "") -> None:
        self.problems: list[Violation] = []
        self.unsupported: list[Violation] = []
        self._body = body
        self._path = path
        self._known: set[str] = set()

    def nested(self, body: Mapping[str, object], path: str) -> Fields:
        """A reader of an object inside this one; it reports to the same lists."""
        inner = Fields(body, f"{self._path}{path}.")
        inner.problems, inner.unsupported = self.problems, self.unsupported
        return inner

    def raw(self, name: str) -> object:
        """The value as it is; None when absent."""
        self._known.add(name)
        return self._body.get(name)

    def number(self, name: str) -> float | None:
        value = self.raw(name)
        if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
            return value
        self._wrong(name, "must be a number", value)
        return None

    def integer(self, name: str) -> int | None:
        value = self.raw(name)
        if value is None or (isinstance(value, int) and not isinstance(value, bool)):
            return value
        self._wrong(name, "must be a whole number", value)
        return None

    def boolean(self, name: str, otherwise: bool = False) -> bool:
        value = self.raw(name)
        if value is None:
            return otherwise
        if not isinstance(value, bool):
            self._wrong(name, "must be true or false", value)
            return otherwise
        return value

    def string(self, name: str) -> str | None:
        value = self.raw(name)
        if value is None or isinstance(value, str):
            return value
        self._wrong(name, "must be a string", value)
        return None

    def token_ids(self, name: str) -> tuple[int, ...]:
        value = self.raw(name)
        if value is None:
            return ()
        if isinstance(value, list) and all_integers(value):
            return tuple(value)
        self._wrong(name, "must be a list of token ids", value)
        return ()

    def strings(self, name: str) -> tuple[str, ...]:
        """One string, or a list of them."""
        value = self.raw(name)
        if value is None:
            return ()
        if isinstance(value, str):
            return (value,)
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        self._wrong(name, "must be a string or a list of strings", value)
        return ()

    def ignore(self, names: Iterable[str]) -> None:
        """Fields that change nothing about the answer."""
        self._known.update(names)

    def refuse(self, name: str, neutral: Callable[[object], bool], instead: str = "") -> None:
        """A known field that is not offered: fine while absent, or set to what happens anyway."""
        value = self.raw(name)
        if value is not None and not neutral(value):
            self.not_offered(name, instead)

    def not_offered(self, name: str, instead: str = "") -> None:
        """Report a known feature that is not offered."""
        why = "is not supported" + (f": {instead}" if instead else "")
        self.unsupported.append(Violation(self._path + name, why))

    def problem(self, name: str, why: str) -> None:
        """Report a value that cannot be used."""
        if len(self.problems) < PROBLEMS_MAX:
            self.problems.append(Violation(self._path + name, why))

    def finish(self) -> None:
        """Report the fields that nobody asked for."""
        for name in self._body:
            if name not in self._known:
                self.problem(str(name)[:64], "is not a field that this endpoint knows: remove it")

    def _wrong(self, name: str, must: str, value: object) -> None:
        self.problem(name, f"{must}, not {kind_of(value)}")


def all_integers(values: Iterable[object]) -> bool:
    """True when every item is a whole number (and no bool)."""
    return all(type(value) is int for value in values)


def kind_of(value: object) -> str:
    """A JSON value's kind, for people."""
    match value:
        case None:
            return "null"
        case bool():
            return "true or false"
        case int() | float():
            return f"the number {value}"
        case str():
            return f"the string {value[:32]!r}"
        case list():
            return "a list"
        case _:
            return "an object"
