"""The exceptions whose message is written for the user."""

from doge.common.redaction import without_secrets


class UserError(Exception):
    """Bad input, described in one sentence that says what to do. Commands print it and exit with status 1.

    On a worker it means that any other would fail alike. Passwords and tokens in URIs are left out of the sentence.
    """

    def __init__(self, sentence: str):
        super().__init__(without_secrets(sentence))


class MachineError(UserError):
    """Trouble of one machine, such as its disk, its packages or its GPU: another may do the same work."""
