"""The words of the core: what it is told, what it answers, and the limits it keeps.

Times are seconds on one monotonic clock, chosen by the caller, unless a name says otherwise. A
`ticket` is the caller's number for one request's stay here: the same request id may come back with a
new one.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import NamedTuple

PRIORITY_DEFAULT = 2
PRIORITY_LAST = 4
"""Bands 1 (most urgent) to 4, as in loom.inference.v1.Priority; 0 is taken as the default."""
PREFIX_TOKENS = 512
"""Prompt tokens that each name in `Request.prefix` adds to the one before."""


class Limits(NamedTuple):
    """Every bound of the core."""

    hold_max_s: float
    """A request waits no longer than this."""
    no_worker_hold_s: float
    """A request waits no longer than this for a model that no live worker serves or loads."""
    report_stale_s: float
    """A worker that was silent for this long is not chosen until it reports."""
    loading_hold_s: float
    """A request waits no longer than this while its model is only being loaded."""
    age_promote_s: float
    """A request that waited so long in its band moves up one, though never into the first."""
    affinity_hold_s: float
    """A request waits no longer than this for a worker that holds its prefix while another is free."""
    late_hold_s: float
    """The same for a request whose wish for a first token cannot be met any more."""
    queue_depth_max: int
    """Requests that may wait for one model."""
    queue_prompt_tokens_max: int
    """Prompt tokens that may wait for one model; one request may always wait."""
    queue_bytes_max: int
    """Bytes of requests that the proxy may hold meanwhile for one model."""
    band_shares: tuple[float, ...]
    """How much of each bound of a queue one band may fill, the most urgent first."""
    tenant_share: float
    """How much of each bound of a queue one tenant may fill."""
    queues_max: int
    """Models that requests may wait for at once."""
    tenants_max: int
    """Tenants that are remembered; the idle ones are forgotten first."""
    tenant_weights: Mapping[str, float]
    """Shares of tenants beside each other; 1 for those not named."""


class Request(NamedTuple):
    """What the core knows of a request."""

    request_id: str
    model: str
    """`sha256:…` of the version."""
    tenant: str
    priority: int
    """0 to `PRIORITY_LAST`."""
    arrival_unix_ms: int
    """First arrival at a gateway: the place in the queue, kept over re-sends and replicas."""
    deadline: float
    prompt_tokens: int
    max_new_tokens: int
    attempt: int = 1
    prefix: tuple[int, ...] = ()
    """Names of the prompt's first 512, 1,024, … tokens: the same number means the same tokens."""
    deadline_unix_ms: int = 0
    """The deadline as the caller said it: replicas order by it alike."""
    ttft_slo_ms: int = 0
    """From arrival to the first token, as the caller wishes; 0: no wish."""
    size_bytes: int = 0
    """Of the message that the proxy holds meanwhile."""
    model_bytes: int = 0
    """Of the model's weights; 0: unknown."""


class ModelState(Enum):
    """A model's life on one worker."""

    FETCHING = "fetching"
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


COMING = (ModelState.FETCHING, ModelState.LOADING)
"""States that become READY by themselves."""


class Served(NamedTuple):
    """Tokens that a worker computed for one tenant in one band since its boot."""

    tenant: str
    priority: int
    prompt_tokens: int
    """Those not found in a cache."""
    generated_tokens: int


class PrefixChanges(NamedTuple):
    """Which prefixes a worker's cache holds, as numbers of `Request.prefix`."""

    whole: bool
    """`stored` is all there is."""
    stored: tuple[int, ...] = ()
    evicted: tuple[int, ...] = ()


class ModelReport(NamedTuple):
    """One model on one worker, as the worker reports it."""

    version: str
    state: ModelState
    progress: float = 0.0
    error: str = ""
    free_sequences: int = 0
    free_blocks: int = 0
    block_tokens: int = 0
    """0: the engine has no blocks, and only sequences count."""
    total_blocks: int = 0
    running: int = 0
    waiting: int = 0
    queued_prefill_tokens: int = 0
    prefill_tokens_per_s: float = 0.0
    """0: nothing was measured yet."""
    sequences_max: int = 0
    decode_tokens_per_s: float = 0.0
    """Of all sequences together; 0: nothing was measured yet."""
    step_tokens_max: int = 0
    """Tokens that one step may hold; 0: unknown."""
    prefix_queried_tokens: int = 0
    """Of prompts begun there, since boot."""
    prefix_hit_tokens: int = 0
    memory_bytes: int = 0
    """What the worker reserved for it; 0: unknown."""
    dwell_left_s: float = 0.0
    """The worker keeps it that long, whoever asks for its memory."""
    idle_s: float = 0.0
    """Since its last sequence ended."""


class ModelNews(NamedTuple):
    """What a report says of a model only when it changed."""

    version: str
    prefix: PrefixChanges | None = None
    served: tuple[Served, ...] = ()


class LoadReport(NamedTuple):
    """What a worker can take, and which requests it holds."""

    boot_id: str
    draining: bool
    models: tuple[ModelReport, ...]
    active_request_ids: tuple[str, ...] = ()
    news: tuple[ModelNews, ...] = ()
    memory_budget_bytes: int = 0
    """For all its models together; 0: not bounded."""
    free_memory_bytes: int = 0
    loads_on_demand: bool = False
    """It loads other models when it is asked to."""


class Usage(NamedTuple):
    """What a request cost in the end."""

    prompt_tokens: int
    cached_prompt_tokens: int
    completion_tokens: int


class Dispatch(NamedTuple):
    """Send the request to this endpoint now; it holds this lease until its stream ends."""

    ticket: int
    request: Request
    endpoint: str
    lease_id: str
    waited_s: float


class Reject(NamedTuple):
    """Refuse the request. `reason` is a name of loom.errors.v1.ErrorReason without its prefix."""

    ticket: int
    request: Request
    reason: str
    message: str
    metadata: dict[str, str]
    retry_after_s: float | None
    waited_s: float


class ServedElsewhere(NamedTuple):
    """The proxy moved a request to another worker than the one picked."""

    ticket: int
    picked: str
    served_by: str


class WorkerTurned(NamedTuple):
    """A worker became `alive`, `stale`, `lost` or `draining`."""

    endpoint: str
    state: str


class LoadModel(NamedTuple):
    """Ask a worker to load a model; what it answers comes back as `Scheduler.load_ended`."""

    endpoint: str
    model: str


class Verdict(NamedTuple):
    """Why a worker does not load a model. `reason` is a name of loom.errors.v1.ErrorReason."""

    reason: str
    message: str
    metadata: dict[str, str]
    retry_after_s: float | None = None


Effect = Dispatch | Reject | ServedElsewhere | WorkerTurned | LoadModel
