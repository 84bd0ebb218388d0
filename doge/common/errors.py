"""The exception whose message is written for the user."""


class UserError(Exception):
    """Bad input, described in one sentence that says what to do. Commands print it and exit with status 1."""
