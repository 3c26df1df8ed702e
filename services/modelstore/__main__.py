"""`python -m services.modelstore`."""

from services.modelstore.app import build
from services.modelstore.settings import ModelstoreSettings
from tokenloom.kit.malloc import keep_freed_buffers
from tokenloom.kit.service import run

if __name__ == "__main__":
    keep_freed_buffers()
    run("modelstore", ModelstoreSettings, build)
