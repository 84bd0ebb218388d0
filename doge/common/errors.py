"""The one exception that a user is meant to read."""


class UserError(Exception):
    """Bad input, said in one sentence that tells what to do; commands print it and exit with status 1."""
