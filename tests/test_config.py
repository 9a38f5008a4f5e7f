"""The settings: what a deployment may write, and what is said where it may not."""

from __future__ import annotations

from dataclasses import fields

import pytest
from celery import Celery

from celery_mem.config import Settings
from celery_mem.errors import ConfigError

URL = "redis://localhost"


@pytest.mark.parametrize(
    ("text", "value"), [("false", False), ("0", False), ("No", False), ("on", True), ("1", True)]
)
def test_a_switch_from_the_environment_is_a_word(monkeypatch, text, value):
    monkeypatch.setenv("CELERY_MEM_NODE_MEMORY", text)
    assert Settings.load(url=URL).node_memory is value


def test_another_word_is_refused(monkeypatch):
    monkeypatch.setenv("CELERY_MEM_NODE_MEMORY", "perhaps")
    with pytest.raises(ConfigError, match="CELERY_MEM_NODE_MEMORY='perhaps' is neither true nor false"):
        Settings.load(url=URL)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"node_memory": 1}, "mem_node_memory must be True or False"),
        ({"memory_target": 0}, "mem_memory_target must be a fraction above 0 and up to 1"),
        ({"memory_pause": 1.5}, "mem_memory_pause must be a fraction"),
        ({"memory_target": True}, "mem_memory_target must be a fraction"),
        ({"memory_target": 0.9, "memory_pause": 0.8}, "a node would stop before it spills"),
        ({"publish": "never"}, "mem_publish must be one of on_demand, pinned, always, not 'never'"),
        ({"memory_limit": -1}, "mem_memory_limit must be a number of bytes, zero or more"),
        ({"inline_limit": 0}, "mem_inline_limit must be a number of bytes above zero"),
        ({"write_behind": "soon"}, "mem_write_behind must be a number of seconds"),
    ],
)
def test_a_bad_value_is_refused_by_name(given, says):
    with pytest.raises(ConfigError, match=says):
        Settings(url=URL, **given)


def test_limits_may_be_zero_where_that_means_something():
    s = Settings(url=URL, memory_limit=0, write_behind=0, live_bytes=0, recycle_bytes=0, shm_min=0)
    assert (s.memory_limit, s.no_workers_timeout) == (0, 0)


def test_an_unknown_name_in_a_celery_configuration_fails_with_the_nearest_known_one():
    app = Celery("shop", set_as_current=False)
    app.conf.update(mem_url=URL, mem_inline_limits=5)
    with pytest.raises(
        ConfigError, match=r"unknown setting mem_inline_limits; did you mean mem_inline_limit\?"
    ):
        Settings.load(app)


def test_so_does_one_in_a_configuration_with_a_namespace_such_as_djangos():
    class Django:
        CELERY_BROKER_URL = URL
        CELERY_MEM_NAMESPACE = "shop"

    app = Celery("shop", set_as_current=False)
    app.config_from_object(Django, namespace="CELERY")
    assert Settings.load(app).namespace == "shop"

    class Misspelt(Django):
        CELERY_MEM_INLINE_LIMITS = 5

    app = Celery("shop", set_as_current=False)
    app.config_from_object(Misspelt, namespace="CELERY")
    with pytest.raises(ConfigError, match="CELERY_MEM_INLINE_LIMITS; did you mean CELERY_MEM_INLINE_LIMIT"):
        Settings.load(app)


def test_upper_case_is_refused_where_celery_would_not_find_it():
    class Old:
        BROKER_URL = URL
        MEM_OF_MY_OWN = 1
        MEM_INLINE_LIMIT = 5

    app = Celery("shop", set_as_current=False)
    app.config_from_object(Old)
    with pytest.raises(ConfigError, match=r"MEM_INLINE_LIMIT; did you mean mem_inline_limit\?"):
        Settings.load(app)


@pytest.mark.parametrize("name", ["INLINE_LIMITS", "NAMSPACE", "SECRET", "URLS"])
def test_a_name_in_the_environment_that_is_nearly_a_settings_fails_with_it(monkeypatch, name):
    monkeypatch.setenv(f"CELERY_MEM_{name}", "5")
    with pytest.raises(ConfigError, match=f"unknown setting CELERY_MEM_{name}; did you mean CELERY_MEM_"):
        Settings.load(url=URL)


@pytest.mark.parametrize(
    "name", ["SERVICE_HOST", "SERVICE_PORT", "PORT_6379_TCP_ADDR", "REDIS_SERVER", "CONFIG", "IMAGE"]
)
def test_what_others_put_into_the_environment_is_theirs(monkeypatch, name):
    """Kubernetes does, for a service of the name celery-mem."""
    monkeypatch.setenv(f"CELERY_MEM_{name}", "5")
    Settings.load(url=URL)


def test_every_setting_is_documented_and_numbers_have_a_unit():
    for f in fields(Settings):
        assert f.metadata["doc"], f.name
        is_number = isinstance(f.default, (int, float)) and not isinstance(f.default, bool)
        assert bool(f.metadata["unit"]) == is_number, f.name
