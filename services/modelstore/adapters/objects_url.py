"""Objects in an object store that a URL names: S3 and what speaks it, Google's, Azure's.

Who may write there is said by the environment, in the variables of the store's own tools
(`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, `GOOGLE_SERVICE_ACCOUNT`, `AZURE_STORAGE_ACCOUNT_NAME`, ... or the
identity of the machine), never by the URL: URLs are logged.

A create is a put with `If-None-Match: *`. The store must know it; those that do not are no place for a
modelstore. Requests that fail for a while are repeated by obstore, inside the bounds below; each may take the
30 s, of them 5 s to connect, that are its own default and that the environment may change (`AWS_TIMEOUT`).
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import obstore
from obstore.exceptions import BaseError
from obstore.store import from_url

from services.modelstore.adapters.objects import FolderObjects, StoredObjects, store_error
from services.modelstore.core.places import is_url, url_problem
from services.modelstore.core.ports import StoreError

if TYPE_CHECKING:
    from obstore.store import RetryConfig

RETRIES_MAX = 8
RETRY_FIRST_S = 0.1
RETRY_PAUSE_MAX_S = 5.0
RETRY_TOTAL_MAX_S = 30.0
"""No attempt begins later than this after the first."""
PART_BYTES = 16 * 1024 * 1024
"""Of a multipart upload. A store takes 10,000 parts: more than the largest shard needs."""
PARTS_AT_ONCE_MAX = 4


class BucketObjects(StoredObjects):
    """Objects below a URL. Nothing is sent until the first call.

    Raises StoreError for a URL that is none of ours and for settings of the environment that are missing.
    """

    def __init__(self, url: str) -> None:
        if problem := url_problem(url):
            raise StoreError(f"the store's URL {problem}")
        try:
            # Without client options: given here, they would take the place of the environment's.
            store = from_url(url, retry_config=_retry())
        except BaseError as error:
            raise store_error(error) from error
        super().__init__(store)

    async def adopt(self, path: str, file: str) -> None:
        await self._call(
            obstore.put,
            self._store,
            path,
            Path(file),
            chunk_size=PART_BYTES,
            max_concurrency=PARTS_AT_ONCE_MAX,
        )

    async def sweep(self, before_unix_ms: int) -> int:
        """Nothing: a store shows no unfinished uploads; its own lifecycle rule removes them."""
        return 0


def open_objects(place: str) -> FolderObjects | BucketObjects:
    """Objects in a folder or at a URL. Raises OSError when it cannot be used."""
    return BucketObjects(place) if is_url(place) else FolderObjects(Path(place))


def _retry() -> RetryConfig:
    return {
        "max_retries": RETRIES_MAX,
        "retry_timeout": timedelta(seconds=RETRY_TOTAL_MAX_S),
        "backoff": {
            "init_backoff": timedelta(seconds=RETRY_FIRST_S),
            "max_backoff": timedelta(seconds=RETRY_PAUSE_MAX_S),
        },
    }
