"""URLs: which are read, which lie below an allowed one, where a redirect may lead."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.modelstore.core.urls import allowed, parse_prefixes, parse_source, parse_url, redirected
from services.modelstore.settings import ModelstoreSettings
from tokenloom.kit.settings import SettingsError, load_settings


@pytest.mark.parametrize(
    ("text", "written", "shown"),
    [
        ("https://Example.org/m.gguf", "https://example.org/m.gguf", "example.org/m.gguf"),
        ("HTTPS://example.org:443/a/", "https://example.org/a/", "example.org/a/"),
        ("http://example.org:8080", "http://example.org:8080/", "example.org:8080/"),
        ("http://[::1]:80/x", "http://[::1]/x", "[::1]/x"),
        ("https://h/m.gguf?sig=secret", "https://h/m.gguf?sig=secret", "h/m.gguf"),
        ("https://h/m.gguf#part", "https://h/m.gguf", "h/m.gguf"),
    ],
)
def test_a_url_is_read_and_shown_without_its_query(text, written, shown):
    url = parse_url(text)
    assert (str(url), url.shown) == (written, shown)


def test_a_folder_ends_in_a_slash_and_has_files():
    folder = parse_source("https://h/org/model/resolve/main/")
    assert (folder.is_folder, folder.name) == (True, "main")
    assert str(folder.file("config.json")) == "https://h/org/model/resolve/main/config.json"
    assert not parse_source("https://h/m.gguf").is_folder


PREFIXES = "https://models.example.org/llama, http://10.0.0.1:8000/"


@pytest.mark.parametrize(
    "text",
    [
        "https://models.example.org/llama/m.gguf",
        "https://models.example.org:443/llama/a/b/",
        "https://models.example.org/llama?x=1",
        "http://10.0.0.1:8000/anything",
    ],
)
def test_what_lies_below_a_prefix_is_allowed(text):
    assert allowed(parse_url(text), parse_prefixes(PREFIXES))


@pytest.mark.parametrize(
    "text",
    [
        "http://models.example.org/llama/m.gguf",
        "https://models.example.org/llama-other/m.gguf",
        "https://models.example.org/llama/../other/m.gguf",
        "https://models.example.org/llama/%2e%2E/other/m.gguf",
        "https://models.example.org/llama/..%2fother/m.gguf",
        "https://models.example.org/llama/%5c..%5cother/m.gguf",
        "https://models.example.org:8443/llama/m.gguf",
        "https://models.example.org.evil.org/llama/m.gguf",
        "https://evil.org/?https://models.example.org/llama/",
        "http://10.0.0.1/",
        "http://10.0.0.1:80000/",
    ],
)
def test_what_only_looks_like_it_is_not(text):
    try:
        url = parse_url(text)
    except ValueError:
        return
    assert not allowed(url, parse_prefixes(PREFIXES))


def test_no_prefix_allows_nothing_and_none_everything():
    url = parse_url("https://example.org/m.gguf")
    assert not allowed(url, [])
    assert allowed(url, None)


def test_a_bad_prefix_is_named():
    with pytest.raises(ValueError, match=r"'ftp://x' ftp:// is not read"):
        parse_prefixes("https://good.example.org/,ftp://x")


@pytest.mark.parametrize(
    ("location", "target"),
    [
        ("/other", "https://h/other"),
        ("next", "https://h/a/next"),
        ("//cdn/x", "https://cdn/x"),
        ("https://cdn/x%2Fy?sig=1", "https://cdn/x%2Fy?sig=1"),
    ],
)
def test_a_redirect_leads_on(location, target):
    assert str(redirected(parse_url("https://h/a/b"), location)) == target


@pytest.mark.parametrize(
    ("location", "why"),
    [
        ("http://h/a", "leads from https to http"),
        ("file:///etc/passwd", "file:// is not read"),
        ("https://user@h/", "credentials"),
    ],
)
def test_a_redirect_elsewhere_is_refused(location, why):
    with pytest.raises(ValueError, match=why):
        redirected(parse_url("https://h/a"), location)


@given(st.one_of(st.text(max_size=80), st.text("ab@:/[]%?#.\\", max_size=40).map("https://{}".format)))
def test_any_text_is_a_url_or_refused_in_words(text):
    try:
        url = parse_url(text)
    except ValueError:
        return
    assert parse_url(str(url)) == url
    assert "@" not in url.host


def test_the_service_fetches_from_nowhere_unless_it_is_told(tmp_path):
    place = {"TOKENLOOM_MODELSTORE_STORE_DIR": str(tmp_path)}
    assert load_settings(ModelstoreSettings, place).urls == []
    told = {**place, "TOKENLOOM_MODELSTORE_IMPORT_URLS": "https://h/a, https://h/b/"}
    assert [str(url) for url in load_settings(ModelstoreSettings, told).urls] == [
        "https://h/a/",
        "https://h/b/",
    ]
    with pytest.raises(SettingsError, match=r"'ftp://h' ftp:// is not read"):
        load_settings(ModelstoreSettings, {**place, "TOKENLOOM_MODELSTORE_IMPORT_URLS": "ftp://h"})
