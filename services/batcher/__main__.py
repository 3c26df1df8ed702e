"""`python -m services.batcher`: one replica of the batching queue."""

from services.batcher.app import build
from services.batcher.settings import BatcherSettings
from tokenloom.kit.service import run

if __name__ == "__main__":
    run("batcher", BatcherSettings, build)
