"""One deployment over several hosts for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.hosts.network import why_not
from tests.hosts.site import Site, forget, leftovers


@pytest.fixture(scope="package")
def site() -> Iterator[Site]:
    """The deployment, or a skip that says why there is none."""
    if reason := why_not():
        pytest.skip(f"no hosts: {reason}")
    # Short leases: what is cut off is soon given up.
    with Site(node_lease=3.0, ticket_lease=2.0, leader_lease=3.0) as site:
        yield site


@pytest.fixture(autouse=True)
def _nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """When a test ends and its futures are dropped, every rule of state holds and nothing is left."""
    yield
    if "site" in request.fixturenames:
        site = request.getfixturevalue("site")
        site.client(forget)
        found: list[str] = []

        def is_clean() -> bool:
            found[:] = site.client(leftovers) + site.violations()
            return not found

        try:
            site.hosts.wait_until(is_clean, "an empty namespace without violations", 20)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{found}") from None
