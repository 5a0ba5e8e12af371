"""Keys come from the environment, and URLs hold none: the HTTP client writes whole URLs into its log.

What comes back from outside may hold them all the same, and what no file, request or prompt can: `clean_text`.
"""

from __future__ import annotations

import os
import urllib.parse


def read_key(variable: str, where: str) -> str:
    """The key that the environment variable holds, "" for no variable. ValueError if it is not set, or empty."""
    if variable and not os.environ.get(variable):
        raise ValueError(
            f"the environment variable {variable!r} is not set: put the key of {where} into it, or give "
            'api_key_variable="" for a server that wants none'
        )
    return os.environ[variable] if variable else ""


def public_url(url: str) -> str:
    """The URL as it is; ValueError if a key can stand in it."""
    parts = urllib.parse.urlsplit(url)
    if "@" in parts.netloc or parts.query:
        raise ValueError(
            f"the endpoint at {parts.hostname!r} has a user or a query in its URL, which logs show: give the bare URL "
            "and name the variable that holds the key in api_key_variable"
        )
    return url


def clean_text(text: str, *keys: str) -> str:
    """A text from outside as it may be shown, sent and stored: keys struck out, lone surrogates as "?"."""
    for key in keys:
        text = text.replace(key, "[key]") if key else text
    return text.encode("utf-8", "replace").decode("utf-8")
