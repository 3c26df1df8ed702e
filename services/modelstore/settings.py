"""What the modelstore can be told: TOKENLOOM_MODELSTORE_<NAME>."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, ValidationInfo, field_validator

from services.modelstore.core.places import is_url, may_hold_secrets, url_problem
from services.modelstore.core.urls import Url, parse_prefixes
from services.modelstore.core.web import DOWNLOAD_BYTES_MAX
from tokenloom.kit.settings import ServiceSettings, settings_config

POLL_INTERVAL_MS_MAX = 900
"""Below a second, so that every change in the folder is seen within one."""


class ModelstoreSettings(ServiceSettings):
    """One modelstore on one store."""

    model_config = settings_config("modelstore")

    port: int = Field(9200, ge=0, le=65535)
    store_dir: str
    """What holds blobs, manifests and aliases: a folder, made when it is missing, or s3://, gs://, az://."""
    scratch_dir: Path | None = Field(None, validate_default=True)
    """A local folder for imports that run. Of a store in a folder it is by default in that folder, where
    finished files need not be copied; a store at a URL needs one."""
    import_roots: str = ""
    """Folders, separated by commas, that ImportModel may read. Empty: none but the built-in model."""
    import_urls: str = ""
    """Beginnings of http(s) URLs, separated by commas, that ImportModel may fetch, also by a redirect.

    Empty: none. Whoever may import can make this process fetch what lies below them, so name no more than
    the places where models are.
    """
    download_bytes_max: int = Field(DOWNLOAD_BYTES_MAX, ge=1)
    """What one import from a URL may fetch; the store's volume holds it until the import ends."""
    poll_interval_ms: int = Field(400, ge=20, le=POLL_INTERVAL_MS_MAX)
    """How often the folder is looked at for what other processes changed."""
    chunk_bytes: int = Field(1024 * 1024, ge=4096, le=8 * 1024 * 1024)
    """Size of the messages of FetchBlob."""
    fetches_max: int = Field(64, ge=1, le=4096)
    """FetchBlob streams that read at once; further ones wait. Each holds one chunk."""
    imports_max: int = Field(1, ge=1, le=16)
    imports_waiting_max: int = Field(16, ge=1, le=1024)
    shard_bytes_max: int = Field(2 * 1024**3, ge=1024**2, le=64 * 1024**3)
    """Weights above this are split into files of at most this size; also the converter's memory."""
    convert_threads: int = Field(0, ge=0, le=256)
    """CPU threads of a conversion; 0: as many as torch likes."""
    gc_min_age_s: float = Field(24 * 3600, ge=0)
    """Blobs younger than this are no garbage, whoever names them."""
    verify_threads: int = Field(0, ge=0, le=256)
    """Blobs that Verify hashes at once; 0: one for each core."""

    @field_validator("store_dir", mode="before")
    @classmethod
    def _place(cls, value: object) -> object:
        text = str(value).strip()
        if not text:
            raise ValueError("is empty: give a folder, or the URL of a bucket")
        # One that may hold credentials is refused at the start: what is refused here is printed.
        if is_url(text) and not may_hold_secrets(text) and (problem := url_problem(text)):
            raise ValueError(problem)
        return text

    @field_validator("scratch_dir")
    @classmethod
    def _scratch(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        if value is None and is_url(str(info.data.get("store_dir", ""))):
            raise ValueError("is missing: a store at a URL needs a local folder for imports")
        return value

    @field_validator("import_roots")
    @classmethod
    def _absolute(cls, value: str) -> str:
        for root in split_roots(value):
            if not root.is_absolute():
                raise ValueError(f"{str(root)!r} is not absolute")
        return value

    @field_validator("import_urls")
    @classmethod
    def _prefixes(cls, value: str) -> str:
        parse_prefixes(value)
        return value

    @property
    def urls(self) -> list[Url]:
        """The import URLs, each a folder."""
        return parse_prefixes(self.import_urls)

    @property
    def roots(self) -> list[Path]:
        """The import roots as paths."""
        return split_roots(self.import_roots)


def split_roots(text: str) -> list[Path]:
    """The folders of a comma-separated list."""
    return [Path(part.strip()) for part in text.split(",") if part.strip()]
