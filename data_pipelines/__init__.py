"""Text to numbered training sequences: sources, tokenizing, packing, shards, mixture and order."""
