"""Flower with a Memory page: the same program and flags, with handlers and a tab put in before it starts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flower.app import Flower
from flower.inspector import Inspector
from flower.urls import handlers, settings
from flower.views import BaseHandler
from prometheus_client import REGISTRY
from redis.exceptions import RedisError
from tornado.template import Loader
from tornado.web import authenticated, url

from celery_mem.errors import CeleryMemError
from celery_mem.monitor.metrics import MemoryCollector
from celery_mem.monitor.reading import Reading
from celery_mem.state.store import Store

PAGE = "mem.html"
ACTIVE = '{% if request.path.endswith("/memory") %} active{% end %}'
TAB = f"""<li class="nav-item"><a class="nav-link{ACTIVE}" href="{{{{ reverse_url('mem') }}}}">Memory</a></li>
"""
AFTER_TAB = """      </ul>"""


class MemoryView(BaseHandler):
    """The page."""

    @authenticated
    def get(self) -> None:
        """Send it; its script asks for the figures."""
        self.render(PAGE)


class MemoryJson(BaseHandler):
    """The figures."""

    def initialize(self, reading: Reading) -> None:
        """Take what tornado passes on."""
        self.reading = reading

    @authenticated
    async def get(self) -> None:
        """Send them."""
        await answer(self, self.reading.picture)


class GraphJson(BaseHandler):
    """A key and what is near it."""

    def initialize(self, reading: Reading) -> None:
        """Take what tornado passes on."""
        self.reading = reading

    @authenticated
    async def get(self) -> None:
        """Send keys, states and edges."""
        await answer(self, lambda: self.reading.graph(self.get_argument("key")))


async def answer(view: BaseHandler, read: Callable[[], dict[str, Any] | None]) -> None:
    """Send what `read` returns; Redis is read in a thread, so that Flower goes on meanwhile."""
    try:
        found = await asyncio.get_running_loop().run_in_executor(None, read)
    except (CeleryMemError, RedisError):
        # The text of an error may hold the address of Redis.
        view.set_status(503)
        found = {"error": "The namespace cannot be read: Redis does not answer or refuses."}
    if found is None:
        view.set_status(404)
        found = {"error": "No task has that key, or not any more."}
    view.set_header("Cache-Control", "no-store")
    view.write(found)


class PagesLoader(Loader):
    """Flower's templates, ours, and a tab in Flower's navigation."""

    def _create_template(self, name: str) -> Any:
        from tornado.template import Template

        if name == PAGE:
            text = (Path(__file__).parent / PAGE).read_text(encoding="utf-8")
            return Template(text, name=name, loader=self)
        if name == "navbar.html":
            text = Path(self.root, name).read_text(encoding="utf-8")
            # Without the mark, the page is there all the same, only without a tab.
            return Template(text.replace(AFTER_TAB, TAB + AFTER_TAB, 1), name=name, loader=self)
        return super()._create_template(name)


def install_pages(store: Store) -> None:
    """Add page, figures and metrics to the Flower of this process, which is not made yet."""
    reading = Reading(store)
    # The last one catches all.
    handlers[-1:-1] = [
        url(r"/memory", MemoryView, name="mem"),
        url(r"/memory/json", MemoryJson, {"reading": reading}, name="mem-json"),
        url(r"/memory/graph", GraphJson, {"reading": reading}, name="mem-graph"),
    ]
    settings["template_loader"] = PagesLoader(settings["template_path"])
    REGISTRY.register(MemoryCollector(reading))
    # Every thread holds connections to the broker, of which small plans have 20. The pool itself must not be
    # limited to one: to send a command takes two of them, and two threads would wait for each other for ever.
    Inspector.max_concurrency = 1
    Flower.max_workers = 2
