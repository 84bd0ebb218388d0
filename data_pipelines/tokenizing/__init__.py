"""Documents to token ids, packed rows and committed shards."""
