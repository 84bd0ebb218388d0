"""Backends of dynamic mask attention, one file a backend."""
