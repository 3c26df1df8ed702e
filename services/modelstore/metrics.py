"""Counters and gauges. Labels come from closed sets: stages, outcomes; never from callers."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

IMPORTS = Counter(
    "tokenloom_modelstore_imports_total",
    "Imports ended, by outcome: created, same (the version was there), refused, stopped, failed.",
    ["outcome"],
)
IMPORT_SECONDS = Histogram(
    "tokenloom_modelstore_import_seconds",
    "Duration of imports that ended with a version.",
    buckets=(0.1, 0.5, 1, 5, 10, 30, 60, 120, 300, 600, 1800, 3600),
)
IMPORTS_RUNNING = Gauge("tokenloom_modelstore_imports_running", "Imports running or waiting for their turn.")
FETCHED_BYTES = Counter("tokenloom_modelstore_fetched_bytes_total", "Bytes of blobs sent.")
FETCHES_RUNNING = Gauge("tokenloom_modelstore_fetches_running", "FetchBlob streams open.")
DIGEST_MISMATCHES = Counter(
    "tokenloom_modelstore_digest_mismatches_total",
    "Blobs found with a size that is not their manifest's. Import the model again to mend one.",
)
VERSIONS = Gauge("tokenloom_modelstore_versions", "Model versions in the catalogue.")
WATCHERS = Gauge("tokenloom_modelstore_watchers", "WatchModels streams open.")
ALIAS_CHANGES = Counter("tokenloom_modelstore_alias_changes_total", "Aliases changed through this process.")
POLL_FAILURES = Counter(
    "tokenloom_modelstore_poll_failures_total",
    "Looks at the store that failed; the last catalogue is served on.",
)
COLLECTED_BLOBS = Counter("tokenloom_modelstore_collected_blobs_total", "Blobs deleted as garbage.")
COLLECTED_BYTES = Counter("tokenloom_modelstore_collected_bytes_total", "Bytes of blobs deleted as garbage.")
VERIFIED_BYTES = Counter("tokenloom_modelstore_verified_bytes_total", "Bytes read by Verify that ended.")
DAMAGED = Counter(
    "tokenloom_modelstore_damaged_total",
    "Blobs and manifests that Verify found missing or damaged. Import the model again to mend one.",
)
