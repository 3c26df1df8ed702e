"""`python -m services.worker.engine --fd N --config JSON`: one model's engine on an inherited socket.

torch is imported only after the configuration was read and the environment set.
"""

from __future__ import annotations

import argparse
import gc
import os
import socket
import sys

from services.worker.engine.config import ConfigError, decode_config
from services.worker.engine.host import (
    keep_freed_memory,
    prepare_environment,
    schedule_as_usual,
    use_threads,
)

EXIT_CONFIG = 78
"""`EX_CONFIG` of sysexits.h."""


def main() -> int:
    """The exit status: 0 when the front ended it, 1 when the engine could not start (it said why)."""
    parser = argparse.ArgumentParser(prog="services.worker.engine")
    parser.add_argument("--fd", type=int, required=True, help="an inherited, connected UNIX socket")
    parser.add_argument("--config", required=True, help="an EngineConfig as JSON")
    arguments = parser.parse_args()
    try:
        config = decode_config(arguments.config)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return EXIT_CONFIG
    schedule_as_usual()
    prepare_environment()
    keep_freed_memory()
    # What imports make stays: looking for garbage in it would take a seventh of their seconds.
    gc.disable()
    from services.worker.engine.loop import EngineLoop

    gc.enable()
    use_threads(config.threads)
    os.set_inheritable(arguments.fd, False)
    with socket.socket(fileno=arguments.fd) as sock:
        return 0 if EngineLoop(sock, config).run() else 1


if __name__ == "__main__":
    sys.exit(main())
