"""What every command shares: configuration, logging, exit codes.

A command is a flat dataclass that extends :class:`CommonConfig` and a ``main(config)``::

    @dataclass(kw_only=True)
    class ExportConfig(CommonConfig):
        '''Write a selection manifest.'''

        out: Path
        '''Folder of the manifest.'''
        rollouts: int = 8
        '''Rollouts per question.'''

    PRESETS = {"cpu": {"rollouts": 4}}

    if __name__ == "__main__":
        sys.exit(run_command(ExportConfig, main, presets=PRESETS, prog="python -m neurosig.export"))

Values come from the dataclass, then the preset, then the TOML file, then the command line; later sources win.
``--help`` answers at once because a command's module imports torch, transformers and the like inside ``main``.

Exit codes: 0 done; 2 a problem the user can fix; 1 a bug; 130 interrupted; 141 the reader of a pipe closed it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import os
import re
import signal
import sys
import time
import traceback
import typing
import unicodedata
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Annotated, Any, TypeVar

from neurosig.runtime.arguments import parse_config
from neurosig.runtime.errors import UserError, check_platform, os_text
from neurosig.runtime.extras import absent
from neurosig.runtime.help import Section, example_of
from neurosig.runtime.shapes import Shapes, check_config, option_names

log = logging.getLogger(__name__)

EXIT_DONE, EXIT_INTERNAL, EXIT_USER, EXIT_INTERRUPTED, EXIT_PIPE = 0, 1, 2, 130, 141
OUT_OF_MEMORY = "out of memory: {}; lower the batch size (--batch-rows, in training --micro-batch-size), then {}"
TIMED = ("seconds_", "tokens_per_second_", "peak_memory_gb")
"""How the names of `untimed` metrics begin."""
_INVISIBLE = {"Cc", "Cf", "Co", "Cs", "Zl", "Zp"}
_JOINERS = {"\u200c", "\u200d"}  # Persian and emoji need them
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_QUIET_LIBRARIES = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

T = TypeVar("T")


@dataclass(kw_only=True)
class CommonConfig:
    """Options of every command."""

    preset: Annotated[str | None, Shapes.PLACE, Section.COMMON] = None
    """Named set of defaults; --config and the command line override it."""
    config: Annotated[Path | None, Shapes.PLACE] = None
    """TOML file of options, keys in snake_case; the command line overrides it."""
    quiet: Annotated[bool, Shapes.MESSAGES] = False
    """Show warnings and errors only."""
    debug: Annotated[bool, Shapes.MESSAGES] = False
    """Show tracebacks and the messages of libraries."""

    def __post_init__(self) -> None:
        check_config(self)

    def is_explicit(self, name: str) -> bool:
        """Whether the command line or --config gives this option; in Python, whether it differs from its default."""
        given: Collection[str] | None = getattr(self, "explicit", None)
        if given is not None:
            return name in given
        return bool(
            getattr(self, name) != next(field.default for field in dataclasses.fields(self) if field.name == name)
        )

    def without_effect(self) -> Collection[str]:
        """Options that do nothing under the values of the others."""
        return ()


ConfigT = TypeVar("ConfigT", bound=CommonConfig)


def run_command(
    config_class: type[ConfigT],
    main: Callable[[ConfigT], None],
    *,
    presets: Mapping[str, Mapping[str, object]],
    prog: str,
    argv: Sequence[str] | None = None,
) -> int:
    """Parse the command line, run ``main`` and turn what it raises into one line and an exit code.

    Args:
        config_class: dataclass of the command's options.
        main: the command; raises ``UserError`` for problems the user can fix. Its module's docstring has the example
            of the help page.
        presets: name -> field -> value; the fields must exist.
        prog: how the command is called, e.g. ``python -m neurosig.export``.
        argv: arguments after the program's name; ``sys.argv[1:]`` when None.

    Returns:
        The exit code; see the module's docstring.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    can_resume = any(field.name == "resume" for field in dataclasses.fields(config_class))
    if isinstance(sys.stdout, io.TextIOWrapper):  # LANG=C cannot encode every answer
        sys.stdout.reconfigure(errors="backslashreplace")
    # OpenMP threads that spin for long starve each other: with one other process running, a batch took 20x as long
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    previous = _interrupt_on_sigterm()
    config: ConfigT | None = None
    try:
        check_platform()
        example = example_of(getattr(sys.modules.get(main.__module__), "__doc__", None))
        config = parse_config(config_class, presets=presets, prog=prog, argv=arguments, example=example)
        debug = config.debug
        _configure_logging(quiet=config.quiet, debug=debug)
        main(config)
        if sys.stdout is not None:
            sys.stdout.flush()
        return EXIT_DONE
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else EXIT_DONE if stop.code is None else EXIT_USER
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter flushes stdout once more as it leaves
        return EXIT_PIPE
    except (KeyboardInterrupt, Exception) as fault:
        if debug:
            traceback.print_exc()
        code, message = _explain(fault, can_resume=can_resume)
        of_all = config is None or isinstance(fault, KeyboardInterrupt)  # every process of a launch meets these
        if not of_all or os.environ.get("RANK", "0") == "0":
            print(message, file=sys.stderr)
        return code
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


def list_commands(package: str, commands: Mapping[str, str]) -> int:
    """Print the commands of a package, ``python -m PACKAGE.NAME`` and one line each; returns the exit code."""
    try:
        check_platform()
    except UserError as fault:
        print(f"error: {fault}", file=sys.stderr)
        return EXIT_USER
    width = max(map(len, commands))
    for name, line in commands.items():
        print(f"python -m {package}.{name:<{width}}  {line}")
    return EXIT_DONE


def command_words(options: Mapping[str, Any], config: type | None = None) -> list[str]:
    """Options as command-line words: ``{"lora_r": 8, "full": True}`` is ``--lora-r 8 --full``.

    With the command's ``config``, an option that may also be None takes True or False as its value.
    """
    hints, words = typing.get_type_hints(config) if config else {}, []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool) and hints.get(name, bool) is bool:
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *(map(str, value) if isinstance(value, (list, tuple)) else [str(value)])]
    return words


def config_record(config: CommonConfig) -> dict[str, Any]:
    """The options of a run as plain JSON values, for the record next to its outputs; no ``quiet`` and ``debug``."""
    shown = option_names(type(config), Shapes.MESSAGES)
    record = {name: value for name, value in dataclasses.asdict(config).items() if name not in shown}
    return typing.cast(dict[str, Any], json.loads(json.dumps(record, default=str)))


def printable(text: str) -> str:
    r"""Model text for a terminal, on one line: control characters (``\x1b``) and bidi overrides escaped."""
    return _UNPRINTABLE.sub(lambda match: repr(match.group())[1:-1], text)


def visible(text: str) -> str:
    r"""Make control, bidi, zero-width and private-use characters visible, as ``\u202e``; newlines stay.

    A page also isolates the direction of every model text.
    """
    return "".join(_escaped(char) if unicodedata.category(char) in _INVISIBLE else char for char in text)


def _escaped(char: str) -> str:
    return char if char == "\n" or char in _JOINERS else char.encode("unicode_escape").decode()


def progress(iterable: Iterable[T] | None = None, *, total: int | None = None, desc: str, quiet: bool = False) -> Any:
    """A tqdm bar on stderr over ``iterable``, or to ``update`` by hand; none when quiet or not on a terminal."""
    from tqdm import tqdm

    return tqdm(iterable, total=total, desc=desc, disable=True if quiet else None, dynamic_ncols=True)


class PhaseTimer:
    """Seconds spent in each phase of a command; the table is logged when the ``with`` block ends well.

    >>> with PhaseTimer() as timer, timer.phase("sample"):
    ...     pass

    Attributes:
        seconds: phase -> seconds of wall time, summed over repetitions, in order of first use.
        tokens: phase -> tokens it worked on, for the phases that count them.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.tokens: dict[str, int] = {}
        self._lap: dict[str, float] = {}
        self._start = time.perf_counter()

    def __enter__(self) -> PhaseTimer:
        self._start = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            return
        total = time.perf_counter() - self._start
        rows = [*self.seconds.items(), ("total", total)]
        width = max(len(name) for name, _ in rows)
        lines = [f"  {name:<{width}}  {seconds:9.1f} s  {seconds / total:4.0%}" for name, seconds in rows]
        for index, name in enumerate(self.seconds):
            if name in self.tokens:
                lines[index] += f"  {self.tokens[name] / max(self.seconds[name], 1e-9):6.0f} tokens/s"
        log.info("time by phase:\n%s", "\n".join(lines))

    def add_tokens(self, phase: str, tokens: int) -> None:
        """Count tokens that ``phase`` worked on; the table then shows its rate."""
        self.tokens[phase] = self.tokens.get(phase, 0) + tokens

    def lap(self) -> dict[str, float]:
        """Seconds of the phases since the last call."""
        lap = {name: seconds - self._lap.get(name, 0.0) for name, seconds in self.seconds.items()}
        self._lap = dict(self.seconds)
        return {name: seconds for name, seconds in lap.items() if seconds}

    @contextlib.contextmanager
    def phase(self, name: str, *, synchronize: bool = False) -> Iterator[None]:
        """Add the block's wall time to the phase ``name``; ``synchronize`` first waits for torch's accelerator."""
        start = time.perf_counter()
        try:
            yield
            if synchronize:
                import torch

                if torch.accelerator.is_available():
                    torch.accelerator.synchronize()
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def peak_memory_gb() -> float:
    """Peak memory of this process in 10^9 bytes: what torch had allocated on its GPU, else the resident set."""
    import resource

    import torch

    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def untimed(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """A step's metrics without its times, rates and memory, in which two runs to the same result differ."""
    return {name: value for name, value in metrics.items() if not name.startswith(TIMED)}


def _explain(fault: BaseException, *, can_resume: bool) -> tuple[int, str]:
    """Exit code and the one line for what ended the command."""
    text = printable(" ".join(str(fault).split()))
    if isinstance(fault, KeyboardInterrupt):
        how = "rerun with --resume" if can_resume else text
        return EXIT_INTERRUPTED, f"interrupted; {how}" if how else "interrupted"
    if isinstance(fault, UserError):
        return EXIT_USER, f"error: {text}"
    if isinstance(fault, ModuleNotFoundError) and (advice := absent((fault.name or "").partition(".")[0])):
        return EXIT_USER, f"error: {advice}"
    if _is_out_of_memory(fault):
        how = "continue with --resume" if can_resume else "run again"
        return EXIT_USER, "error: " + OUT_OF_MEMORY.format(text or type(fault).__name__, how)
    if isinstance(fault, OSError):
        return EXIT_USER, f"error: {printable(os_text(fault, named=True))}"
    if type(fault).__name__ == "SafetensorError" and "os error 28" in text:  # its full disk is no OSError
        return EXIT_USER, f"error: {text}"
    return (
        EXIT_INTERNAL,
        f"error: internal: {type(fault).__name__}: {text} (rerun with --debug for the traceback)",
    )


def _is_out_of_memory(fault: BaseException) -> bool:
    """Python's, the accelerator's (``torch.OutOfMemoryError``) and the CPU allocator's way to say so."""
    return (
        isinstance(fault, MemoryError)
        or type(fault).__name__ == "OutOfMemoryError"
        or (isinstance(fault, RuntimeError) and "can't allocate memory" in str(fault))
    )


def _interrupt_on_sigterm() -> Any:
    """Let SIGTERM end a command as Ctrl-C does; returns the handler to put back (None outside the main thread)."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    try:
        return signal.signal(signal.SIGTERM, interrupt)
    except ValueError:
        return None


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno <= logging.INFO else f"{record.levelname.lower()}: {text}"


def _configure_logging(*, quiet: bool, debug: bool) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(message)s"))
    for name in ("neurosig", "distill", "figures", "__main__"):  # __main__: the module that python -m runs
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(logging.WARNING if quiet else logging.DEBUG if debug else logging.INFO)
    if not debug:
        for variable, value in _QUIET_LIBRARIES.items():
            os.environ.setdefault(variable, value)
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
