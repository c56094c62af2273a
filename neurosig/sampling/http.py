"""Requests to an HTTP server whose answers are not trusted: time-outs, retries, size limits.

The OpenAI SDK retries with growing pauses. Proxies named in the environment are not used: the server is our own.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from neurosig.runtime.errors import UserError
from neurosig.runtime.shapes import check_config

try:
    import httpx2
    import openai
except ImportError as missing:
    raise UserError(
        "--sampler openai: the openai package is missing; run `pip install 'neurosig[server]'`"
    ) from missing

ServerApi = Literal["completions", "chat", "transformers"]

LONGEST_WAIT = 120.0
"""Most seconds that a server may ask us to wait before a retry (the SDK's limit)."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """The server's address and how to ask it.

    Attributes:
        base_url: Address including ``/v1``.
        model: The server's name of the model.
        api: The API to use; see `neurosig.sampling.server`.
        logprobs: Request log-probabilities (``completions``), compare and record them.
        seeds: Send a seed with each request.
        enable_thinking: Passed to the server's chat template (``chat``, ``transformers``).
        timeout: Seconds to wait for an answer before the request is sent again.
        max_retries: Retries after time-outs, broken connections, 429 and 5xx.
        concurrency: Requests in flight at once.

    Raises:
        UserError: A value is out of range, or ``base_url`` is no address or contains a password.
    """

    base_url: str
    model: str
    api: ServerApi = "completions"
    logprobs: bool = True
    seeds: bool = True
    enable_thinking: bool | None = None
    timeout: float = 600.0
    max_retries: int = 5
    concurrency: int = 64

    def __post_init__(self) -> None:
        check_config(self)
        try:
            parts = urlsplit(self.base_url)
            valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:
            valid = False
        if not valid:
            raise UserError(f"--base-url {self.base_url}: expected an address such as http://localhost:8000/v1")
        if parts.username is not None or parts.password is not None:
            raise UserError("--base-url: leave the password out; the key comes from the variable OPENAI_API_KEY")
        for name, value, least in (
            ("request-timeout", self.timeout, 0.001),
            ("max-retries", self.max_retries, 0),
            ("concurrency", self.concurrency, 1),
        ):
            if not least <= value < float("inf"):
                raise UserError(f"--{name}: expected at least {least:g}, got {value}")

    def record(self) -> dict[str, Any]:
        """The fields that shape the rollouts."""
        named = {"sampler": "openai", "api": self.api, "served_model": self.model}
        return {**named, "logprobs": self.logprobs, "seeds": self.seeds}


class Endpoint:
    """Sends requests to one server.

    Attributes:
        reached: The server has accepted a request; what fails later may be the request's fault.
    """

    def __init__(self, config: ServerConfig):
        self.config, self.reached = config, False

    def client(self, limit: int) -> openai.AsyncOpenAI:
        """A client that accepts answers of at most ``limit`` bytes."""
        return openai.AsyncOpenAI(
            base_url=self.config.base_url,
            api_key=os.environ.get("OPENAI_API_KEY") or "none",
            timeout=self.config.timeout,
            max_retries=self.config.max_retries,
            default_headers={"Accept-Encoding": "identity"},
            http_client=httpx2.AsyncClient(
                transport=_Limited(self, limit, self.config.concurrency), timeout=self.config.timeout
            ),
        )

    async def post(self, client: openai.AsyncOpenAI, path: str, body: Mapping[str, Any], about: str) -> bytes:
        """POST ``body`` and return the bytes of the answer.

        Raises:
            UserError: The server is out of reach, retries are used up, the request is refused or the answer too
                large; the message names the server and ``about``.
        """
        c = self.config
        try:
            async with asyncio.timeout((c.max_retries + 1) * (c.timeout + LONGEST_WAIT)):
                return await client.post(path, body=dict(body), cast_to=bytes)
        except (openai.APITimeoutError, TimeoutError) as error:
            reason = f"no answer within {c.timeout:g} s, {c.max_retries + 1} times; see --request-timeout"
            raise self._gave_up(about, reason) from error
        except openai.APIConnectionError as error:
            hint = self._seed_hint(body) if self.reached else ""
            raise self._gave_up(about, f"out of reach ({error.__cause__ or error}){hint}") from error
        except openai.APIStatusError as error:
            answer = " ".join(error.response.text.split())[:200]
            hint = self._seed_hint(body) if error.status_code >= 500 or "seed" in answer.lower() else ""
            raise self._gave_up(about, f"{path} answers {error.status_code} ({answer}){hint}") from error
        except _UnfitAnswerError as error:
            raise self.fault(about, "answer", str(error)) from error

    @staticmethod
    def _seed_hint(body: Mapping[str, Any]) -> str:
        failing = "; if the server fails on per-request seeds, begin again with --no-served-seeds"
        return failing if "seed" in body else ""

    def _gave_up(self, about: str, reason: str) -> UserError:
        return UserError(
            f"server {self.config.base_url}: {about}: {reason}; finished rollouts are kept: repair the server and "
            "rerun with --resume"
        )

    def fault(self, about: str, field: str, problem: str) -> UserError:
        """The error of an answer that does not fit the request."""
        return UserError(f"server {self.config.base_url}: {about}: {field}: {problem}")


class _UnfitAnswerError(Exception):
    pass


class _Limited(httpx2.AsyncHTTPTransport):
    """Accepts uncompressed answers of at most ``limit`` bytes, so that none can fill the memory."""

    def __init__(self, endpoint: Endpoint, limit: int, connections: int):
        super().__init__(limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=connections))
        self.endpoint, self.limit = endpoint, limit

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        try:
            response = await super().handle_async_request(request)
        except httpx2.TransportError as error:
            broken = httpx2.ReadError, httpx2.ReadTimeout, httpx2.RemoteProtocolError
            self.endpoint.reached |= isinstance(error, broken)
            raise
        self.endpoint.reached = True
        if response.headers.get("content-encoding", "identity") != "identity":
            await response.aclose()
            raise _UnfitAnswerError("compressed, although the request forbids it")
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        response.stream = _LimitedStream(response.stream, self.limit)
        return response


class _LimitedStream(httpx2.AsyncByteStream):
    def __init__(self, stream: httpx2.AsyncByteStream, limit: int):
        self.stream, self.limit = stream, limit

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for chunk in self.stream:
            size += len(chunk)
            if size > self.limit:
                raise _UnfitAnswerError(f"more than {self.limit:,} bytes")
            yield chunk

    async def aclose(self) -> None:
        await self.stream.aclose()


def in_thread(items: Callable[[], AsyncGenerator[T, None]]) -> Iterator[T]:
    """Yield the items of an async iterator that runs in a thread, so that requests continue while the caller works."""
    ready: SimpleQueue[tuple[T] | BaseException | None] = SimpleQueue()
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any] | None]] = Future()

    async def pump() -> None:
        started.set_result((asyncio.get_running_loop(), asyncio.current_task()))
        try:
            async with contextlib.aclosing(items()) as source:
                async for item in source:
                    ready.put((item,))
            ready.put(None)
        except BaseException as fault:
            ready.put(fault)

    thread = threading.Thread(target=lambda: asyncio.run(pump()), daemon=True)
    thread.start()
    loop, task = started.result()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item[0]
    finally:
        if task is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed already
                loop.call_soon_threadsafe(task.cancel)
        thread.join()
