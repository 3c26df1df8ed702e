"""`python -m services.worker`: one worker front, which starts its engines."""

from services.worker.app import build
from services.worker.settings import WorkerSettings
from tokenloom.kit.service import run

if __name__ == "__main__":
    run("worker", WorkerSettings, build)
