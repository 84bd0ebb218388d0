"""Preparing a plan without Ray."""


def make_everything(plan, storage):
    """Make every shard of every file, one after another."""
    tokenizer = plan.open_tokenizer(storage)
    for source, files in plan.files.items():
        for file in range(len(files)):
            part = 0
            while not plan.make_shard(storage, source, file, part, tokenizer).last:
                part += 1
