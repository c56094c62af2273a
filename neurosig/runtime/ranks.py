"""One command on several processes, under ``accelerate launch`` or ``torchrun``; in a single process a no-op.

Every process runs the same code. The main one writes the output and the messages; the others do their part of the work.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from neurosig.runtime.cli import EXIT_USER
from neurosig.runtime.errors import UserError

if TYPE_CHECKING:
    from typing import Self

    from accelerate import PartialState

T = TypeVar("T")
PATIENCE = timedelta(days=7)
"""How long a process waits for the others: one may sample from a server all alone. The launcher ends the others at once
when a process dies."""


class Ranks:
    """The processes of a run, as one of them sees them.

    Args:
        state: Of a run that accelerate or torchrun started; ``None`` for a process on its own.

    Attributes:
        world: Number of processes.
        rank: Index of this process.
        main: Whether it is the one that writes files and messages.
        device: Type of this process's torch device; ``None`` in a single process, where the options choose.
    """

    def __init__(self, state: PartialState | None = None):
        self._state = state
        self.world = 1 if state is None else state.num_processes
        self.rank = 0 if state is None else state.process_index
        self.main = self.rank == 0
        self.device = None if state is None or self.world == 1 else state.device.type

    @classmethod
    def launched(cls, device: str | None) -> Self:
        """The ranks of this run; all but the main one are silenced.

        A process that no launcher started stays alone: no process group is made.

        Args:
            device: The command's ``--device``.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        import torch
        from accelerate import PartialState

        # accelerate would have transformers load empty weights on all ranks but the first, for it to fill in
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        on_cpu = device == "cpu" or not torch.accelerator.is_available()
        ranks = cls(PartialState(cpu=on_cpu, timeout=PATIENCE))
        if not ranks.main:
            for name in ("neurosig", "distill", "__main__"):
                logging.getLogger(name).setLevel(logging.CRITICAL)
        return ranks

    def check(self, config: Any) -> None:
        """Refuse what several processes cannot do.

        Args:
            config: The command's options, with ``device``.

        Raises:
            UserError: Naming the flag.
        """
        if self.world > 1 and config.device not in (None, "cpu"):
            raise UserError(f"--device {config.device}: leave it out under several processes, each takes its own")

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of ranks."""
        if self.world == 1:
            return [value]
        from accelerate.utils import gather_object

        return list(gather_object([value]))

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """An exception of one rank in the block ends all: it is raised there, and the others exit without a message.

        The block must not wait for other ranks.
        """
        fault: Exception | None = None
        try:
            yield
        except Exception as error:
            if self.world == 1:
                raise
            fault = error
        failed = self.gather(fault is not None)
        if fault is not None and failed.index(True) == self.rank:
            raise fault
        if any(failed):
            raise SystemExit(EXIT_USER)

    def on_main(self, work: Callable[[], T]) -> T:
        """Call ``work`` on the main process and return its result on every rank."""
        result: list[Any] = [None]
        with self.together():
            if self.main:
                result = [work()]
        if self.world > 1:
            from accelerate.utils import broadcast_object_list

            broadcast_object_list(result)
        returned: T = result[0]
        return returned

    def close(self) -> None:
        """End the process group, once every process is here."""
        if self._state is not None:
            self._state.wait_for_everyone()
            self._state.destroy_process_group()


ALONE = Ranks()
