"""What the modelstore can be told: TOKENLOOM_MODELSTORE_<NAME>."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, field_validator

from tokenloom.kit.settings import ServiceSettings, settings_config

POLL_INTERVAL_MS_MAX = 900
"""Below a second, so that every change in the folder is seen within one."""


class ModelstoreSettings(ServiceSettings):
    """One modelstore on one store."""

    model_config = settings_config("modelstore")

    port: int = Field(9200, ge=0, le=65535)
    store_dir: Path
    """The folder that holds blobs, manifests and aliases; made when it is missing."""
    import_roots: str = ""
    """Folders, separated by commas, that ImportModel may read. Empty: none but the built-in model."""
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

    @field_validator("store_dir", mode="before")
    @classmethod
    def _local(cls, value: object) -> object:
        text = str(value).strip()
        if not text:
            raise ValueError("is empty: give a folder")
        if "://" in text:
            raise ValueError("is a URL: only folders are served")
        return text

    @field_validator("import_roots")
    @classmethod
    def _absolute(cls, value: str) -> str:
        for root in split_roots(value):
            if not root.is_absolute():
                raise ValueError(f"{str(root)!r} is not absolute")
        return value

    @property
    def roots(self) -> list[Path]:
        """The import roots as paths."""
        return split_roots(self.import_roots)


def split_roots(text: str) -> list[Path]:
    """The folders of a comma-separated list."""
    return [Path(part.strip()) for part in text.split(",") if part.strip()]
