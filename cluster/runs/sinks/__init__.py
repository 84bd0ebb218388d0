"""Sinks of a run's events; each reads them from the journal at its own pace."""
