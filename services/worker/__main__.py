"""`python -m services.worker`: one worker front, which starts its engines."""

from services.worker.app import build
from services.worker.settings import WorkerSettings
from tokenloom.kit.malloc import keep_freed_buffers
from tokenloom.kit.service import run

if __name__ == "__main__":
    keep_freed_buffers()
    run("worker", WorkerSettings, build)
