"""Arguments that are large: a call says so, and refuses what is too large."""

from __future__ import annotations

import pickle
import warnings

import dask
import pytest

from celery_mem.client.weight import LIGHT, Weight
from celery_mem.config import Settings
from celery_mem.errors import PayloadTooLargeError
from tests.on_cluster import until


@pytest.fixture
def client(connect):
    return connect(payload_limit=2_000_000, payload_warning=1_000_000)


def test_arguments_above_the_limit_are_refused_at_the_call(client):
    with pytest.raises(PayloadTooLargeError) as caught:
        client.submit(len, bytes(3_000_000), key="heavy")
    error = caught.value
    assert (error.key, error.limit) == ("heavy", 2_000_000)
    assert error.nbytes > 3_000_000
    for part in ("heavy", "3,000,", "2,000,000", "mem_payload_limit", "client.scatter"):
        assert part in str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert not client.session.states


def test_what_is_scattered_has_no_such_limit(client):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert client.submit(len, client.scatter(bytes(3_000_000))).result(timeout=20) == 3_000_000


@pytest.mark.filterwarnings("ignore:the arguments of this call")
def test_one_task_of_many_that_is_too_large_refuses_the_call(client):
    with pytest.raises(PayloadTooLargeError, match=r"len-.* take 3,000"):
        client.map(len, [b"", bytes(3_000_000)])
    assert until(lambda: not client.session.states)


def test_a_heavy_call_warns_once_where_it_is_made_and_runs(client):
    with pytest.warns(
        UserWarning, match=r"take 1\.2 MB so far, of which 0\.4 .*len-.*client\.scatter"
    ) as caught:
        futures = client.map(len, [bytes(400_000 + n) for n in range(5)])
    assert [warning.filename for warning in caught] == [__file__]
    assert client.gather(futures, timeout=20) == [400_000 + n for n in range(5)]


def test_data_inside_a_collection_counts_too(client):
    value = dask.delayed(len)(bytes(1_500_000))
    with pytest.warns(UserWarning, match="Scatter large data"):
        future = client.compute(value)
    assert future.result(timeout=20) == 1_500_000


def test_many_small_arguments_are_not_heavy(client):
    calls = [bytes(LIGHT - 1_000)] * 150
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(client.gather(client.map(len, calls, pure=False), timeout=20)) == {LIGHT - 1_000}


def test_zero_means_no_limit_and_no_warning():
    weight = Weight(Settings(url="redis://localhost", payload_limit=0, payload_warning=0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weight.add("heavy", 1 << 40)


def test_by_default_ten_megabytes_are_warned_about_and_a_quarter_of_a_gigabyte_is_refused():
    weight = Weight(Settings(url="redis://localhost"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weight.add("a", 10_000_000)
    with pytest.warns(UserWarning, match="Scatter"):
        weight.add("b", LIGHT + 1)
    with pytest.raises(PayloadTooLargeError):
        weight.add("c", (256 << 20) + 1)
