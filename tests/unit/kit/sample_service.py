"""A service that does nothing, for the tests of the kit's process life."""

import asyncio
from typing import Literal

from tokenloom.kit.service import run
from tokenloom.kit.settings import ServiceSettings, settings_config


class SampleSettings(ServiceSettings):
    model_config = settings_config("sample")
    drain: Literal["fast", "slow"] = "fast"


class Sample:
    def __init__(self, settings):
        self._slow = settings.drain == "slow"

    async def start(self):
        pass

    def readiness(self):
        return "not ready yet: the sample never is"

    async def drain(self, grace_s):
        if self._slow:
            print("draining", flush=True)
            await asyncio.sleep(grace_s)
        print("drained", flush=True)

    async def close(self):
        print("closed", flush=True)


if __name__ == "__main__":
    run("sample", SampleSettings, Sample)
