"""The order of the units, and the feeds that read them by number."""
