"""A Celery configuration for an app that runs celery-mem beside its own tasks.

    app = Celery("shop")
    app.config_from_object("celeryconfig")
    celery_mem.install(app)

Copy what you need. The ready-made app, `celery -A celery_mem.worker.app worker`, needs no file: it takes the
same settings from the environment.
"""

import os

# --- where ------------------------------------------------------------------------------------------------

_url = os.environ.get("CELERY_MEM_URL") or os.environ.get("REDIS_URL") or "redis://localhost:6379/0"

# The broker carries tickets: short messages that lend a slot to the graph, a few per second. They hold no
# work, so a broker that loses or repeats one does no harm. Celery spells the path of a socket its own way.
broker_url = _url.replace("unix://", "redis+socket://", 1)
broker_connection_retry_on_startup = True
# A broker that refuses writes for a moment (a fail-over, a disk that is full) must not end the worker.
broker_channel_error_retry = True

# The Redis that holds the graph. Left out, it is the broker's. A Redis of its own, with noeviction and the
# append-only file (see redis.conf), keeps a busy broker from slowing the graph.
mem_url = _url
mem_namespace = os.environ.get("CELERY_MEM_NAMESPACE", "mem")

# --- celery-mem: the defaults, and when to change them ----------------------------------------------------

# The Celery queue that carries tickets; empty: the app's default queue. Give it a name to have workers that
# run graphs and others that do not: mem_queue = "graph", and `celery worker -Q graph`.
mem_queue = ""

# A result up to this many bytes lives in its task's record; a larger one becomes a blob beside it.
mem_inline_limit = 65_536
# Arguments of one task above so many bytes are refused, and a call with more than so many in all is warned
# about: they go through Redis, and large data is better scattered. 0 switches either off.
mem_payload_limit = 256 << 20
mem_payload_warning = 10_000_000
# Bytes of results that a slot keeps at hand, so that a task that follows reads nothing. Every slot of a
# worker has a cache of its own.
mem_cache_bytes = 256 << 20

# Seconds after which a slot that runs the graph lets your other Celery tasks have their turn; a lower value
# is fairer to them, a higher one saves messages.
mem_slice = 1.0
# Seconds that a slot waits for more work before it goes home.
mem_linger = 0.2

# Seconds of silence after which a client's futures are released, and a node is given up. Lower values free
# and recover sooner; values below a few seconds mistake a stall for a death.
mem_client_lease = 60.0
mem_node_lease = 10.0

# Tasks that are submitted inside a span of OpenTelemetry have spans on the workers; "off": none have.
mem_tracing = "auto"

# --- Celery: what goes well with it -----------------------------------------------------------------------

# One message at a time: the default of 4 would park tickets behind your own long tasks.
worker_prefetch_multiplier = 1
# Your own tasks, if they are acknowledged late: seconds until Redis hands a message of a killed worker to
# another, and how soon that is noticed. Keep the first above your longest task.
broker_transport_options = {
    "visibility_timeout": 3600,
    "unacked_restore_interval": 1,
    "unacked_restore_throttle": 1,
}
# On the way down: seconds to finish what runs after SIGQUIT, before it is handed back. Heroku sends SIGTERM
# to every process and SIGKILL 30 s later; there, set REMAP_SIGTERM=SIGQUIT as well.
worker_soft_shutdown_timeout = 10.0

# Nothing that Celery itself carries needs pickle.
task_serializer = "json"
accept_content = ["json"]

timezone = "UTC"
enable_utc = True
