"""`python -m services.worker.sim --fd N --config JSON`: one sim engine on an inherited socket."""

from __future__ import annotations

import argparse
import os
import socket
import sys

from services.worker.sim.config import decode_sim_config
from services.worker.sim.loop import SimLoop

EXIT_CONFIG = 78
"""`EX_CONFIG` of sysexits.h."""


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(prog="services.worker.sim")
    parser.add_argument("--fd", type=int, required=True, help="an inherited, connected UNIX socket")
    parser.add_argument("--config", default="{}", help="a SimConfig as JSON")
    arguments = parser.parse_args()
    try:
        config = decode_sim_config(arguments.config)
    except ValueError as error:
        print(error, file=sys.stderr)
        return EXIT_CONFIG
    os.set_inheritable(arguments.fd, False)
    with socket.socket(fileno=arguments.fd) as sock:
        SimLoop(sock, config).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
