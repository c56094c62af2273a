"""Chat templates, rendered where a hostile one can do no harm.

transformers runs templates in a sandbox, which bounds neither their time nor their memory. Here a forked child renders
them: a template that loops is ended by the kernel after its share of processor time, one that explodes runs out of the
child's memory, and the command goes on to say so. A rendering costs a tenth of a millisecond more than without it.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import socket
import traceback
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from neurosig.runtime.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CPU_SECONDS = 1.0
"""Processor time of one rendering; an ordinary one takes a thousandth of it."""
EXTRA_MEMORY = 2**29
"""Bytes that the child may allocate beyond what it shares with the command."""
EXTRA_CHARACTERS = 2**20
"""Characters that a template may add to four times what the messages say."""
PATIENCE_SECONDS = 60.0
"""Wall time that a rendering may take on a machine that does other things."""
IDLE_SECONDS = 1.0
"""The child leaves when nothing was asked for so long; the next rendering forks another."""

ADVICE = "give --template plain or a Jinja file"


class TemplateRenderer:
    """Renders chats with a tokenizer's template, in a child process that is forked when it is needed.

    Args:
        tokenizer: Its template is used as it stands at the time of the call.

    Raises:
        UserError: On a call: the template fails (with its line, where it has one), takes too long or says too much.
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
        except BaseException:  # an interrupted exchange would leave its answer to the next question
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
            if status == 0:  # it was idle
                continue
            if status == signal.SIGPROF:
                return {"error": f": it takes more than {CPU_SECONDS:g} s of processor time for one chat"}
            return {"error": ": the process that renders it runs out of memory or time"}
        raise AssertionError("a fresh child is never idle")

    def _close(self) -> int | None:
        self._pipe = None
        return self._end()

    def _fork(self) -> None:
        self._close()
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            _serve(theirs.detach(), self._tokenizer)
        theirs.close()
        ours.settimeout(PATIENCE_SECONDS)
        self._pid = pid
        self._pipe, self._template = ours, self._tokenizer.chat_template
        self._end = weakref.finalize(self, _finish, ours, pid)


def _finish(pipe: socket.socket, pid: int) -> int | None:
    """Close the pipe, which the child leaves at, and return its wait status."""
    pipe.close()
    try:
        return os.waitpid(pid, 0)[1]
    except ChildProcessError:  # the finalizer of a process that was forked off the command
        return None


def _serve(pipe_number: int, tokenizer: PreTrainedTokenizerBase) -> NoReturn:
    """The child: answer until the pipe closes. It shares the command's memory, so nothing of it may be cleaned up."""
    gc.disable()
    for number in (signal.SIGTERM, signal.SIGPROF):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the command's to handle
    try:
        pipe = socket.socket(fileno=os.dup2(pipe_number, 3))
        os.closerange(4, resource.getrlimit(resource.RLIMIT_NOFILE)[1] & 0x7FFFFFFF)  # the lock of the output folder
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
    said = sum(len(message["content"]) for message in messages)
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options))
    except Exception as error:  # a template can raise whatever Python can
        return {"error": f"{_place(error)}: {str(error)[:300] or type(error).__name__}"}
    if len(text) > 4 * said + EXTRA_CHARACTERS:
        return {"error": f": it makes {len(text):,} characters of a chat of {said:,}"}
    return {"text": text}


def _place(error: Exception) -> str:
    """The template's line that failed, as `` at line 3``, where that is known."""
    line = getattr(error, "lineno", None)
    for frame in traceback.extract_tb(error.__traceback__):
        line = frame.lineno if frame.filename == "<template>" else line
    return f" at line {line}" if line else ""


def _limit_memory() -> None:
    pages = Path("/proc/self/statm")
    if pages.exists():
        held = int(pages.read_text().split()[0]) * resource.getpagesize()
        limit = held + EXTRA_MEMORY
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard < 0 else min(limit, hard), hard))


def _send(pipe: socket.socket, message: bytes) -> None:
    pipe.sendall(len(message).to_bytes(8, "big") + message)


def _receive(pipe: socket.socket) -> bytes | None:
    """The next message; ``None`` when the other side has left."""
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
