"""`python -m services.modelstore`."""

from services.modelstore.app import build
from services.modelstore.settings import ModelstoreSettings
from tokenloom.kit.service import run

if __name__ == "__main__":
    run("modelstore", ModelstoreSettings, build)
