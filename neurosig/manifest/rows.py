"""The rows and the header of a manifest, as strict models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from neurosig.models.load import ModelInfo
from neurosig.questions.load import WITHOUT_GOLD, Question
from neurosig.questions.prompts import PromptConfig, teacher_config
from neurosig.questions.reader import AnswerReader
from neurosig.runtime.strict import Strict
from neurosig.sampling.config import SamplingConfig

Reason = Literal[
    "selected", "too_long", "no_parse", "tie", "low_agreement", "cut_off", "score", "rejected", "no_context",
    "hallucination",
]  # fmt: skip
"""``score``: its score; ``rejected``: the filter decided without one; ``hallucination``: ``score`` of old versions."""
Count = Annotated[int, Field(ge=0, lt=2**63)]


class VoteRecord(Strict):
    """A majority vote: votes of the winner, number of rollouts, and number of candidates with that many votes."""

    count: Count
    n: Annotated[Count, Field(ge=1)]
    n_tied: Count


class DemonstrationRecord(Strict):
    """One demonstration of the teacher's context: a rollout of another question, and how similar that question is."""

    question_id: str
    rollout_id: Count
    similarity: float


class QuestionRow(Strict):
    """One input question and the decisions about it.

    Attributes:
        answer_space: See `neurosig.questions.load.Question`, as for the four fields after it.
        privileged_context: Its teacher sees it instead of demonstrations, so ``context`` is empty.
        raw_answers: What the parser read in each of the K rollouts, ``None`` in one without an answer.
        answers: The candidate that each rollout votes for; see `neurosig.questions.reader.Reading`.
        pseudo_label: The majority answer.
        scores: All hallucination scores, higher is less trustworthy.
        selected: Whether distillation trains on the question.
        reason: Why it is selected or not.
        context: The teacher's demonstrations in prompt order.
        weight: Weight of its rollouts in the loss.
    """

    question_id: str
    line: Count
    domain: str
    kind: str | None
    question: str
    choices: tuple[str, ...] | None
    text_sha256: str
    answer_space: str | tuple[tuple[str, ...], ...] | None = None
    system: str | None = None
    earlier_turns: tuple[tuple[str, str], ...] = ()
    as_is: bool = False
    privileged_context: str | None = None
    raw_answers: tuple[str | None, ...] = ()
    answers: tuple[str | None, ...]
    vote: VoteRecord | None
    pseudo_label: str | None
    scores: dict[str, float]
    selected: bool
    reason: Reason
    context: tuple[DemonstrationRecord, ...]
    weight: Annotated[float, Field(ge=0)]

    def as_question(self) -> Question:
        """The question, without a gold answer."""
        return Question(id=self.question_id, **{name: getattr(self, name) for name in WITHOUT_GOLD})


class RolloutRow(Strict):
    """A line of ``rollouts.jsonl``; the fields of `Rollout`."""

    question_id: str
    rollout_id: Count
    text: str
    completion_ids: tuple[Count, ...] = Field(min_length=1)
    finish_reason: Literal["stop", "length"]
    mean_logprob: float | None
    mean_entropy: float | None
    mean_self_certainty: float | None
    answer_start: Count = 0


class FileEntry(Strict):
    """Hash, bytes and rows (``None`` for a file without rows) of one file of the manifest."""

    sha256: str
    bytes: Count
    rows: Count | None


NESTED: Mapping[str, type[Strict]] = {"vote": VoteRecord, "context": DemonstrationRecord, "files": FileEntry}


class Header(Strict):
    """``manifest.json``. ``model`` and ``tokenizer`` are the fingerprints of the model that made the rollouts,
    ``answers`` is the record of their `AnswerReader`, ``lengths`` their `neurosig.sampling.lengths.completion_lengths`;
    ``notes`` say what an option could not decide, such as a cut through equal scores; ``functions`` has the SHA-256 of
    each function that is not ours, by name."""

    format: Literal["neurosig-manifest"]
    schema_version: str
    content_sha256: str
    tool: dict[str, str]
    model: dict[str, Any]
    tokenizer: dict[str, str | None]
    dataset: dict[str, Any]
    sampling: dict[str, Any]
    options: dict[str, Any]
    answers: dict[str, Any]
    counts: dict[str, int]
    lengths: dict[str, float] = Field(default_factory=dict)
    files: dict[str, FileEntry]
    notes: list[str] = Field(default_factory=list)
    functions: dict[str, str] = Field(default_factory=dict)

    def answer_reader(self, answer_parser: str | None = None) -> AnswerReader:
        """How the rollouts were parsed and merged; see `AnswerReader.from_record`."""
        return AnswerReader.from_record(self.answers, answer_parser)

    def prompt_config(self) -> PromptConfig:
        """Wording of the student's prompts."""
        names = ("system", "instruction", "choice_instruction", "student_thinking")
        return PromptConfig(*(self.options[name] for name in names))

    def teacher_prompt_config(self) -> PromptConfig:
        """Wording of the teacher's prompts."""
        own = self.options["teacher_thinking"], self.options["demonstration_thoughts"]
        return teacher_config(self.prompt_config(), *own)

    def adapter(self, given: Path | None = None) -> Path | None:
        """Where the adapter is that made the manifest: ``given``, or where it was; ``None`` if there was none."""
        recorded = self.options.get("adapter")
        return given if given is not None or recorded is None else Path(recorded)

    def sampling_config(self, *, num_generations: int, seed: int, **changes: Any) -> SamplingConfig:
        """The export's sampling options with another K and seed, and with ``changes``."""
        names = ("temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens")
        options = {name: self.options[name] for name in names} | changes
        return SamplingConfig(num_generations=num_generations, seed=seed, **options)

    def differences(self, model: ModelInfo) -> list[str]:
        """What of ``model`` is not of the model that made the manifest: weights, adapter, tokenizer, chat template."""

        def short(digest: Mapping[str, str] | str | None) -> str:
            return str(next(iter(digest.values()), None) if isinstance(digest, Mapping) else digest)[:12]

        pairs = (
            ("weights", self.model["weights"], model.weights),
            ("adapter", self.model.get("adapter"), model.adapter),
            ("tokenizer", self.tokenizer["sha256"], model.tokenizer_sha256),
            ("chat template", self.tokenizer["chat_template_sha256"], model.chat_template_sha256),
        )
        return [f"{what} {short(made)} against {short(here)}" for what, made, here in pairs if made != here]
