"""Options of ``python -m neurosig.export`` and their presets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from neurosig.hallucination.config import INVERSE_PENALTY, ProbeConfig, ProbeLabels, ProbeValues
from neurosig.neurons.config import NeuronValue, TraceConfig, check_positions
from neurosig.options import ORGANISM, PROMPT, QWEN3_4B, QWEN3_4B_THINKING, RolloutOptions
from neurosig.patterns import Signature
from neurosig.questions.prompts import PRIVILEGED_WORDING, PromptConfig, check_privileged_wording, teacher_config
from neurosig.registry import ActiveSet, ContextPolicy, Contribution, HallucinationScore, Open, QuestionFilter, find
from neurosig.runtime.errors import UserError
from neurosig.runtime.help import Section
from neurosig.runtime.shapes import AtLeast, Shapes
from neurosig.selection.config import QuestionWeight, SelectionConfig

TRACE, PROBE, SELECTION = TraceConfig(), ProbeConfig(), SelectionConfig()  # the options' defaults


@dataclass(kw_only=True)
class ExportConfig(RolloutOptions):
    """Write a selection manifest from unlabelled questions.

    Samples K rollouts per question, traces the neurons behind them, selects the questions whose majority answer these
    neurons trust, and gives each a few-shot context of questions that reason alike.
    """

    model: Annotated[str, Shapes.MODEL, Section.QUESTIONS]
    """Hub id, folder, GGUF file, or a bundled model: smollm2-135m, organism."""
    adapter: Annotated[Path | None, Shapes.MODEL] = None
    """Look at a trained model: folder of a distill.train run, its adapter/ or one of its checkpoints/step-N. Training
    on the manifest then continues this adapter."""
    questions: Annotated[tuple[str, ...], Shapes.ROLLOUTS]
    """Bundled set (world-facts, geography, language, chemistry, procedures, organism-facts; optionally :train, :dev,
    :test), file (.jsonl, .parquet, .json, .csv, .tsv; the texts also as .gz or .zst), folder, or hf:ORG/NAME or
    hf:ORG/NAME/SET, optionally with :SPLIT; several are allowed."""
    out: Annotated[Path, Shapes.PLACE]
    """Folder of the manifest."""
    rollouts: Annotated[Path | None, Shapes.ROLLOUTS] = None
    """JSONL of rollouts that replace sampling: question_id, text, optional completion_ids and finish_reason. K is the
    number that the file holds of every question; lines of other questions are left out."""
    reuse: Annotated[Path | None, Shapes.PLACE] = None
    """Finished export with the same questions, sampling and tracing; only scoring and selection are done again."""
    split: Annotated[Literal["train", "dev", "test", "all"], Shapes.ROLLOUTS] = "train"
    """Split of the bundled sets that name none."""
    limit: Annotated[int | None, Shapes.ROLLOUTS] = None
    """Use only the first N questions."""
    resume: Annotated[bool, Shapes.PLACE, Section.OUTPUT] = False
    """Continue an interrupted export; leave a complete one unchanged."""
    overwrite: Annotated[bool, Shapes.PLACE] = False
    """Replace an earlier export in --out."""

    student_thinking: Annotated[bool | None, Shapes.ROLLOUTS, Section.PROMPT] = PROMPT.enable_thinking
    """Thinking mode of the student, whose rollouts these are: enable_thinking of the chat template (Qwen3), which by
    default gets nothing and then decides itself."""
    teacher_thinking: Annotated[bool | None, Shapes.SELECTION] = None
    """Thinking mode of the teacher's prompt in training; default: the student's. Both score the same tokens, so a mode
    that would read the student's answer as a thought, or the reverse, is refused."""
    demonstration_thoughts: Annotated[bool, Shapes.SELECTION] = SELECTION.demonstration_thoughts
    """Demonstrations show the thought too, even where the chat template drops those of earlier turns, and it counts in
    --max-context-tokens, which two thoughts easily exceed. By default they show the answer after it alone."""

    positions: Annotated[str, Shapes.TRACES, Section.NEURONS] = "answer"
    """Tokens whose neurons are read: answer, those after the thought; thought, those up to its end; all; statement, the
    sentence in which the answer is read; answer_words, its words in that sentence; answer_start, the first token after
    the thought; prompt_end, the prompt's last, which predicts the first token and is the same in all rollouts; or
    tokens of the completion as in Python, such as 0, -1, 0:3 or 0,-1 (--positions=-3: with an equals sign). A rollout
    without such a token is read at its answer, one without a thought as a whole; the manifest's notes count them.
    answer is the default because no other reading ranked other questions reliably better (python -m
    figures.experiments.signal_search). Scores of outputs are means over the whole completion. thought and all keep
    every token's neurons while a layer is reduced: about 1 GB per 8,192 tokens of a 4B model."""
    neuron_value: Annotated[NeuronValue, Shapes.TRACES] = TRACE.value
    """A neuron's value: act(gate)*up, or act(gate) alone."""
    contribution: Annotated[Contribution | str, Shapes.TRACES, Open("contribution")] = TRACE.score
    """A neuron's score at a token: cett, its output's norm as a share of the FFN output's; magnitude, that norm alone;
    unembed, what it adds to the next token's logit. MODULE:FUNCTION is a function of your own, here and below."""
    active_set: Annotated[ActiveSet | str, Shapes.TRACES, Open("active_set")] = TRACE.active
    """Which neurons are kept: layer_mean, the largest mean scores of each layer; global, those of all layers;
    per_token, the union of each token's largest; entries, those of each layer's largest (token, neuron) scores;
    token_entries, of each token's largest those with the largest scores of all layers."""
    set_size: Annotated[int | float, Shapes.TRACES] = TRACE.set_size
    """Size of an active set: below 1, a share of the model's neurons (layer_mean: of each layer's, rounded up), so that
    larger models have larger sets; from 1, a number of neurons. The default is 1,020 of smollm2-135m's 46,080 neurons.
    per_token: neurons per token; entries: entries per layer; token_entries: both, neurons per token and entries of all
    layers. The manifest records the number."""
    positive_only: Annotated[bool, Shapes.TRACES] = TRACE.positive_only
    """Leave out neurons whose mean score is not above 0; for the signed unembed."""
    hallucination_score: Annotated[HallucinationScore | str, Shapes.SELECTION, Open("score"), Section.SCORE] = (
        "probe_score"
    )
    """Score that --question-filter ranks by; the manifest holds all of them. vote_share to random are baselines without
    neurons. With --teacher-rollouts, what the context does to the teacher: belief_shift, the divergence of its answers
    from the student's; entropy_gap; teacher_agreement; teacher_set_size. context_information, how much the
    demonstrations tell about the question."""
    more_scores: Annotated[tuple[str, ...], Shapes.SELECTION, Open("score")] = ()
    """Scores of your own that the manifest and the report hold too."""
    teacher_rollouts: Annotated[int, Shapes.SELECTION, AtLeast(0)] = 0
    """M, completions that the teacher samples with its context for each question that is not ruled out by votes: its
    context is then chosen among all of these, before the score decides. 0: none."""
    probe_labels: Annotated[ProbeLabels, Shapes.SELECTION] = PROBE.labels
    """What the probe learns. agreement: questions whose rollouts split against questions whose rollouts agree;
    contrast: in a question whose winner has at least --probe-split-share, rollouts with another answer against the
    winner's. It ranked other questions better in some domains and worse in others, so that agreement is the default."""
    probe_values: Annotated[ProbeValues, Shapes.SELECTION] = PROBE.values
    """What the probe reads of an active neuron. contribution: its mean; layer_z: that in standard deviations over its
    layer's neurons in the same rollout, which leaves out how strongly a layer speaks as a whole."""
    probe_agree_share: Annotated[float, Shapes.SELECTION] = PROBE.agree_share
    """The probe learns a question as known when the winner has at least this share of the K answers, 0 to 1; 1 asks for
    unanimity, which a weak model rarely reaches."""
    probe_split_share: Annotated[float, Shapes.SELECTION] = PROBE.split_share
    """The probe learns a question as guessed when the winner has less than this share, 0 to --probe-agree-share."""
    probe_inverse_penalty: Annotated[float, Shapes.SELECTION] = INVERSE_PENALTY
    """C of the L1 probe, above 0; a smaller one keeps fewer neurons."""
    probe_folds: Annotated[int, Shapes.SELECTION] = PROBE.folds
    """Cross-fitting folds of the probe, at least 2."""
    probe_groups: Annotated[str, Shapes.SELECTION] = PROBE.groups
    """What the probe's folds keep together. question: a question is scored by a probe that saw others of its kind;
    kind, domain or another column of the questions: by a probe that saw none with the same value, so that a score
    cannot come from what tells the kinds apart. Fewer values than --probe-folds give one fold each."""
    probe_fold_seeds: Annotated[int, Shapes.SELECTION] = PROBE.fold_seeds
    """Times that the probe's folds are drawn, at least 1; the scores are the mean, and neurosig.report shows how far
    the drawings differ."""

    question_filter: Annotated[QuestionFilter | str, Shapes.SELECTION, Open("filter"), Section.SELECTION] = (
        SELECTION.question_filter
    )
    """Questions to train on. neuron: --min-vote-share, then the --keep-fraction with the lowest scores, whatever the
    score; vote_only and neuron_only: one of these two conditions; threshold: --min-vote-share and --max-score;
    redundancy: the --keep-fraction that are least alike; all: every question. All but the last need a rollout of the
    majority that was not cut off."""
    min_vote_share: Annotated[float, Shapes.SELECTION] = SELECTION.min_vote_share
    """Least share of the K answers that the winner needs, 0 to 1."""
    keep_fraction: Annotated[float, Shapes.SELECTION] = SELECTION.keep_fraction
    """Share of the questions to select by score, above 0 and at most 1."""
    keep_scores: Annotated[Literal["lowest", "highest"], Shapes.SELECTION] = SELECTION.keep_scores
    """Which scores are selected: the lowest, as suits hallucination, or the highest, as suits belief_shift."""
    max_score: Annotated[float, Shapes.SELECTION] = SELECTION.max_score
    """Largest score that --question-filter threshold selects; with --keep-scores highest, the smallest."""
    signature: Annotated[Signature, Shapes.SELECTION] = SELECTION.signature
    """What similarity compares: representative, the active set of the most trusted majority rollout; union,
    intersection and frequency, neurons in any, all or half of these rollouts; hidden_state, the embedding baseline."""
    context_policy: Annotated[ContextPolicy | str, Shapes.SELECTION, Open("context")] = SELECTION.context_policy
    """How the teacher's demonstrations are chosen: nearest, the most similar questions, the best last; nearest_first,
    the best first; random; random_within_kind, the control for topic; by hidden states at the answer: trajectory, those
    of all layers times the demonstration's certainty (INFLOW), final_layer, and mutual, one by one for what they add;
    majority_solution, the question's own shortest majority rollout (U-OPSD); likeliest_solution, its likeliest (CANON);
    none. A question with a privileged_context gets that instead."""
    num_demonstrations: Annotated[int, Shapes.SELECTION] = SELECTION.num_demonstrations
    """Demonstrations per context, at least 1."""
    max_context_tokens: Annotated[int, Shapes.SELECTION] = SELECTION.max_context_tokens
    """Tokens per context; the least similar demonstrations are dropped to stay within them."""
    same_label_excluded: Annotated[bool, Shapes.SELECTION] = SELECTION.same_label_excluded
    """Exclude demonstrations with the question's own pseudo-label, so that none gives the answer away."""
    privileged_wording: Annotated[str, Shapes.SELECTION] = PRIVILEGED_WORDING
    """How the teacher is asked a question that has a privileged_context; {question} is what the student is asked, with
    choices and instruction."""
    keep_truncated: Annotated[bool, Shapes.SELECTION] = SELECTION.keep_truncated
    """Let rollouts that were cut off represent their question and serve as demonstrations. By default a question whose
    majority has no other rollout is left out, with the reason cut_off."""
    question_weight: Annotated[QuestionWeight, Shapes.SELECTION] = SELECTION.question_weight
    """A question's weight in the loss: 1, or the winner's share of the K answers."""

    batch_tokens: Annotated[int, Shapes.RESOURCES, Section.RESOURCES] = TRACE.batch_tokens
    """Tokens per traced batch, padding included; memory and speed only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positions(self.positions)
        self.trace_config()
        self.probe_config()
        self.part(SelectionConfig)
        if self.hallucination_score in OF_THE_TEACHER and not self.teacher_rollouts:
            raise UserError(
                f"--hallucination-score {self.hallucination_score} reads what the teacher answers; give "
                "--teacher-rollouts 5, or another number"
            )
        check_privileged_wording(self.privileged_wording)

    @property
    def thinking(self) -> bool | None:
        return self.student_thinking

    @property
    def sees_contexts(self) -> bool:
        """Whether contexts are chosen before the score decides, since it reads them."""
        return self.teacher_rollouts > 0 or self.hallucination_score == "context_information"

    @property
    def needs_states(self) -> bool:
        """Whether selection reads hidden states at the answers; a function of the user's may."""
        named = self.context_policy, self.question_filter
        return bool({*named} & {*OF_STATES}) or find("context", named[0]).sha256 is not None

    def functions(self) -> dict[str, str]:
        """SHA-256 of the source of each option's function that is not ours, by name.

        Raises:
            UserError: A module fails, or there is no such function; see `neurosig.registry.find`.
        """
        scores = (self.hallucination_score, *self.more_scores)
        found = [
            find("contribution", self.contribution),
            find("active_set", self.active_set),
            find("filter", self.question_filter),
            find("context", self.context_policy),
            *(find("score", name) for name in scores),
        ]
        return {one.name: one.sha256 for one in found if one.sha256 is not None}

    def teacher_prompt_config(self) -> PromptConfig:
        """Wording of the teacher's prompts in training."""
        return teacher_config(self.prompt_config(), self.teacher_thinking, self.demonstration_thoughts)

    def trace_config(self) -> TraceConfig:
        """How rollouts are traced."""
        measured = self.neuron_value, self.contribution, self.active_set
        return TraceConfig(*measured, self.set_size, self.positive_only, self.batch_tokens)

    def probe_config(self) -> ProbeConfig:
        """How the probe is fitted."""
        shares = self.probe_agree_share, self.probe_split_share
        return ProbeConfig(
            *shares,
            self.probe_inverse_penalty,
            folds=self.probe_folds,
            groups=self.probe_groups,
            fold_seeds=self.probe_fold_seeds,
            labels=self.probe_labels,
            values=self.probe_values,
            seed=self.seed,
        )


OF_THE_TEACHER = ("belief_shift", "entropy_gap", "teacher_agreement", "teacher_set_size")
"""Scores that read the teacher's rollouts."""
OF_STATES = ("trajectory", "final_layer", "mutual", "redundancy")
"""Policies and filters that read hidden states at the answers."""

INFLOW: Mapping[str, object] = {
    **{"num_generations": 1, "temperature": 0.6, "top_p": 0.95, "num_demonstrations": 3, "max_context_tokens": 4096},
    **{"question_filter": "neuron_only", "keep_fraction": 0.2, "keep_scores": "highest", "teacher_rollouts": 5},
}
"""What INFLOW gives itself and its baselines (appendices D and E.1): one rollout, three demonstrations, five of the
teacher's completions, a fifth of the questions. Its 256 tokens and structured response are left to the user."""
PRESETS: Mapping[str, Mapping[str, object]] = {
    "cpu": {"model": "smollm2-135m"},
    "qwen3-4b": {"model": "Qwen/Qwen3-4B", **QWEN3_4B, "student_thinking": False},
    "qwen3-4b-thinking": {"model": "Qwen/Qwen3-4B", **QWEN3_4B_THINKING, "student_thinking": True},
    "neufs": {"neuron_value": "act", "contribution": "unembed", "active_set": "entries", "set_size": 2000},
    "inflow": {**INFLOW, "context_policy": "trajectory", "hallucination_score": "belief_shift"},
    "published": {
        **INFLOW,
        **{"contribution": "unembed", "positive_only": True, "active_set": "token_entries"},
        **{"context_policy": "nearest", "hallucination_score": "teacher_set_size", "keep_scores": "lowest"},
    },
    "consistency": {**INFLOW, "context_policy": "none", "hallucination_score": "teacher_agreement"},
    "redundancy": {**INFLOW, "context_policy": "final_layer", "question_filter": "redundancy"},
    "mutual": {
        **INFLOW,
        **{"context_policy": "mutual", "hallucination_score": "context_information", "teacher_rollouts": 0},
    },
    "full": {**INFLOW, "context_policy": "final_layer", "question_filter": "all", "teacher_rollouts": 0},
    "canon": {"question_filter": "vote_only", "min_vote_share": 0.0, "context_policy": "likeliest_solution"},
    "u-opsd": {"question_filter": "vote_only", "context_policy": "majority_solution"},
    "organism": {**ORGANISM, "questions": ("procedures",), "limit": 160, "set_size": 0.0868, "keep_fraction": 0.9},
}
