"""`python -m services.worker.bench --model-dir DIR …`: the engine alone, measured; JSON lines out.

torch is imported only after the options were read and the environment set.
"""

from __future__ import annotations

import sys

from services.worker.bench.options import at_hand, parse
from services.worker.engine.config import ConfigError
from services.worker.engine.errors import EngineError
from services.worker.engine.host import keep_freed_memory, prepare_environment
from tokenloom.bench import lines


def tell(line: lines.Line) -> None:
    print(lines.encode(line), flush=True)


def main() -> int:
    """The exit status: 0 also when what is wrong was told as the last line."""
    try:
        options = parse()
        prepare_environment()
        keep_freed_memory()
        from services.worker.bench.measure import measure

        with at_hand(options) as ready:
            measure(ready, tell)
    except EngineError as error:
        tell(lines.Failed(f"{error.reason}: {error.message}"))
    except (ConfigError, ValueError) as error:
        tell(lines.Failed(str(error)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
