"""Addresses of Sentinels."""

from __future__ import annotations

import pytest
from celery import Celery

from celery_mem.config import Settings, mask_url
from celery_mem.errors import ConfigError
from celery_mem.graph.tickets import broker_options, broker_url
from celery_mem.sentinels import parse_sentinel


def test_one_address_names_all_sentinels_the_master_and_the_database():
    found = parse_sentinel("sentinel://:secret@one:26379,two:26380/mine/3?sentinel_password=other")
    assert found.hosts == (("one", 26379), ("two", 26380))
    assert (found.service, found.db) == ("mine", 3)
    assert (found.username, found.password, found.sentinel_password) == (None, "secret", "other")
    assert parse_sentinel(found.canonical) == found


def test_an_address_of_celery_is_understood_and_the_master_is_that_of_the_broker():
    app = Celery(broker="sentinel://:secret@one:26379/1;sentinel://:secret@two:26379/1")
    app.conf.broker_transport_options = {"master_name": "mine"}
    settings = Settings.load(app)
    assert settings.url == "sentinel://:secret@one:26379,two:26379/mine/1"
    assert broker_url(settings.url) == app.conf.broker_url
    assert broker_options(settings.url) == {"master_name": "mine"}


def test_the_master_may_be_a_setting():
    found = Settings.load(url="sentinel://one/0", sentinel_master="mine")
    assert found.url == "sentinel://one:26379/mine/0"


def test_no_password_is_shown():
    assert "secret" not in mask_url("sentinel://:secret@one:1/mine/0?sentinel_password=secret")


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("sentinel://one:26379", "which master"),
        ("sentinel://one:port/mine", "not an address of Sentinels"),
        ("sentinel:///mine", "a host is missing"),
    ],
)
def test_what_is_wrong_with_an_address_is_said(url, says):
    with pytest.raises(ConfigError, match=says):
        Settings.load(url=url)
