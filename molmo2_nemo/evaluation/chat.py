"""One question to a server that speaks OpenAI's chat-completions protocol, asked politely.

Nothing but the standard library: a user's own server (vLLM, SGLang, llama.cpp) or a hosted one are reached alike.
"""

from __future__ import annotations

import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from molmo2_nemo.errors import UserError

KEY = "MOLMO2_JUDGE_KEY"  # environment variable; sent as the bearer token, written nowhere
AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)  # statuses after which the same question may be answered
NEVER = (401, 403, 404, 405)  # statuses that every other question would get too
HERE = ("localhost", "127.0.0.1", "::1")  # asked without a proxy
LONGEST = 4 * 2**20  # bytes of a reply


class NoAnswer(RuntimeError):
    """A question that got none; the message says why.

    Args:
        hopeless: other questions would fare alike.
    """

    def __init__(self, cause: str, hopeless: bool = False) -> None:
        super().__init__(cause)
        self.hopeless = hopeless


@dataclass(frozen=True)
class Patience:
    """How a server is asked."""

    at_once: int = 4  # questions under way at the same time
    timeout: float = 120.0  # seconds that a reply may take
    tries: int = 5  # of a question
    wait: float = 1.0  # seconds before the second try, doubled before each further one
    longest_wait: float = 60.0  # also of what a server asks for in Retry-After

    def __post_init__(self) -> None:
        for name in ("at_once", "timeout", "tries", "longest_wait"):
            if not getattr(self, name) > 0:
                raise UserError(f"judge: {name} is {getattr(self, name)}; must be above 0")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A question and its key go to the address that the user named, and to no other."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class Chat:
    """A model behind a URL.

    Args:
        url: where the server's API begins, such as http://localhost:8000/v1.
        model: its name there.

    Raises:
        UserError: not an http(s) URL, no name of a model, or a key that no header can hold.
    """

    def __init__(self, url: str, model: str, patience: Patience | None = None) -> None:
        self.url, self.model, self.patience = endpoint(url), model.strip(), patience or Patience()
        if not self.model:
            raise UserError("the judge's model has no name; see what the server's /models lists")
        self._key = os.environ.get(KEY, "").strip()
        if not self._key.isascii() or len(self._key.split()) > 1:
            raise UserError(f"{KEY}: a key has no spaces and nothing but ASCII characters")
        proxies = [urllib.request.ProxyHandler({})] if urlsplit(self.url).hostname in HERE else []
        self._opener = urllib.request.build_opener(_NoRedirect(), *proxies)
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Ends all waiting between tries."""
        self._stopped.set()

    def ask(self, messages: list[dict[str, str]]) -> str:
        """The model's reply, at temperature 0.

        Raises:
            NoAnswer: after all tries, or where another one cannot help.
        """
        body = {"model": self.model, "messages": messages, "temperature": 0}
        for number in range(self.patience.tries):
            try:
                return self._try(json.dumps(body).encode())
            except _Again as again:
                cause = str(again)
                if number + 1 < self.patience.tries and self._stopped.wait(self.pause(number, again.after)):
                    break
        raise NoAnswer(cause)

    def pause(self, number: int, asked: float | None) -> float:
        """Seconds before the next try: those that the server asks for, or doubling ones."""
        return min(asked if asked is not None else self.patience.wait * 2**number, self.patience.longest_wait)

    def _try(self, body: bytes) -> str:
        headers = {"Content-Type": "application/json", "User-Agent": "molmo2-nemo"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.url, body, headers)
        try:
            with self._opener.open(request, timeout=self.patience.timeout) as reply:
                return content(self._read(reply))
        except urllib.error.HTTPError as error:
            raise _refused(error) from None
        except (OSError, http.client.HTTPException) as error:
            raise _Again(_words(error, self.patience.timeout)) from None

    def _read(self, reply: http.client.HTTPResponse) -> bytes:
        """A reply, in no more time than one may take in all."""
        end, parts, size = time.monotonic() + self.patience.timeout, [], 0
        while part := reply.read1(65536):
            size += len(part)
            parts.append(part)
            if size > LONGEST:
                raise NoAnswer(f"a reply of more than {LONGEST // 2**20} MiB")
            if time.monotonic() > end:
                raise TimeoutError
        return b"".join(parts)


class _Again(RuntimeError):
    """A try that failed, after which another may not.

    Args:
        after: seconds that the server asks to wait.
    """

    def __init__(self, cause: str, after: float | None = None) -> None:
        super().__init__(cause)
        self.after = after


def endpoint(url: str) -> str:
    """Where questions go, from the beginning of a server's API or from the whole address.

    Raises:
        UserError: not an http(s) URL without a user name.
    """
    url = url.strip()
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid or not url.isascii() or len(url.split()) != 1:
        raise UserError(f"{url!r} is not the judge's URL; expected one like http://localhost:8000/v1")
    if "@" in parts.netloc:
        raise UserError(f"the judge's URL names a user; put the server's key into the environment variable {KEY}")
    path = parts.path.rstrip("/")
    path = path if path.endswith("/chat/completions") else f"{path}/chat/completions"
    return parts._replace(path=path, fragment="").geturl()


def content(reply: bytes) -> str:
    """The text of a reply.

    Raises:
        _Again: it is none of this protocol.
    """
    try:
        text = json.loads(reply)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        text = None
    if not isinstance(text, str) or not text.strip():
        raise _Again("a reply without choices[0].message.content")
    return text


def _refused(error: urllib.error.HTTPError) -> Exception:
    """What a status other than 200 means for further tries."""
    try:
        with error:
            text = error.read(2000).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        text = ""
    said = "" if text.lstrip().startswith("<") else " ".join(text.split())[:200]  # a page of a web server says no more
    cause = f"status {error.code}{f' ({said})' if said else ''}"
    if error.code in AGAIN:
        after = error.headers.get("Retry-After", "").strip()
        return _Again(cause, float(after) if after.isascii() and after.isdigit() else None)
    if 300 <= error.code < 400:
        return NoAnswer(f"{cause}: the server sends questions on to another address", hopeless=True)
    return NoAnswer(cause, hopeless=error.code in NEVER)


def _words(error: OSError | http.client.HTTPException, timeout: float) -> str:
    reason = getattr(error, "reason", error)
    if isinstance(reason, TimeoutError):
        return f"no answer within {timeout:g} s"
    return " ".join(str(reason).split()) or type(reason).__name__
