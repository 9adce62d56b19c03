"""HTTP with finite patience: every request has a time limit, retries are few and wait longer each time, errors keep the server's words."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request

RETRIED = {408, 425, 429, 500, 502, 503, 504}  # the server's passing troubles; anything else would fail again
MAX_ANSWER = 64 * 2**20


class RequestRefused(RuntimeError):
    """The server answered, and asking again would not help."""


class Unreachable(ConnectionError):
    """No answer after the last attempt."""


def request(
    url: str, body: bytes | None = None, *, headers: dict[str, str] | None = None, timeout: float = 60.0, retries: int = 3, backoff: float = 0.5
) -> bytes:
    """GET, or POST a JSON body; returns the answer's body.

    Args:
        timeout: seconds for each attempt to connect, and between pieces of the answer.
        retries: further attempts after the first, `backoff`, 2 `backoff`, 4 `backoff` ... seconds apart.

    Raises:
        RequestRefused: an error status that stays.
        Unreachable: no connection, no answer in time, half an answer, or a passing error status, each time.
    """
    failure = None
    for attempt in range(retries + 1):
        if attempt:
            time.sleep(backoff * 2 ** (attempt - 1))
        try:
            question = urllib.request.Request(url, body, {"Content-Type": "application/json", **(headers or {})})
            with urllib.request.urlopen(question, timeout=timeout) as answer:
                return _read(answer)
        except urllib.error.HTTPError as error:
            text = f"{error.code} {error.reason}{_message(error)}"
            if error.code not in RETRIED:
                raise RequestRefused(f"{url} answered {text}") from error
            failure = f"it answered {text}"
        except (OSError, http.client.HTTPException) as error:
            failure = str(getattr(error, "reason", error)) or type(error).__name__
    attempts = f"{retries + 1} attempts" if retries else "1 attempt"
    raise Unreachable(f"No answer from {url} in {attempts} of at most {timeout:g} s: {failure}")


def _read(answer) -> bytes:
    content = answer.read(MAX_ANSWER + 1)
    if len(content) > MAX_ANSWER:
        raise RequestRefused(f"{answer.url} answered more than {MAX_ANSWER} bytes.")
    if answer.length:  # a read of limited size does not say that the answer ended early
        raise http.client.IncompleteRead(content, answer.length)
    return content


def _message(error: urllib.error.HTTPError) -> str:
    """The message in the answer's body, as this package's server and OpenAI's API write it; else its first words."""
    try:
        text = error.read(4096).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return ""
    try:
        value = json.loads(text)["error"]
        text = value["message"] if isinstance(value, dict) else value
    except (ValueError, KeyError, TypeError):
        pass
    return f": {str(text)[:1000]}" if text else ""
