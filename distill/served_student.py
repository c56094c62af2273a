"""The student on a server: write its adapter, load it there by name, and sample from it."""

from __future__ import annotations

import logging
import secrets
import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING

from neurosig.runtime.errors import UserError
from neurosig.runtime.files import atomic_folder

if TYPE_CHECKING:
    from peft import PeftModel

    from distill.config import TrainConfig
    from neurosig.sampling.config import SamplingConfig
    from neurosig.sampling.rollouts import Rollout
    from neurosig.sampling.sampler import Prompt
    from neurosig.sampling.server import Server

logger = logging.getLogger(__name__)

FOLDER = "served"


class ServedStudent:
    """The adapter that a server has of the student, and its age.

    Every ``sync_steps`` optimizer steps (0: never) the adapter is sent under a new name and the one before is unloaded.
    A resumed run sends its weights at once, so it equals an uninterrupted one with ``sync_steps=1`` only.

    Attributes:
        updates: Optimizer steps of the student.
        policy_step: Optimizer steps of the weights that were sampled from last.
    """

    def __init__(self, config: TrainConfig, server: Server, adapter: PeftModel, updates: int):
        self._config, self._server, self._adapter = config, server, adapter
        self._folder = (config.adapter_dir or config.out / FOLDER).resolve()
        self._run = secrets.token_hex(4)  # other runs may use the same server
        self._name: str | None = None
        self.updates, self.policy_step = updates, 0

    @property
    def staleness(self) -> int:
        """Optimizer steps between the weights sampled from and the student."""
        return self.updates - self.policy_step

    def sample(
        self, prompts: Sequence[Prompt], sampling: SamplingConfig, salt: str, *, fresh: bool = False
    ) -> list[list[Rollout]]:
        """Rollouts from the served weights, which are updated first when that is due or if ``fresh``.

        While the student's current weights are served, the server's log-probabilities are compared with the student's.

        Raises:
            UserError: The server cannot load the adapter, the weights are too stale, or see
                `neurosig.sampling.server.Server.sample`.
        """
        due = self._name is None or self.staleness >= self._config.sync_steps or fresh
        if self._config.sync_steps and due and (self._name is None or self.staleness):
            self._send()
        if self.staleness > self._config.max_staleness:
            raise UserError(
                f"the served weights are {self.staleness} steps behind, more than --max-staleness "
                f"{self._config.max_staleness} allows"
            )
        if self.staleness:
            logger.info("sampling from the weights of step %d, %d behind", self.policy_step, self.staleness)
        return list(self._server.sample(prompts, sampling, salt=salt, model=self._name, compare=not self.staleness))

    def updated(self, step: int) -> dict[str, int]:
        """Count the student's update; the metrics of the weights that the step's rollouts came from."""
        record = {"policy_step": self.policy_step, "staleness": self.staleness}
        self.updates = step
        return record

    def close(self) -> None:
        """Unload the adapter and remove its folder."""
        if self._name is not None:
            self._forget(self._name)
            self._name = None
        if self._config.adapter_dir is None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _send(self) -> None:
        before, name = self._name, f"neurosig-{self._run}-step{self.updates}"
        if before is None and self._config.adapter_dir is None:  # left by a killed run
            shutil.rmtree(self._folder, ignore_errors=True)
        path = self._folder / name
        with atomic_folder(path) as aside:
            self._adapter.save_pretrained(str(aside), save_embedding_layers=False)
        try:
            self._server.load_adapter(name, str(path))
        except UserError as error:
            raise UserError(
                f"{error} (vLLM loads adapters when started with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and "
                f"--enable-lora, and must be able to read {path}; to sample from the served weights as they are, "
                "give --sync-steps 0 and a --max-staleness)"
            ) from error
        self._name, self.policy_step = name, self.updates
        if before is not None:
            self._forget(before)

    def _forget(self, name: str) -> None:
        try:
            self._server.unload_adapter(name)
        except UserError as error:  # a restarted server no longer has it
            logger.warning("%s", error)
        shutil.rmtree(self._folder / name, ignore_errors=True)
