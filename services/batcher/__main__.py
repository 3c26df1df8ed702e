"""`python -m services.batcher`."""

from services.batcher.app import build
from services.batcher.settings import BatcherSettings
from tokenloom.kit.service import run

if __name__ == "__main__":
    run("batcher", BatcherSettings, build)
