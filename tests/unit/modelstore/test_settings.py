"""Settings of the modelstore: what is wrong is said in words."""

from pathlib import Path

import pytest

from services.modelstore.adapters.objects_url import open_objects
from services.modelstore.settings import ModelstoreSettings
from tokenloom.kit.settings import SettingsError, load_settings


def load(**changes):
    names = {"STORE_DIR": "/store", "NAME": "x"} | changes
    environ = {f"TOKENLOOM_MODELSTORE_{k}": v for k, v in names.items() if v is not None}
    return load_settings(ModelstoreSettings, environ)


def test_a_store_folder_is_all_that_is_needed():
    settings = load()
    assert (settings.port, settings.store_dir, settings.roots) == (9200, "/store", [])


@pytest.mark.parametrize("url", ["s3://bucket", "gs://bucket/models", "az://container/models"])
def test_a_store_may_be_at_a_url(url):
    assert load(STORE_DIR=url, SCRATCH_DIR="/scratch").store_dir == url


@pytest.mark.parametrize("url", ["s3://key:hidden@bucket", "az://box?sig=hidden", "http://a:hidden@b"])
def test_a_url_that_may_hold_credentials_is_refused_without_being_printed(url):
    settings = load(STORE_DIR=url, SCRATCH_DIR="/scratch")
    with pytest.raises(OSError, match="give credentials in the environment") as caught:
        open_objects(settings.store_dir)
    assert "hidden" not in str(caught.value)


def test_roots_are_a_list_of_folders():
    assert load(IMPORT_ROOTS="/a, /b/c,").roots == [Path("/a"), Path("/b/c")]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"STORE_DIR": None}, "TOKENLOOM_MODELSTORE_STORE_DIR: Field required"),
        ({"STORE_DIR": " "}, "give a folder"),
        ({"STORE_DIR": "http://bucket"}, "is a URL of 'http': give a folder, or a URL of s3, gs, az"),
        ({"STORE_DIR": "s3://"}, "names no bucket"),
        ({"STORE_DIR": "s3://bucket"}, "SCRATCH_DIR: Value error, is missing: a store at a URL needs"),
        ({"IMPORT_ROOTS": "/a,relative"}, "'relative' is not absolute"),
        ({"STOREDIR": "/x"}, "TOKENLOOM_MODELSTORE_STOREDIR: no such setting"),
        ({"POLL_INTERVAL_MS": "1000"}, "TOKENLOOM_MODELSTORE_POLL_INTERVAL_MS"),
        ({"CHUNK_BYTES": "16777216"}, "TOKENLOOM_MODELSTORE_CHUNK_BYTES"),
    ],
)
def test_bad_settings_are_refused_in_words(changes, line):
    with pytest.raises(SettingsError) as caught:
        load(**changes)
    assert line in str(caught.value)
