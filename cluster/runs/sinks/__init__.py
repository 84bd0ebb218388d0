"""What becomes of a run's events: each sink reads them from the journal at its own pace."""
