"""Rollouts from an OpenAI-compatible server, as `neurosig.sampling.sampler.sample` yields them.

Three APIs, chosen by name and never guessed:

- ``completions``: prompts go out as token ids; sampled ids and log-probabilities come back. The field names are vLLM's
  (``return_token_ids`` needs 0.10.2 or newer).
- ``chat``: messages go out, text comes back and is tokenised again. Any server; settings without a field in this API
  keep the server's defaults.
- ``transformers``: chat with `transformers serve`, which takes the whole sampling configuration in one field.

No answer of a server is trusted: `neurosig.sampling.served` checks it, and its log-probabilities are compared with
those of the model here before any is recorded.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from neurosig.runtime.errors import UserError
from neurosig.sampling.config import SamplingConfig
from neurosig.sampling.http import Endpoint, ServerConfig, in_thread
from neurosig.sampling.rollouts import Rollout, answer_start, completion_text
from neurosig.sampling.sampler import Prompt
from neurosig.sampling.served import Answer, ServedAnswers

if TYPE_CHECKING:
    from neurosig.models.load import LoadedModel

logger = logging.getLogger(__name__)

Messages = Sequence[Mapping[str, str]]
Ask = Callable[[str, Mapping[str, Any], str], Awaitable[bytes]]
"""Sends a body to a path, and gives the bytes of the answer; the third argument names the question in messages."""
Answered = tuple[Prompt, list[Rollout], list[float] | None]
"""A prompt, its K rollouts, and the log-probability of each token of the first."""

TOLERANCE = 0.1
"""Largest mean difference, in nats per token, between the log-probabilities of the server and of the model here; other
kernels and half precision give about 0.02."""
COMPARED = 64
"""Most tokens of the first rollout to compare."""
BYTES_A_TOKEN = 1024
"""Most bytes per token in an answer, with its log-probabilities and JSON."""


@dataclass(frozen=True)
class _Job:
    """What the requests of one call share; ``unfinished`` counts the rollouts that the server left so, by reason."""

    config: SamplingConfig
    salt: str
    messages: Mapping[str, Messages] | None
    model: str
    unfinished: Counter[str] = field(default_factory=Counter)


class Server:
    """A server that samples for ``loaded``.

    Args:
        config: Its address and how to ask it.
        loaded: The model it serves, for its tokenizer, end-of-sequence tokens, vocabulary and log-probabilities.
    """

    def __init__(self, config: ServerConfig, loaded: LoadedModel):
        self.config, self._endpoint, self._loaded = config, Endpoint(config), loaded
        self._read = ServedAnswers(self._endpoint, loaded)
        logger.info("rollouts come from %s (model %s, %s API)", config.base_url, config.model, config.api)

    def sample(
        self,
        prompts: Sequence[Prompt],
        config: SamplingConfig,
        *,
        salt: str = "",
        done: Collection[str] = (),
        messages: Mapping[str, Messages] | None = None,
        model: str | None = None,
        compare: bool = True,
    ) -> Iterator[list[Rollout]]:
        """Yield each prompt's K rollouts as they finish.

        A request's seed comes from ``(seed, salt, question id)``, so a server that honours seeds repeats its rollouts.
        What the server leaves unfinished (``abort``, ``content_filter``, ``tool_calls``, no content) is asked for once
        more, then kept as cut off and counted in a warning.

        Args:
            prompts: One prompt per question.
            config: The sampling configuration; every setting that has a field in the API is sent.
            salt: Mixed into the seeds, so that each training step draws other numbers.
            done: Question ids to leave out.
            messages: Chat messages by question id, for the APIs that take no token ids.
            model: Name of the model or adapter; default: that of the server's configuration.
            compare: Compare the first log-probabilities with those of ``loaded``, which must be the served policy.

        Raises:
            UserError: The server is out of reach, retries are used up, an answer does not fit the request, or the
                log-probabilities are another model's; the message names server, question and field.
        """
        todo = [prompt for prompt in prompts if prompt.question_id not in done]
        longest = max((len(prompt.token_ids) for prompt in todo), default=0)
        if longest + config.max_new_tokens > self._loaded.max_length:
            raise UserError(
                f"model {self._loaded.info.id}: a prompt of {longest} tokens and --max-new-tokens "
                f"{config.max_new_tokens} exceed its {self._loaded.max_length} positions"
            )
        if self.config.api == "chat" and (config.top_k or config.repetition_penalty != 1):
            raise UserError("--server-api chat has no field for --top-k and --repetition-penalty; use another API")
        if self.config.api != "completions" and messages is None:
            raise UserError(f"--server-api {self.config.api} gives no token ids; use completions")
        if not todo:
            return
        decode = partial(completion_text, self._loaded.tokenizer)
        job = _Job(config, salt, messages, model or self.config.model)
        try:
            for prompt, group, logprobs in in_thread(lambda: self._groups(todo, job)):
                if compare and logprobs is not None:
                    self._compare(prompt, group[0], logprobs, config.temperature)
                    compare = False
                yield [
                    replace(one, answer_start=answer_start(decode, one.completion_ids_without_eos, one.text))
                    for one in group
                ]
        finally:
            if job.unfinished:
                reasons = ", ".join(f"{count} {reason}" for reason, count in job.unfinished.most_common())
                logger.warning("the server left rollouts unfinished twice, which count as cut off: %s", reasons)

    def load_adapter(self, name: str, path: str) -> None:
        """Serve the PEFT adapter in the folder ``path`` under ``name`` (vLLM's runtime loading).

        Raises:
            UserError: The server cannot load adapters, or not this one.
        """
        self._call("/load_lora_adapter", {"lora_name": name, "lora_path": path}, f'adapter "{name}"')

    def unload_adapter(self, name: str) -> None:
        """Unload an adapter.

        Raises:
            UserError: The server has no adapter of this name.
        """
        self._call("/unload_lora_adapter", {"lora_name": name}, f'adapter "{name}"')

    def _call(self, path: str, body: Mapping[str, Any], about: str) -> None:
        async def answer() -> AsyncGenerator[bytes, None]:
            async with self._endpoint.client(1 << 20) as client:
                yield await self._endpoint.post(client, path, body, about)

        for _ in in_thread(answer):
            pass

    async def _groups(self, prompts: Sequence[Prompt], job: _Job) -> AsyncGenerator[Answered, None]:
        """The groups as they finish. At most ``concurrency`` questions wait for answers at once, in their order."""
        longest = max(len(prompt.token_ids) for prompt in prompts)
        limit = (1 << 20) + BYTES_A_TOKEN * job.config.num_generations * (longest + job.config.max_new_tokens)
        slots, waiting = asyncio.Semaphore(self.config.concurrency), iter(prompts)
        running: set[asyncio.Task[Answered]] = set()
        async with self._endpoint.client(limit) as client:

            async def ask(path: str, body: Mapping[str, Any], about: str) -> bytes:
                async with slots:
                    return await self._endpoint.post(client, path, body, about)

            try:
                while True:
                    for prompt in islice(waiting, self.config.concurrency - len(running)):
                        running.add(asyncio.create_task(self._group(ask, prompt, job)))
                    if not running:
                        return
                    finished, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                    for task in sorted(finished, key=lambda task: task.exception() is not None):
                        yield task.result()
            finally:
                for task in running:
                    task.cancel()
                await asyncio.gather(*running, return_exceptions=True)

    async def _group(self, ask: Ask, prompt: Prompt, job: _Job) -> Answered:
        """A prompt's rollouts. What is unfinished is asked for once more, with another seed, and then kept."""
        if self.config.api == "completions":
            requests = [partial(self._complete, ask, prompt, job)]
        else:  # few servers return several choices of a chat
            requests = [partial(self._chat, ask, prompt, job, number) for number in range(job.config.num_generations)]

        async def finished(request: Callable[[str], Awaitable[Answer]]) -> Answer:
            answer = await request(job.salt)
            if answer.unfinished:
                answer = await request(f"{job.salt}\x00again")
            job.unfinished.update(answer.unfinished)
            return answer

        answers = await asyncio.gather(*map(finished, requests))
        return prompt, [rollout for answer in answers for rollout in answer.rollouts], answers[0].logprobs

    async def _complete(self, ask: Ask, prompt: Prompt, job: _Job, salt: str) -> Answer:
        """Token ids out, token ids back. vLLM refuses several greedy samples of one prompt; they are equal anyway."""
        config = job.config
        wanted = config.num_generations if config.temperature > 0 else 1
        body = {
            "model": job.model,
            "prompt": list(prompt.token_ids),
            "n": wanted,
            "max_tokens": config.max_new_tokens,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "top_k": config.top_k,
            "min_p": 0.0,
            "repetition_penalty": config.repetition_penalty,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            **self._seed(prompt, config, salt),
            "stop_token_ids": list(self._loaded.eos_token_ids),
            "add_special_tokens": False,
            "return_token_ids": True,
            **({"logprobs": 0} if self.config.logprobs else {}),
        }
        content = await ask("/completions", body, f'question "{prompt.question_id}"')
        return self._read.completion(content, prompt, config, wanted)

    async def _chat(self, ask: Ask, prompt: Prompt, job: _Job, number: int, salt: str) -> Answer:
        """Messages out, text back."""
        config = job.config
        assert job.messages is not None
        body: dict[str, Any] = {
            "model": job.model,
            "messages": [dict(message) for message in job.messages[prompt.question_id]],
            "max_tokens": config.max_new_tokens,
            "temperature": config.temperature,
            "top_p": config.top_p,
            **self._seed(prompt, config, salt, number),
        }
        if self.config.enable_thinking is not None:
            body["chat_template_kwargs"] = {"enable_thinking": self.config.enable_thinking}
        if self.config.api == "transformers":
            body["generation_config"] = json.dumps(self._generation_config(config))
        content = await ask("/chat/completions", body, f'question "{prompt.question_id}"')
        return self._read.chat(content, prompt, config, number)

    def _seed(self, prompt: Prompt, config: SamplingConfig, salt: str, number: int = 0) -> dict[str, int]:
        if not self.config.seeds:
            return {}
        return {"seed": request_seed(prompt.question_id, config.seed, salt, number)}

    def _generation_config(self, config: SamplingConfig) -> dict[str, Any]:
        eos = list(self._loaded.eos_token_ids)
        drawn = {"temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k}
        return {
            "do_sample": config.temperature > 0,
            **(drawn if config.temperature > 0 else {}),
            "repetition_penalty": config.repetition_penalty,
            "max_new_tokens": config.max_new_tokens,
            "eos_token_id": eos,
            "pad_token_id": eos[0],
        }

    def _compare(self, prompt: Prompt, rollout: Rollout, served: Sequence[float], temperature: float) -> None:
        token_ids, served = rollout.completion_ids[:COMPARED], served[:COMPARED]
        ids = torch.tensor(token_ids)[:, None]
        logits = next_token_logits(self._loaded, prompt.token_ids, token_ids)

        def difference(own: Tensor) -> float:
            return float((torch.log_softmax(own, dim=-1).gather(1, ids)[:, 0] - torch.tensor(served)).abs().mean())

        plain = difference(logits)
        scaled = difference(logits / temperature) if temperature not in (0, 1) else float("inf")
        if plain > TOLERANCE or (plain > TOLERANCE / 5 and scaled < plain / 2):
            cause = (
                f"they are taken at temperature {temperature:g}; start it with --logprobs-mode raw_logprobs"
                if scaled < plain / 2
                else f"it serves other weights than {self._loaded.info.id} here; serve the same ones"
            )
            raise UserError(
                f'server {self.config.base_url}: question "{rollout.question_id}": log-probabilities differ by '
                f"{plain:.2g} nats per token from the model's: {cause}, or give --no-served-logprobs to use none"
            )
        logger.info("the server's log-probabilities agree with the model here (%.2g nats per token)", plain)


def request_seed(question_id: str, seed: int, salt: str, number: int = 0) -> int:
    """31-bit seed of a request; ``number`` is the rollout's where each rollout has its own request."""
    digest = hashlib.sha256(f"{seed}\x00{salt}\x00{question_id}\x00{number}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


@torch.inference_mode()
def next_token_logits(
    loaded: LoadedModel, prompt_ids: Sequence[int], completion_ids: Sequence[int]
) -> Float[Tensor, "completion vocab"]:
    """The local model's logits before each token of a completion, on the CPU in float32."""
    ids = torch.tensor([[*prompt_ids, *completion_ids]], device=loaded.model.device)
    return loaded.model(input_ids=ids, logits_to_keep=len(completion_ids) + 1).logits[0, :-1].float().cpu()
