"""Print the part of requirements.lock that the services run with: no test tools, no compilers.

The lock says of every package who wants it (`# via`). Kept is what the project's own dependencies
reach, with versions and hashes as they are.

    python runtime_requirements.py [--without NAME ...]
"""

from __future__ import annotations

import argparse
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def entries(lock: str) -> dict[str, str]:
    """The lock's text for each package; one that is pinned differently for some Pythons has several pins."""
    found: dict[str, str] = {}
    for part in re.split(r"^(?=[a-z0-9])", lock, flags=re.MULTILINE):
        if match := re.match(r"[a-z0-9-]+", part):
            found[match[0]] = found.get(match[0], "") + part
    return found


def wanted_by(entry: str) -> set[str]:
    """Who wants the package of this entry."""
    return set(re.findall(r"^ +#(?: via)? +([a-z0-9-]+)", entry, flags=re.MULTILINE)) - {"via"}


def reached(wants: dict[str, set[str]], roots: set[str]) -> set[str]:
    """The roots, and whatever a package that is reached wants."""
    found = roots & wants.keys()
    while more := {name for name, callers in wants.items() if callers & found} - found:
        found |= more
    return found


def runtime(lock: str, dependencies: list[str], without: set[str]) -> str:
    """The lock's entries that `dependencies` reach, those of `without` not followed."""
    found = entries(lock)
    roots = {re.split(r"[^A-Za-z0-9-]", name, maxsplit=1)[0].lower() for name in dependencies} - without
    unknown = roots - found.keys()
    if unknown:
        raise SystemExit(f"not in requirements.lock: {', '.join(sorted(unknown))}")
    keep = reached({name: wanted_by(entry) for name, entry in found.items() if name not in without}, roots)
    return "".join(found[name] for name in sorted(keep))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--without", nargs="*", default=[])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lock = (ROOT / "requirements.lock").read_text()
    print(runtime(lock, project["dependencies"], set(parser.parse_args().without)), end="")


if __name__ == "__main__":
    main()
