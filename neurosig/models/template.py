"""The chat template that ``--template`` names instead of the tokenizer's."""

from __future__ import annotations

from pathlib import Path

from neurosig.runtime.errors import UserError

PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ {'system': '', 'user': 'Question: ', 'assistant': 'Answer: '}[m['role']] + m['content'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{{ '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Answer:' }}{% endif %}"
)
"""Chat template of ``--template plain``, for base models without one; a tokenizer's BOS comes first, if it has one."""


def read_template(template: str) -> str:
    """The text of ``plain`` or of a Jinja file.

    Raises:
        UserError: The file cannot be read.
    """
    if template == "plain":
        return PLAIN_TEMPLATE
    try:
        return Path(template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--template {template}: give `plain` or a readable Jinja file ({error})") from error
