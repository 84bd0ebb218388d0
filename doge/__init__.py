"""The Doge model family and how it learns: configuration, attention, experts, tokenizer, optimizer, checkpoints.

Nothing here imports Ray; a machine with one process can use all of it.
"""
