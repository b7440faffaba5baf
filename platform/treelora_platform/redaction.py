"""What must not leave the machine: secrets by the name of their key, and credentials in addresses."""

from __future__ import annotations

import re

HIDDEN = "***"
_SECRET = re.compile(r"key|token(?!s$)|password|secret", re.IGNORECASE)  # `max_new_tokens` counts
_USER_INFO = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_OPTION = re.compile(r"([?&][^=&\s]*(?:key|token|password|secret)[^=&\s]*=)[^&\s]+", re.IGNORECASE)


def is_secret(key: str) -> bool:
    """Whether the value behind `key` must not leave the machine."""
    return bool(_SECRET.search(key))


def hide_credentials(address: str) -> str:
    """`scheme://user:password@host?token=...` with `***` in the place of user and password, and of secret options."""
    return _OPTION.sub(rf"\1{HIDDEN}", _USER_INFO.sub(HIDDEN, address))
