"""Rollouts from an OpenAI-compatible server, as `neurosig.sampling.sampler.sample` yields them.

Three APIs, chosen by name and never guessed:

- ``completions``: prompts go out as token ids; sampled ids and log-probabilities come back. The field names are vLLM's
  (``return_token_ids`` needs 0.10.2 or newer).
- ``chat``: messages go out, text comes back and is tokenised again. Any server; settings without a field in this API
  keep the server's defaults.
- ``transformers``: chat with `transformers serve`, which takes the whole sampling configuration in one field.

No answer of a server is trusted: sizes, types and token ids are checked, and its log-probabilities are compared with
those of the model here before any is recorded.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import AsyncGenerator, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError
from torch import Tensor

from neurosig.runtime.errors import UserError
from neurosig.sampling.config import SamplingConfig
from neurosig.sampling.http import Endpoint, ServerConfig, in_thread
from neurosig.sampling.rollouts import Rollout, answer_start, completion_text
from neurosig.sampling.sampler import Prompt

if TYPE_CHECKING:
    from neurosig.models.load import LoadedModel

logger = logging.getLogger(__name__)

Messages = Sequence[Mapping[str, str]]
Answered = tuple[Prompt, list[Rollout], list[float] | None]
"""A prompt, its K rollouts, and the log-probability of each token of the first."""

TOLERANCE = 0.1
"""Largest mean difference, in nats per token, between the log-probabilities of the server and of the model here; other
kernels and half precision give about 0.02."""
COMPARED = 64
"""Most tokens of the first rollout to compare."""
BYTES_A_TOKEN = 1024
"""Most bytes per token in an answer, with its log-probabilities and JSON."""


class Server:
    """A server that samples for ``loaded``.

    Args:
        config: Its address and how to ask it.
        loaded: The model it serves, for its tokenizer, end-of-sequence tokens, vocabulary and log-probabilities.
    """

    def __init__(self, config: ServerConfig, loaded: LoadedModel):
        self.config, self._endpoint, self._loaded = config, Endpoint(config), loaded
        self._eos = frozenset(loaded.eos_token_ids)
        self._longest_token = max(map(len, loaded.tokenizer.get_vocab()))
        self._vocabulary = loaded.model.get_input_embeddings().get_parameter("weight").shape[0]
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
        name, decode = model or self.config.model, partial(completion_text, self._loaded.tokenizer)
        for prompt, group, logprobs in in_thread(lambda: self._answers(todo, config, salt, messages, name)):
            if compare and logprobs is not None:
                self._compare(prompt, group[0], logprobs, config.temperature)
                compare = False
            yield [replace(one, answer_start=answer_start(decode, one.completion_ids_without_eos)) for one in group]

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

    async def _answers(
        self,
        prompts: Sequence[Prompt],
        config: SamplingConfig,
        salt: str,
        messages: Mapping[str, Messages] | None,
        model: str,
    ) -> AsyncGenerator[Answered, None]:
        longest = max(len(prompt.token_ids) for prompt in prompts)
        limit = (1 << 20) + BYTES_A_TOKEN * config.num_generations * (longest + config.max_new_tokens)
        slots = asyncio.Semaphore(self.config.concurrency)
        async with self._endpoint.client(limit) as client:

            async def ask(path: str, body: Mapping[str, Any], about: str) -> bytes:
                async with slots:
                    return await self._endpoint.post(client, path, body, about)

            def group(prompt: Prompt) -> Any:
                if messages is None or self.config.api == "completions":
                    return self._complete(ask, prompt, config, salt, model)
                return self._chat(ask, prompt, messages[prompt.question_id], config, salt, model)

            tasks = [asyncio.create_task(group(prompt)) for prompt in prompts]
            try:
                for finished in asyncio.as_completed(tasks):
                    yield await finished
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _complete(
        self, ask: Callable[..., Any], prompt: Prompt, config: SamplingConfig, salt: str, model: str
    ) -> Answered:
        """Token ids out, token ids back. vLLM refuses several greedy samples of one prompt; they are equal anyway."""
        wanted = config.num_generations if config.temperature > 0 else 1
        body = {
            "model": model,
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
            "seed": request_seed(prompt.question_id, config.seed, salt),
            "stop_token_ids": list(self._loaded.eos_token_ids),
            "add_special_tokens": False,
            "return_token_ids": True,
            **({"logprobs": 0} if self.config.logprobs else {}),
        }
        about = f'question "{prompt.question_id}"'
        answer = self._parse(_Completion, await ask("/completions", body, about), about)
        choices = self._ordered(answer.choices, wanted, about)
        group = [self._from_ids(prompt, number, choice, config, about) for number, choice in enumerate(choices)]
        first = choices[0].logprobs.token_logprobs if choices[0].logprobs is not None else None
        if wanted < config.num_generations:
            group = [self._from_ids(prompt, n, choices[0], config, about) for n in range(config.num_generations)]
        return prompt, group, first

    def _from_ids(self, prompt: Prompt, number: int, choice: _Choice, config: SamplingConfig, about: str) -> Rollout:
        ids, where = choice.token_ids, f"choices.{choice.index}."
        if not 1 <= len(ids) <= config.max_new_tokens:
            raise self._endpoint.fault(about, where + "token_ids", f"{len(ids)} of at most {config.max_new_tokens} ids")
        if not all(0 <= token < self._vocabulary for token in ids):
            raise self._endpoint.fault(
                about, where + "token_ids", f"an id outside the vocabulary of {self._vocabulary}"
            )
        if not self._eos.isdisjoint(ids[:-1]):
            raise self._endpoint.fault(about, where + "token_ids", "it continues after an end-of-sequence token")
        ended = ids[-1] in self._eos  # vLLM calls it `length` when that token was also the last allowed
        if choice.finish_reason == "stop" and not ended:
            raise self._endpoint.fault(
                about, where + "finish_reason", "stop, without one of the model's end-of-sequence tokens"
            )
        if not ended and len(ids) < config.max_new_tokens:
            raise self._endpoint.fault(
                about, where + "finish_reason", f"length, after {len(ids)} of {config.max_new_tokens} tokens"
            )
        mean_logprob = None
        if self.config.logprobs:
            if choice.logprobs is None or len(choice.logprobs.token_logprobs) != len(ids):
                raise self._endpoint.fault(about, where + "logprobs", f"expected one for each of {len(ids)} tokens")
            if max(choice.logprobs.token_logprobs) > 1e-3:
                raise self._endpoint.fault(about, where + "logprobs", "a log-probability above 0")
            mean_logprob = sum(choice.logprobs.token_logprobs) / len(ids)
        text = completion_text(self._loaded.tokenizer, ids[:-1] if ended else ids)
        reason: Literal["stop", "length"] = "stop" if ended else "length"
        return Rollout(prompt.question_id, number, text, tuple(ids), reason, mean_logprob)

    async def _chat(
        self,
        ask: Callable[..., Any],
        prompt: Prompt,
        messages: Messages,
        config: SamplingConfig,
        salt: str,
        model: str,
    ) -> Answered:
        """Messages out, text back: one request per rollout, as few servers return several choices."""
        about = f'question "{prompt.question_id}"'
        body: dict[str, Any] = {
            "model": model,
            "messages": [dict(message) for message in messages],
            "max_tokens": config.max_new_tokens,
            "temperature": config.temperature,
            "top_p": config.top_p,
        }
        if self.config.enable_thinking is not None:
            body["chat_template_kwargs"] = {"enable_thinking": self.config.enable_thinking}
        if self.config.api == "transformers":
            body["generation_config"] = json.dumps(self._generation_config(config))

        async def one(number: int) -> Rollout:
            seed = request_seed(prompt.question_id, config.seed, salt, number)
            answer = self._parse(_Chat, await ask("/chat/completions", {**body, "seed": seed}, about), about)
            (choice,) = self._ordered(answer.choices, 1, about)
            return self._from_text(prompt, number, choice, config, about)

        return prompt, list(await asyncio.gather(*(one(number) for number in range(config.num_generations)))), None

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

    def _from_text(
        self, prompt: Prompt, number: int, choice: _ChatChoice, config: SamplingConfig, about: str
    ) -> Rollout:
        text, field = choice.message.content, "choices.0.message.content"
        if len(text) > self._longest_token * config.max_new_tokens:
            raise self._endpoint.fault(
                about, field, f"{len(text)} characters, more than {config.max_new_tokens} tokens can spell"
            )
        encoded = self._loaded.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        ids = [*encoded, *([self._loaded.eos_token_ids[0]] if choice.finish_reason == "stop" else [])]
        if not ids:
            raise self._endpoint.fault(about, field, "empty, although it was cut off")
        if len(prompt.token_ids) + len(ids) > self._loaded.max_length:  # more than were sampled
            raise self._endpoint.fault(about, field, f"{len(ids)} tokens, more than the model has positions for")
        return Rollout(prompt.question_id, number, text, tuple(ids), choice.finish_reason)

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

    def _parse(self, kind: type[_AnswerT], content: bytes, about: str) -> _AnswerT:
        try:
            return kind.model_validate_json(content)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            field = ".".join(str(part) for part in first["loc"]) or "answer"
            hint = (
                "; vLLM 0.10.2 and newer returns it, for other servers give --server-api chat"
                if field.endswith("token_ids")
                else ""
            )
            raise self._endpoint.fault(about, field, first["msg"] + hint) from error

    def _ordered(self, choices: Sequence[_ChoiceT], wanted: int, about: str) -> list[_ChoiceT]:
        ordered = sorted(choices, key=lambda choice: choice.index)
        if [choice.index for choice in ordered] != list(range(wanted)):
            raise self._endpoint.fault(about, "choices", f"expected {wanted}, numbered from 0, got {len(choices)}")
        return ordered


class _Answer(BaseModel):
    model_config = ConfigDict(strict=True)


class _Logprobs(_Answer):
    token_logprobs: list[FiniteFloat]


class _Numbered(_Answer):
    index: int
    finish_reason: Literal["stop", "length"]


class _Choice(_Numbered):
    token_ids: list[int]
    logprobs: _Logprobs | None = None


class _Completion(_Answer):
    choices: list[_Choice]


class _Message(_Answer):
    content: str


class _ChatChoice(_Numbered):
    message: _Message


class _Chat(_Answer):
    choices: list[_ChatChoice]


_AnswerT = TypeVar("_AnswerT", _Completion, _Chat)
_ChoiceT = TypeVar("_ChoiceT", _Choice, _ChatChoice)


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
