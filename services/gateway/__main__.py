"""`python -m services.gateway`."""

from services.gateway.app import build
from services.gateway.settings import GatewaySettings
from tokenloom.kit.service import run

if __name__ == "__main__":
    run("gateway", GatewaySettings, build)
