"""Calls and Dask collections become tasks: keys, payloads, dependencies, priority."""
