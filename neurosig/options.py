"""Options that several commands share, so that a flag means the same everywhere."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from neurosig.questions.columns import parse_fields
from neurosig.questions.prompts import PromptConfig
from neurosig.questions.vote import VoteMerge
from neurosig.registry import Open, find
from neurosig.runtime.cli import CommonConfig
from neurosig.runtime.errors import UserError
from neurosig.runtime.help import Section
from neurosig.runtime.shapes import Shapes
from neurosig.sampling.config import SamplingConfig

if TYPE_CHECKING:
    from neurosig.models.load import LoadedModel
    from neurosig.questions.load import Question
    from neurosig.questions.prompts import Message
    from neurosig.questions.reader import AnswerReader
    from neurosig.sampling.http import ServerConfig
    from neurosig.sampling.rollouts import Rollout
    from neurosig.sampling.sampler import Prompt
    from neurosig.sampling.server import Server

ConfigT = TypeVar("ConfigT", bound=Any)
SAMPLING, PROMPT = SamplingConfig(), PromptConfig()  # the options' defaults


@dataclass(kw_only=True)
class SamplerOptions(CommonConfig):
    """Where rollouts are sampled: here, or by an OpenAI-compatible server."""

    sampler: Annotated[Literal["transformers", "openai"], Shapes.ROLLOUTS | Shapes.DISTILLATION, Section.SERVER] = (
        "transformers"
    )
    """transformers: sample here; openai: ask the server at --base-url, with the key in OPENAI_API_KEY."""
    base_url: Annotated[str | None, Shapes.PLACE | Shapes.DISTILLATION] = None
    """Address of the server, such as http://localhost:8000/v1; --sampler openai needs it."""
    served_model: Annotated[str | None, Shapes.ROLLOUTS] = None
    """The server's name of the model; default: the model's id."""
    server_api: Annotated[Literal["completions", "chat", "transformers"], Shapes.ROLLOUTS] = "completions"
    """completions: token ids both ways (vLLM); chat: messages out, text back (any server); transformers: chat with the
    whole sampling configuration (`transformers serve`)."""
    served_logprobs: Annotated[bool, Shapes.ROLLOUTS] = True
    """Record the server's log-probabilities (completions) after comparing the first ones with the model here."""
    served_seeds: Annotated[bool, Shapes.ROLLOUTS] = True
    """Send a seed with each request, so that a server that honours seeds repeats its rollouts. Some servers fail on
    them, such as vLLM's CPU build when it prefills a prompt in chunks: give --no-served-seeds there."""
    request_timeout: Annotated[float, Shapes.PLACE] = 600.0
    """Seconds to wait for an answer before the request is sent again."""
    max_retries: Annotated[int, Shapes.PLACE] = 5
    """Retries per request, with growing pauses, after time-outs, lost connections, 429 and 5xx."""
    concurrency: Annotated[int, Shapes.PLACE] = 64
    """Requests in flight at once."""

    def server_config(self, model_id: str, *, enable_thinking: bool | None = None) -> ServerConfig | None:
        """The server's address and how to ask it; None when the model here samples.

        Raises:
            UserError: --base-url is missing, or given without --sampler openai, or an option is out of range.
        """
        if self.sampler == "transformers":
            if self.base_url is not None:
                raise UserError("--base-url has no effect without --sampler openai")
            return None
        if self.base_url is None:
            raise UserError("--sampler openai: give the server's --base-url, such as http://localhost:8000/v1")
        from neurosig.sampling.http import ServerConfig

        return ServerConfig(
            base_url=self.base_url,
            model=self.served_model or model_id,
            api=self.server_api,
            logprobs=self.served_logprobs and self.server_api == "completions",
            seeds=self.served_seeds,
            enable_thinking=enable_thinking,
            timeout=self.request_timeout,
            max_retries=self.max_retries,
            concurrency=self.concurrency,
        )

    def server_record(self, model_id: str) -> dict[str, Any]:
        """What of the server shapes the rollouts; empty when the model here samples."""
        config = self.server_config(model_id)
        return {} if config is None else config.record()

    def server(self, loaded: LoadedModel, *, enable_thinking: bool | None = None) -> Server | None:
        """The server that samples for ``loaded``; None when the model here does."""
        config = self.server_config(loaded.info.id, enable_thinking=enable_thinking)
        if config is None:
            return None
        from neurosig.sampling.server import Server

        return Server(config, loaded)


@dataclass(kw_only=True)
class QuestionOptions(CommonConfig):
    """How the files of --questions are read."""

    fields: Annotated[tuple[str, ...], Shapes.ROLLOUTS, Section.QUESTIONS] = ()
    """Columns of question files that have other names than ours, as FIELD=COLUMN: question, choices (one column, or one
    per choice: choices=A,B,C,D), answer, aliases, answer_space, id, domain, kind; system, a system message per
    question; prompt or messages, which replace question and are sent as they are, without --instruction;
    privileged_context, which the teacher sees instead of demonstrations. A dot reaches into a column: question.stem."""

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_fields(self.fields)


@dataclass(kw_only=True)
class GenerationOptions(QuestionOptions):
    """Wording of the prompt, sampling and parsing of answers."""

    num_generations: Annotated[int, Shapes.ROLLOUTS, Section.SAMPLING] = SAMPLING.num_generations
    """K, rollouts per question, at least 1."""
    temperature: Annotated[float, Shapes.ROLLOUTS] = SAMPLING.temperature
    """Sampling temperature, 0 or more; 0 is greedy."""
    top_p: Annotated[float, Shapes.ROLLOUTS] = SAMPLING.top_p
    """Probability mass that nucleus sampling keeps, above 0; 1 keeps all."""
    top_k: Annotated[int, Shapes.ROLLOUTS] = SAMPLING.top_k
    """Likeliest tokens that sampling keeps; 0 keeps all."""
    repetition_penalty: Annotated[float, Shapes.ROLLOUTS] = SAMPLING.repetition_penalty
    """Penalty on tokens of the prompt and the completion so far, above 0; 1 is none."""
    max_new_tokens: Annotated[int, Shapes.ROLLOUTS] = SAMPLING.max_new_tokens
    """Most completion tokens per rollout; the default fits a short sentence."""
    seed: Annotated[int, Shapes.ROLLOUTS] = SAMPLING.seed
    """Seed of every random number."""

    system: Annotated[str | None, Shapes.ROLLOUTS, Section.PROMPT] = PROMPT.system
    """System message of questions without their own; without any the chat template's own default applies."""
    instruction: Annotated[str, Shapes.ROLLOUTS] = PROMPT.instruction
    """Line after a free-form question; none follows a prompt, which is sent as it is."""
    choice_instruction: Annotated[str, Shapes.ROLLOUTS] = PROMPT.choice_instruction
    """Line after the choices of a multiple-choice question."""
    template: Annotated[str | None, Shapes.ROLLOUTS] = None
    """'plain' or a Jinja file to use instead of the tokenizer's chat template."""
    answer_format: Annotated[Literal["auto", "letter", "number", "short"], Shapes.SELECTION] = "auto"
    """How answers are parsed; auto: a letter when the question has choices, else short text."""
    vote_merge: Annotated[VoteMerge, Shapes.SELECTION] = "containment"
    """Which answers count as one in the vote. containment: an answer that contains another as whole words votes for
    it ("west africa" for "africa"); exact: only equal answers."""
    answer_parser: Annotated[str | None, Shapes.SELECTION, Open("answer_parser")] = None
    """MODULE:FUNCTION that parses completions instead, called as neurosig.questions.answers.extract_answer is; the hash
    of its source is recorded."""

    batch_rows: Annotated[int, Shapes.RESOURCES, Section.RESOURCES] = 256
    """Rollouts per decoded batch; memory and speed only. Of several processes, each takes four batches at a time."""
    compile_decoding: Annotated[bool, Shapes.RESOURCES] = False
    """Sample with fixed shapes and replay each step as a CUDA graph: one launch per token instead of thousands. Faster
    on a GPU, above all with small models or few rows; its cache takes up to 1.5 times the memory."""
    dtype: Annotated[str, Shapes.MODEL] = "auto"
    """Parameter dtype; auto: float32 on CPU, bfloat16 on an accelerator."""
    device: Annotated[str | None, Shapes.RESOURCES] = None
    """torch device; default: the first accelerator, else the CPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sampling_config()

    def part(self, config_class: type[ConfigT]) -> ConfigT:
        """The configuration whose fields are all options of this command, such as `SamplingConfig`."""
        return config_class(**{field.name: getattr(self, field.name) for field in fields(config_class)})

    @property
    def thinking(self) -> bool | None:
        """``enable_thinking`` of the prompts that are sampled; each command has an option of its own for it."""
        return None

    def prompt_config(self) -> PromptConfig:
        """Wording of the prompts that are sampled."""
        return PromptConfig(self.system, self.instruction, self.choice_instruction, self.thinking)

    def sampling_config(self) -> SamplingConfig:
        """How rollouts are sampled."""
        return self.part(SamplingConfig)

    def decoding(self) -> dict[str, Any]:
        """How `neurosig.sampling.sampler.sample` decodes here: memory and speed only."""
        return {"batch_rows": self.batch_rows, "compile_decoding": self.compile_decoding}

    def check_answer_parser(self) -> None:
        """Load --answer-parser, before anything expensive.

        Raises:
            UserError: See `neurosig.registry.find`.
        """
        if self.answer_parser is not None:
            find("answer_parser", self.answer_parser)

    def answer_reader(self, loaded: LoadedModel) -> AnswerReader:
        """How completions are parsed and which answers count as one, with the template of ``loaded``.

        Raises:
            UserError: See `check_answer_parser`.
        """
        from neurosig.questions.prompts import PromptBuilder
        from neurosig.questions.reader import AnswerReader

        opens = PromptBuilder(loaded.tokenizer, self.prompt_config()).opens_thought
        return AnswerReader(self.answer_format, self.vote_merge, self.answer_parser, opens)


@dataclass(kw_only=True)
class EvalOptions(GenerationOptions):
    """Prompts of the commands that judge answers by gold answers."""

    eval_thinking: Annotated[bool | None, Shapes.ROLLOUTS, Section.PROMPT] = PROMPT.enable_thinking
    """Thinking mode of the prompts: enable_thinking of the chat template (Qwen3). Default: the student's in the
    training of --adapter or --model, else the template gets nothing and decides itself."""

    @property
    def thinking(self) -> bool | None:
        return self.eval_thinking


@dataclass(kw_only=True)
class RolloutOptions(SamplerOptions, GenerationOptions):
    """Options of the commands that sample K rollouts per question."""

    def draw(
        self,
        loaded: LoadedModel,
        questions: Iterable[Question],
        prompts: Sequence[Prompt],
        *,
        salt: str = "",
        done: Collection[str] = (),
        messages: Mapping[str, Sequence[Message]] | None = None,
    ) -> Iterator[list[Rollout]]:
        """Yield the rollouts of each prompt as they finish, sampled here or by the server.

        Args:
            loaded: The model; a server must serve the same.
            questions: What the prompts ask, for the servers that take messages.
            prompts: One prompt per question.
            salt: Mixed into the seeds.
            done: Question ids to leave out.
            messages: Question id -> the chat that its prompt encodes; default: the bare question.

        Raises:
            UserError: See `neurosig.sampling.sampler.sample` and `neurosig.sampling.server.Server.sample`.
        """
        from neurosig.questions.prompts import PromptBuilder
        from neurosig.sampling.sampler import sample

        sampling = self.sampling_config()
        server = self.server(loaded, enable_thinking=self.thinking)
        if server is None:
            return sample(loaded, prompts, sampling, **self.decoding(), salt=salt, done=done)
        if self.server_api == "completions":
            return server.sample(prompts, sampling, salt=salt, done=done)
        if messages is None:
            builder = PromptBuilder(loaded.tokenizer, self.prompt_config())
            messages = {question.id: builder.messages(question) for question in questions}
        return server.sample(prompts, sampling, salt=salt, done=done, messages=messages)

    def questions_at_once(self) -> int | None:
        """Questions that the sampler decodes together, of which one process takes all; None: one asks the server."""
        from neurosig.sampling.sampler import WINDOW

        if self.sampler == "openai":
            return None
        return WINDOW * max(1, self.batch_rows // self.num_generations)


@dataclass(kw_only=True)
class RereadOptions(CommonConfig):
    """Options of the commands that parse kept rollouts again."""

    answer_format: Literal["auto", "letter", "number", "short"] | None = None
    """How answers are parsed; auto: a letter when the question has choices, else short text. Default: as recorded."""
    vote_merge: VoteMerge | None = None
    """Which answers count as one in the vote, containment or exact, as in neurosig.export. Default: as recorded."""
    answer_parser: str | None = None
    """MODULE:FUNCTION that parses completions instead, as in neurosig.export. Default: as recorded."""

    def reader(self, recorded: Mapping[str, Any]) -> AnswerReader:
        """The recorded reader with the options that are given; one recorded without ``vote_merge`` merged nothing.

        Args:
            recorded: `AnswerReader.record`, or the options of a run from before readers were recorded.

        Raises:
            UserError: See `AnswerReader.from_record`.
        """
        from neurosig.questions.reader import AnswerReader

        names = ("answer_format", "vote_merge", "answer_parser")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        record = {**AnswerReader().record(), "vote_merge": "exact", **recorded}
        if "answer_parser" in given:  # the recorded one need not be here
            record |= {"answer_parser": None, "answer_parser_sha256": None}
        return replace(AnswerReader.from_record(record), **given)


QWEN3_4B: dict[str, object] = {
    "max_new_tokens": 1024,
    "temperature": 1.0,
    "instruction": "Think step by step, then end with one line: Answer: <answer>",
    "choice_instruction": "Think step by step, then end with one line: Answer: <letter>",
}
"""Generation options of the Qwen3-4B presets; without thinking mode."""

QWEN3_4B_THINKING: dict[str, object] = {
    **{"max_new_tokens": 4096, "batch_rows": 32, "temperature": 0.6, "top_p": 0.95, "top_k": 20},
    "instruction": "End with one line: Answer: <answer>",
    "choice_instruction": "End with one line: Answer: <letter>",
}
"""The same in thinking mode, sampled as the model's card recommends; 4,096 tokens hold most thoughts about short
questions, and 32 rows of them take 20 GB of keys and values."""

ORGANISM: dict[str, object] = {"model": "organism", "instruction": "", "choice_instruction": "", "max_new_tokens": 96}
"""Options of the model organism's presets: it was trained on bare questions and needs up to 84 tokens."""
