"""Texts for people without the passwords and tokens that URIs carry."""

import re

_HIDDEN = "***"
# The second form is of a password with an unescaped slash, which no URI may have and people write.
_CREDENTIALS = re.compile(r"(?<=://)(?:[^\s/?#'\"<>]*|[^\s/:'\"<>]*:(?!\d+/)[^\s'\"<>]*)@")
_PARAMETERS = re.compile(
    r"([?&;#][^\s=&;'\"]*(?:token|secret|passw|pwd|key|sig|auth|cred)[^\s=&;'\"]*=)[^\s&;'\"<>)]*", re.IGNORECASE
)


def without_secrets(text: str) -> str:
    """The text with ``***`` in place of user names and passwords in URIs, and of tokens and keys in their queries."""
    return _PARAMETERS.sub(rf"\g<1>{_HIDDEN}", _CREDENTIALS.sub(f"{_HIDDEN}@", text))
