"""HTTP with finite patience: every attempt has a time limit, retries are few and wait longer each time, errors keep the server's words."""

from __future__ import annotations

import http.client
import io
import json
import time
import urllib.error
import urllib.request

from .patience import OverTime, within

MAX_PAUSE = 30.0  # seconds between attempts
RETRIED = {408, 425, 429, 500, 502, 503, 504}  # the server's passing troubles; anything else would fail again
MAX_ANSWER = 64 * 2**20


class RequestRefused(RuntimeError):
    """The server answered, and asking again would not help."""


class Unreachable(ConnectionError):
    """No answer after the last attempt."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirected POST would become a GET without its body, and another host would get its key."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        return None


def request(
    url: str, body: bytes | None = None, *, headers: dict[str, str] | None = None, timeout: float = 60.0, retries: int = 3, backoff: float = 0.5
) -> bytes:
    """GET, or POST a JSON body; returns the answer's body.

    Args:
        timeout: seconds for each attempt from the first to the last byte, however steadily the server drips.
        retries: further attempts after the first, `backoff`, 2 `backoff`, 4 `backoff` ... seconds apart, at most `MAX_PAUSE`.

    Raises:
        RequestRefused: an error status that stays, or a redirect.
        Unreachable: no connection, no whole answer in time, or a passing error status, each time.
    """
    question, failure = urllib.request.Request(url, body, {"Content-Type": "application/json", **(headers or {})}), None
    for attempt in range(retries + 1):
        if attempt:
            time.sleep(min(MAX_PAUSE, backoff * 2 ** (attempt - 1)))
        try:
            return within(timeout, lambda: _ask(question, timeout))
        except OverTime:
            failure = "timed out before the answer was complete"
        except urllib.error.HTTPError as error:
            text = f"{error.code} {error.reason}{_message(error)}"
            if 300 <= error.code < 400:
                text += f". Redirects are not followed: give the address that it names, {error.headers.get('Location')!r}, if you trust it"
            if error.code not in RETRIED:
                raise RequestRefused(f"{url} answered {text}") from error
            failure = f"it answered {text}"
        except (OSError, http.client.HTTPException) as error:
            failure = str(getattr(error, "reason", error)) or type(error).__name__
    attempts = f"{retries + 1} attempts" if retries else "1 attempt"
    raise Unreachable(f"No answer from {url} in {attempts} of at most {timeout:g} s: {failure}")


def _ask(question: urllib.request.Request, timeout: float) -> bytes:
    """One attempt. It gives up by itself soon after `timeout`, since nobody may wait for it any more."""
    ends = time.monotonic() + timeout
    try:
        with urllib.request.build_opener(_NoRedirects).open(question, timeout=timeout) as answer:
            return _read(answer, ends)
    except urllib.error.HTTPError as error:
        # Its words are read here, within the time.
        raise urllib.error.HTTPError(error.url, error.code, error.reason, error.headers, io.BytesIO(_text(error))) from None


def _read(answer, ends: float) -> bytes:
    content = bytearray()
    while piece := answer.read1(2**16):
        content += piece
        if len(content) > MAX_ANSWER:
            raise RequestRefused(f"{answer.url} answered more than {MAX_ANSWER} bytes.")
        if time.monotonic() > ends:
            raise TimeoutError("timed out before the answer was complete")
    if answer.length:  # reading in pieces does not say that the answer ended early
        raise http.client.IncompleteRead(bytes(content), answer.length)
    return bytes(content)


def _text(error: urllib.error.HTTPError) -> bytes:
    try:
        return error.read(4096)
    except (OSError, http.client.HTTPException):
        return b""


def _message(error: urllib.error.HTTPError) -> str:
    """The message in the answer's body, as this package's server and OpenAI's API write it; else its first words."""
    text = _text(error).decode(errors="replace")
    try:
        value = json.loads(text)["error"]
        text = value["message"] if isinstance(value, dict) else value
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    return f": {printable(text, 1000)}" if text else ""


def printable(text: object, length: int) -> str:
    """What a stranger wrote, without control characters, cut to a length."""
    return "".join(character if character.isprintable() else " " for character in str(text)[:length])
