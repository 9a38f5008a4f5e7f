"""A whole deployment on this machine: a private Redis, Celery workers and a coordinator as children."""

from celery_mem.local.cluster import LocalCluster
from celery_mem.local.processes import LocalClusterError

__all__ = ["LocalCluster", "LocalClusterError"]
