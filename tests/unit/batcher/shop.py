"""Workers that load models on demand, and what they say of it."""

from services.batcher.core.messages import LoadModel, ModelState, Verdict
from tests.unit.batcher.words import MODEL, OTHER, Desk, model_report, report

GIB = 1 << 30
THIRD = "sha256:" + "c" * 64
TOO_LARGE = Verdict("MODEL_TOO_LARGE", "needs 9 GiB, the budget is 4 GiB", {"needed_bytes": "9"})


class Shop(Desk):
    """Workers that load on demand."""

    def worker(self, endpoint="w1", *models, budget=4 * GIB, on_demand=True, **rest):
        used = sum(each.memory_bytes for each in models)
        load = report(*models, **rest)._replace(
            memory_budget_bytes=budget, free_memory_bytes=max(budget - used, 0), loads_on_demand=on_demand
        )
        return self.report(endpoint, load)

    def ended(self, endpoint="w1", verdict=None, model=MODEL):
        return self._take(self.scheduler.load_ended(endpoint, model, verdict, self.now))

    def want(self, name="r", model=MODEL, size=GIB, **rest):
        return self.arrive(name=name, model=model, model_bytes=size, **rest)

    def asked(self):
        return [(each.endpoint, each.model) for each in self.effects if isinstance(each, LoadModel)]

    def beat(self, seconds, *endpoints, models=()):
        """Time passes while workers go on reporting the same."""
        until = self.now + seconds
        while self.now < until:
            for endpoint in endpoints:
                self.worker(endpoint, *models)
            self.wait(min(0.1, until - self.now))


def resident(model=OTHER, memory=GIB, *, dwell=0.0, idle=100.0, **rest):
    return model_report(8, model=model, memory_bytes=memory, dwell_left_s=dwell, idle_s=idle, **rest)


def coming(progress=0.5, model=MODEL):
    return model_report(0, model=model, state=ModelState.LOADING, progress=progress, memory_bytes=GIB)


def busy_until(seconds, needed=3 * GIB):
    sizes = {"needed_bytes": str(needed), "free_bytes": str(2 * GIB), "budget_bytes": str(4 * GIB)}
    return Verdict("MODEL_MEMORY_BUSY", "needs 3 GiB, 2 GiB are free", sizes, seconds)
