"""Render chat templates in a child process, where a hostile template can do no harm.

transformers runs templates in a sandbox without limits on time and memory. Here a forked child renders them: the kernel
ends a template that loops after ``CPU_SECONDS``, a template that explodes exceeds the child's memory (on macOS: its
time), and the command reports either in one line. The child adds a tenth of a millisecond per rendering.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import socket
import sys
import traceback
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from neurosig.runtime.errors import UserError, check_platform

if sys.platform != "win32":
    import resource
if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CPU_SECONDS = 1.0
"""Most processor seconds per rendering; an ordinary one takes a thousandth of that."""
EXTRA_MEMORY = 2**29
"""Bytes that the child may allocate beyond the memory it shares with the command."""
EXTRA_CHARACTERS = 2**20
"""Characters that a template may write beyond four times those of the messages."""
PATIENCE_SECONDS = 60.0
"""Most seconds of wall time per rendering, for a busy machine."""
IDLE_SECONDS = 1.0
"""Seconds without a request after which the child exits; the next rendering forks another."""

ADVICE = "give --template plain or a Jinja file"


class TemplateRenderer:
    """Renders chats with a tokenizer's template, in a child process that is forked on demand.

    Args:
        tokenizer: The tokenizer; each call uses its current template.

    Raises:
        UserError: On a call: the template fails (the message has its line, if known), takes too long or writes too
            much; or the system is Windows.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._template: Any = None
        self._pipe: socket.socket | None = None
        self._pid = 0
        self._end: Callable[[], int | None] = lambda: None

    def __call__(self, messages: Sequence[Mapping[str, str]], **options: Any) -> str:
        request = json.dumps([[dict(message) for message in messages], options]).encode()
        try:
            reply = self._ask(request)
        except BaseException:  # else the next request would receive this answer
            self._close()
            raise
        if "error" in reply:
            raise UserError(f"the chat template fails{reply['error']}; {ADVICE}")
        return str(reply["text"])

    def _ask(self, request: bytes) -> dict[str, str]:
        for fresh in (self._pipe is None, True):
            if fresh or self._template != self._tokenizer.chat_template:
                self._fork()
            assert self._pipe is not None
            try:
                _send(self._pipe, request)
                reply = _receive(self._pipe)
            except TimeoutError:
                os.kill(self._pid, signal.SIGKILL)
                reply = None
            except ConnectionError:
                reply = None
            if reply is not None:
                return dict(json.loads(reply))
            status = self._close()
            if status == 0:  # the child had exited when idle
                continue
            if status == signal.SIGPROF:
                return {"error": f": it takes more than {CPU_SECONDS:g} s of processor time for one chat"}
            return {"error": ": the process that renders it runs out of memory or time"}
        raise AssertionError("a fresh child is not idle")

    def _close(self) -> int | None:
        self._pipe = None
        return self._end()

    def _fork(self) -> None:
        check_platform()
        self._close()
        own_end, child_end = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            _serve(child_end.detach(), self._tokenizer)
        child_end.close()
        own_end.settimeout(PATIENCE_SECONDS)
        self._pid = pid
        self._pipe, self._template = own_end, self._tokenizer.chat_template
        self._end = weakref.finalize(self, _finish, own_end, pid)


def _finish(pipe: socket.socket, pid: int) -> int | None:
    """Close the pipe, at which the child exits, and return its wait status."""
    pipe.close()
    try:
        return os.waitpid(pid, 0)[1]
    except ChildProcessError:  # the finalizer runs in another fork of the command
        return None


def _serve(pipe_number: int, tokenizer: PreTrainedTokenizerBase) -> NoReturn:
    """The child: answer until the pipe closes. It shares the command's memory and must not run its clean-up."""
    gc.disable()
    for number in (signal.SIGTERM, signal.SIGPROF):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command handles Ctrl-C
    try:
        pipe = socket.socket(fileno=os.dup2(pipe_number, 3))
        os.closerange(4, _open_files() + 1)  # and the output folder's lock
        _limit_memory()
        pipe.settimeout(IDLE_SECONDS)
        while (request := _receive(pipe)) is not None:
            signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
            reply = json.dumps(_render(tokenizer, *json.loads(request))).encode()
            signal.setitimer(signal.ITIMER_PROF, 0)
            _send(pipe, reply)
    except TimeoutError:
        pass
    except BaseException:  # out of memory outside the template, a broken pipe
        os._exit(1)
    os._exit(0)


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], options: Mapping[str, Any]
) -> dict[str, str]:
    characters = sum(len(message["content"]) for message in messages)
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options))
    except Exception as error:  # a template can raise any exception
        return {"error": f"{_place(error)}: {str(error)[:300] or type(error).__name__}"}
    if len(text) > 4 * characters + EXTRA_CHARACTERS:
        return {"error": f": it makes {len(text):,} characters of a chat of {characters:,}"}
    return {"text": text}


def _place(error: Exception) -> str:
    """The template's line that failed, such as `` at line 3``, if known."""
    line = getattr(error, "lineno", None)
    for frame in traceback.extract_tb(error.__traceback__):
        line = frame.lineno if frame.filename == "<template>" else line
    return f" at line {line}" if line else ""


def _open_files() -> int:
    """The highest number of an open file; macOS closes a range one by one, and its limit may be 2**63."""
    with contextlib.suppress(OSError):
        return max(map(int, os.listdir("/dev/fd")))
    return 2**16


def _limit_memory() -> None:
    """Bound the child's memory on Linux; macOS does not enforce the limit, there the time bounds it."""
    pages = Path("/proc/self/statm")
    if pages.exists():
        limit = int(pages.read_text().split()[0]) * resource.getpagesize() + EXTRA_MEMORY
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard < 0 else min(limit, hard), hard))


def _send(pipe: socket.socket, message: bytes) -> None:
    pipe.sendall(len(message).to_bytes(8, "big") + message)


def _receive(pipe: socket.socket) -> bytes | None:
    """The next message; ``None`` once the other side has closed the pipe."""
    head = _exactly(pipe, 8)
    return None if head is None else _exactly(pipe, int.from_bytes(head, "big"))


def _exactly(pipe: socket.socket, size: int) -> bytes | None:
    parts, missing = [], size
    while missing:
        part = pipe.recv(min(missing, 2**20))
        if not part:
            return None
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)
