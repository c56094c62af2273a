"""What the probe's folds keep together: a question, or all questions with the same value in a column.

Folds by question answer "does the probe tell guessed from known among questions like those that it saw?"; folds by
kind, "does it do so for a kind of question that it never saw?".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from neurosig.manifest import QuestionRow
from neurosig.questions.load import Question
from neurosig.runtime.errors import UserError

COLUMNS = ("question", "kind", "domain", "choices", "text_sha256")


def fold_groups(
    questions: Sequence[Question | QuestionRow], column: str, *, option: str = "--probe-groups"
) -> Mapping[str, str] | None:
    """The group of each question by its id; ``None`` where every question is a group of its own.

    Args:
        questions: Questions, or rows of a manifest.
        column: ``question``, or a field that both have. A question without a kind counts under its domain.
        option: What names the column, for messages.

    Raises:
        UserError: There is no such column, or all questions have the same value in it.
    """
    if column not in COLUMNS:
        raise UserError(f"{option} {column}: no such column of the questions; have {', '.join(COLUMNS)}")
    if column == "question":
        return None
    groups = {
        question.question_id if isinstance(question, QuestionRow) else question.id: (
            question.kind or question.domain if column == "kind" else str(getattr(question, column))
        )
        for question in questions
    }
    values = set(groups.values())
    if len(values) < 2:
        raise UserError(
            f'{option} {column}: all {len(groups)} questions have the same {column}, "{min(values)}", so no fold '
            "can leave one out; use another column, or question"
        )
    return groups
