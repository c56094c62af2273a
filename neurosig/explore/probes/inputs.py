"""What a probe is fitted on: texts as a matrix, labels and groups of any array type."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from scipy import sparse

from neurosig.explore.traces import Traces
from neurosig.hallucination.config import ProbeConfig
from neurosig.hallucination.probe import fold_splits, probe_matrix, rollout_labels
from neurosig.questions.load import Question
from neurosig.questions.reader import AnswerReader
from neurosig.runtime.errors import UserError

logger = logging.getLogger(__name__)

FREE_LABELS: dict[Literal["agreement", "contrast"], tuple[str, str]] = {
    "agreement": ("agree", "split"),
    "contrast": ("majority", "other"),
}
"""Classes of the labels that need no gold answer, the positive one last."""
Label = bool | int | float | str


@dataclass(frozen=True, slots=True, eq=False)
class ProbeInput:
    """Texts as a probe reads them.

    Attributes:
        matrix: One row per text, [texts, layers * width].
        n_layers: Layers of ``width`` columns each.
        width: Neurons per layer, or dimensions of another site.
        prompts: Index of each text's prompt; texts of one prompt count as one observation where texts are resampled.
        measured: What was traced, by which the inputs of two runs are compared; empty for a matrix.
        model: What identifies the model; empty for a matrix.
    """

    matrix: sparse.csr_array
    n_layers: int
    width: int
    prompts: Int[np.ndarray, " texts"]
    measured: dict[str, Any]
    model: dict[str, Any]

    @property
    def layout(self) -> str:
        return f"{self.n_layers} layer{'s' * (self.n_layers != 1)} of {self.width}"


def read_input(texts: Any, config: ProbeConfig) -> ProbeInput:
    """A run, or a matrix whose rows are texts, ``[texts, columns]`` or ``[texts, layers, width]``.

    Of a run of FFN neurons these are the contributions, 0 outside a text's active set; of another site its vectors.

    Raises:
        UserError: It is neither, or its numbers are not finite.
    """
    if isinstance(texts, Traces):
        return _of_run(texts, config)
    given = texts.detach().cpu().float().numpy() if isinstance(texts, torch.Tensor) else texts
    if not sparse.issparse(given):
        try:
            given = np.asarray(given, dtype=np.float64)
        except (TypeError, ValueError):
            given = np.empty(0)
    if given.ndim not in (2, 3):
        raise UserError(
            f"probe: expected what neurosig.trace returns, or a matrix [texts, neurons], got {type(texts).__name__}"
        )
    n_layers, width = (1, given.shape[1]) if given.ndim == 2 else given.shape[1:]
    matrix = _matrix(given if sparse.issparse(given) else given.reshape(len(given), -1))
    return ProbeInput(matrix, n_layers, width, np.arange(matrix.shape[0]), {}, {})


def prompt_index(run: Traces) -> Int[np.ndarray, " texts"]:
    """Index of each text's prompt; where all have one prompt, each text is its own."""
    prompts = {text.prompt_ids for text in run.texts}
    names = [text.prompt_ids if len(prompts) > 1 else text.ids for text in run.texts]
    index = {name: place for place, name in enumerate(dict.fromkeys(names))}
    return np.array([index[name] for name in names], dtype=np.int64)


def read_labels(labels: Any, n: int, positive: Label | None) -> tuple[Int[np.ndarray, " texts"], tuple[Label, Label]]:
    """Labels as 0, 1 and -1 (none), and the two values that 0 and 1 are.

    Args:
        labels: One per text, in the texts' order: any two values; None, NaN and pandas' NA are unlabelled texts.
        n: Texts.
        positive: The value that counts as 1; default: the second in sorted order, so True, 1 or the later word.

    Raises:
        UserError: Another number of labels, fewer or more than two values, or values that are no bool, number or text.
    """
    values = _column(labels, n, "labels", "None marks an unlabelled text")
    known = [value for value in values if not _missing(value)]
    for value in known:
        if not isinstance(value, Label):
            raise UserError(f"labels: expected booleans, numbers or texts, got {value!r} ({type(value).__name__})")
    found = list(dict.fromkeys(known))
    if len(found) != 2:
        what = "no text is labelled" if not found else f"all {len(known)} are {found[0]!r}"
        if len(found) > 2:
            what = f"{len(found)} different values, {', '.join(map(repr, found[:4]))}{', ...' * (len(found) > 4)}"
        raise UserError(f"labels: {what}; give two different values, and None where a text has no label")
    try:
        low, high = sorted(found)
    except TypeError:
        raise UserError(f"labels: {found[0]!r} and {found[1]!r} are of different types; give one type") from None
    if positive is not None:
        if positive not in found:
            raise UserError(f"positive={positive!r}: the labels are {low!r} and {high!r}")
        low, high = (low, high) if high == positive else (high, low)
    return np.array([-1 if _missing(value) else int(value == high) for value in values]), (low, high)


def read_groups(groups: Any, n: int) -> Int[np.ndarray, " texts"]:
    """Index of each text's group, from any values.

    Raises:
        UserError: Another number of groups than texts, a missing one, or a single group.
    """
    values = _column(groups, n, "groups", "each text belongs to one")
    if missing := [place for place, value in enumerate(values) if _missing(value)]:
        raise UserError(f"groups: text {missing[0]} has none; give every text a group")
    index = {value: place for place, value in enumerate(dict.fromkeys(values))}
    if len(index) < 2:
        raise UserError(f"groups: all {n} texts are in group {values[0]!r}; two groups are needed to leave one out")
    return np.array([index[value] for value in values])


def annotation_free_labels(
    texts: Any, questions: Sequence[Question] | None, config: ProbeConfig
) -> Int[np.ndarray, " texts"]:
    """Labels from the agreement of each question's rollouts (`neurosig.hallucination.probe.rollout_labels`).

    Args:
        texts: A run of rollouts.
        questions: Their questions, where choices or answer spaces matter for reading answers; default: free text.
        config: ``agreement`` or ``contrast``, and the vote shares.

    Raises:
        UserError: The texts are no rollouts of questions, or a question is missing.
    """
    rows: dict[str, list[int]] = {}
    rollouts = [text.rollout for text in texts.texts] if isinstance(texts, Traces) else []
    for row, rollout in enumerate(rollouts):
        if rollout is not None and rollout.question_id:
            rows.setdefault(rollout.question_id, []).append(row)
    if not rollouts or sum(map(len, rows.values())) < len(rollouts):
        raise UserError(
            "labels: without labels a probe learns from the agreement of a question's rollouts, and these texts are "
            "no rollouts of questions; give labels, or trace what neurosig.sample returns"
        )
    known = {question.id: question for question in questions or ()}
    if questions is not None and (absent := rows.keys() - known.keys()):
        raise UserError(f'questions: question "{min(absent)}" of the rollouts is not among the {len(known)} given')
    reader, answers, winners = AnswerReader(), [], []
    for name, members in rows.items():
        prompt = texts.texts[members[0]].prompt.replace("\0", " ").strip()
        reading = reader.read(
            [one for row in members if (one := rollouts[row]) is not None],
            known.get(name) or Question(name, "text", prompt or "?"),
        )
        answers.append(reading.answers)
        winners.append(reading.vote.winner)
    labels = np.empty(len(rollouts), dtype=np.int64)
    labels[[row for members in rows.values() for row in members]] = rollout_labels(answers, winners, config)
    return labels


def check_folds(
    labels: Int[np.ndarray, " texts"],
    groups: Int[np.ndarray, " texts"],
    classes: tuple[Label, Label],
    config: ProbeConfig,
) -> None:
    """Refuse labels with which a fold, or a fold within it that chooses the penalty, would leave one class only.

    Raises:
        UserError: Saying how many groups have either class.
    """
    counts = [len(np.unique(groups[labels == label])) for label in (0, 1)]
    unit = "texts" if len(np.unique(groups)) == len(groups) else "groups"
    inner = config.inverse_penalty is None
    enough = min(counts) >= (4 if inner else 2)
    for seen, _ in fold_splits(labels, groups, config) if enough else ():
        enough = enough and len(set(labels[seen]) - {-1}) == 2
        for part, _ in fold_splits(labels[seen], groups[seen], config) if enough and inner else ():
            enough = enough and len(set(labels[seen][part]) - {-1}) == 2
    if not enough:
        raise UserError(
            f"labels: {counts[0]} {unit} have the label {classes[0]!r} and {counts[1]} the label {classes[1]!r}, of "
            f"{len(np.unique(groups))}; both are needed outside every fold"
            f"{' and outside the folds within it that choose the penalty' * inner}, so label more texts, or give "
            f"{'finer groups' if unit == 'groups' else 'a fixed inverse_penalty, such as 1'}"
        )


def other_rows(run: Any, read: ProbeInput, others: Any, config: ProbeConfig) -> sparse.csr_array:
    """The same texts at other tokens, [texts, columns].

    Raises:
        UserError: They are not the same texts, or of another layout.
    """
    other = read_input(others, config)
    if (other.matrix.shape, other.width) != (read.matrix.shape, read.width):
        raise UserError(
            f"others: {other.matrix.shape[0]} texts of {other.layout}, the run has {read.matrix.shape[0]} of "
            f"{read.layout}; trace the same texts with the same model, at other positions"
        )
    if isinstance(run, Traces) and isinstance(others, Traces):
        for row, (one, two) in enumerate(zip(run.texts, others.texts, strict=True)):
            if one.ids != two.ids:
                raise UserError(f"others: text {row} is another one than in the run; trace the same texts")
    return other.matrix


def check_like(
    read: ProbeInput, layout: tuple[int, int], measured: Mapping[str, Any], model: Mapping[str, Any]
) -> None:
    """Refuse a run that a fitted probe cannot read; say so where its positions or its model are others.

    Args:
        read: The run.
        layout: Layers and width of the one that was fitted.
        measured: `ProbeInput.measured` of the one that was fitted.
        model: `ProbeInput.model` of the one that was fitted.

    Raises:
        UserError: Other layers, another width, or something else was measured.
    """
    if (read.n_layers, read.width) != layout:
        fitted = replace(read, n_layers=layout[0], width=layout[1])
        raise UserError(
            f"probe: the run has {read.layout}, the probe was fitted on {fitted.layout}; use a model of that layout"
        )
    if not read.measured or not measured:
        return
    for name, value in measured.items():
        if name != "positions" and read.measured.get(name) != value:
            raise UserError(
                f"probe: the run was traced with {name} {read.measured.get(name)}, the probe fitted with {value}; "
                "trace it the same way"
            )
    if read.measured["positions"] != measured["positions"]:
        logger.warning(
            "probe: the run was read at positions %s, the probe fitted at %s",
            read.measured["positions"], measured["positions"],
        )  # fmt: skip
    if read.model != model:
        logger.warning("probe: it was fitted on %s and scores %s", model_name(model), model_name(read.model))


def model_name(identity: Mapping[str, Any]) -> str:
    """A model's id with the beginnings of its hashes."""
    weights, adapter = next(iter(identity["weights"].values()), ""), identity["adapter"]
    return f"{identity['id']} (weights {weights[:8]}{f', adapter {adapter[:8]}' if adapter else ''})"


def _of_run(run: Traces, config: ProbeConfig) -> ProbeInput:
    info, sites = run.model.info, run.sites
    identity = {"id": info.id, "weights": info.weights, "adapter": info.adapter}
    measured: dict[str, Any] = {"site": run.site, "positions": run.positions}
    if run.site != "ffn":
        n_layers, width = run.vectors.shape[1:]
        matrix = _matrix(run.vectors.reshape(len(run), -1).double().numpy())
        return ProbeInput(matrix, n_layers, width, prompt_index(run), measured, identity)
    options = asdict(run.config.sized(sites.n_layers, sites.d_mlp))
    measured |= {name: str(value) for name, value in options.items() if name != "batch_tokens"}
    ids, values = run.sets.neuron_ids.numpy(), run.sets.contributions.numpy()
    matrix = probe_matrix(ids, values, sites.n_layers, sites.n_layers * sites.d_mlp, config)
    return ProbeInput(_matrix(matrix), sites.n_layers, sites.d_mlp, prompt_index(run), measured, identity)


def _matrix(values: Any) -> sparse.csr_array:
    matrix = sparse.csr_array(values, dtype=np.float64)
    if not np.isfinite(matrix.data).all():
        row = int(np.searchsorted(matrix.indptr, np.flatnonzero(~np.isfinite(matrix.data))[0], side="right")) - 1
        raise UserError(f"probe: text {row} has a contribution that is not finite; leave the text out")
    return matrix


def _column(values: Any, n: int, name: str, hint: str) -> list[Any]:
    """One plain Python value per text."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().tolist()
    if isinstance(values, str | bytes) or not hasattr(values, "__len__") or isinstance(values, dict):
        raise UserError(f"{name}: expected one value per text, {n} in all, got {type(values).__name__}; {hint}")
    column = np.asarray(pd.Series(list(values), dtype=object), dtype=object)
    if len(column) != n:
        raise UserError(f"{name}: {len(column)} for {n} texts; give one per text, in their order; {hint}")
    return [value.item() if isinstance(value, np.generic) else value for value in column]


def _missing(value: Any) -> bool:
    return value is None or value is pd.NA or value is pd.NaT or (isinstance(value, float) and value != value)
