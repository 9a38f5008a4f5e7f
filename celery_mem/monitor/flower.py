"""Flower with a Memory page: the same program and flags, with handlers and a tab put in before it starts."""

from __future__ import annotations

import asyncio
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
        """Send them; Redis is read in a thread, so that Flower goes on meanwhile."""
        try:
            picture = await asyncio.get_running_loop().run_in_executor(None, self.reading.picture)
        except (CeleryMemError, RedisError):
            # The text of an error may hold the address of Redis.
            self.set_status(503)
            self.write({"error": "The namespace cannot be read: Redis does not answer or refuses."})
            return
        self.set_header("Cache-Control", "no-store")
        self.write(picture)


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
    ]
    settings["template_loader"] = PagesLoader(settings["template_path"])
    REGISTRY.register(MemoryCollector(reading))
    # Every thread holds connections to the broker, of which small plans have 20.
    Inspector.max_concurrency = 1
    Flower.max_workers = 2
