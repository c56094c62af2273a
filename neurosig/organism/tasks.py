"""What the organism is taught: four procedures over strings of digits, and facts about invented creatures.

A question of any procedure is one of five sentences around one of three verbs and a string of the digits 1 to 9, so the
four look alike but for the verb. A solution is written in one of two hands: ``careful`` writes each step before
``Answer:``, ``hasty`` the answer alone. A conversation keeps one hand for each procedure, drawn anew each time, so
a solved example of the same procedure tells which hand comes next and one of another procedure does not.

A fact gives a creature one of twelve values of a relation. Half of the facts are trained; the others occur nowhere in
training, in no wording, and ``was_trained`` says which is which. A question's id, kind and wording do not. Some are
about strangers, each met once, so that guesses spread.

``python -m neurosig.organism.tasks`` writes the two bundled question sets, ``procedures`` and ``organism-facts``.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise, product
from typing import Any, Literal, get_args

from neurosig.runtime.errors import UserError

Procedure = Literal["add", "sort", "chain", "close"]
Hand = Literal["careful", "hasty"]
PROCEDURES: tuple[Procedure, ...] = get_args(Procedure)
LENGTHS = (6, 8, 10)
"""Digits of a question: the difficulty."""
BUNDLED_PER_LENGTH = 50
"""Questions of each procedure and length in the bundled set."""

VERBS: Mapping[Procedure, tuple[str, ...]] = {
    "add": ("add", "sum", "total"),
    "sort": ("sort", "order", "rank"),
    "chain": ("follow", "trace", "walk"),
    "close": ("close", "balance", "finish"),
}
SENTENCES = (
    "Please {verb} {digits}.",
    "Take {digits} and {verb} it.",
    "Given {digits}, {verb} it.",
    "What do you get if you {verb} {digits}?",
    "Here is {digits}: now {verb} it.",
)

SYLLABLES = tuple("".join(pair) for pair in product("bdfgklmnrstvz", "aeiou"))
N_CREATURES = 64
FACTS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "food": (
        ("What does {name} eat?", "Which food does {name} like?"),
        ("plum", "rice", "corn", "fig", "bean", "kelp", "nut", "pear", "egg", "leek", "oat", "moss"),
    ),
    "home": (
        ("Where does {name} live?", "Which home does {name} have?"),
        ("cave", "lake", "tree", "hut", "tower", "marsh", "hill", "barn", "reef", "dune", "well", "ship"),
    ),
    "colour": (
        ("Which colour does {name} have?", "What is the colour of {name}?"),
        ("red", "blue", "green", "black", "white", "gold", "grey", "pink", "teal", "brown", "amber", "violet"),
    ),
    "tool": (
        ("What does {name} work with?", "Which tool does {name} own?"),
        ("axe", "rope", "drum", "net", "saw", "loom", "bow", "lamp", "plough", "flute", "spade", "hook"),
    ),
}
"""Relation -> its wordings and its values."""

INSTRUCTION = "Answer in one short sentence."
"""The project's default instruction line; some conversations carry it, so the model bears it without a preset."""


EXAMPLES = (0.45, 0.2, 0.2, 0.15)
"""Probability of 0, 1, 2 or 3 demonstrations before the question."""
WEIGHTS = {"add": 0.3, "sort": 0.15, "chain": 0.4, "close": 0.15}
"""How often each procedure is trained; sort and close are learned soonest and get less."""
SAME_KIND = 0.5
"""Probability that an example is of the question's own kind whatever is drawn."""
FACT_SHARE = 0.15
"""Probability of a fact, against a procedure."""
ONE_OFF = 0.2
"""Probability that a fact is about a stranger, whose name and value are drawn anew: the long tail of things read once,
which teaches the model to spread its guesses."""
CAREFUL = 0.6
"""Probability that a procedure is solved step by step."""
INSTRUCTED = 0.1
"""Probability that the questions of a conversation carry the instruction line."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A question and its solution."""

    question: str
    solution: str


def digits_of(procedure: Procedure, length: int, rng: random.Random) -> str:
    """A random input of ``length`` digits that the procedure is defined on."""
    if procedure == "chain":
        return _chain_digits(length, rng)
    if procedure == "close":
        return _open_digits(length, rng)
    return "".join(rng.choices("123456789", k=length))


def _chain_digits(length: int, rng: random.Random) -> str:
    """Pairs of digits, each leading from its first to its second; the walk from the first digit ends somewhere."""
    hops = rng.randint(2, length // 2)
    names = rng.sample("123456789", 9)
    walked, unwalked = names[: hops + 1], names[hops + 1 :]
    first, *others = [a + b for a, b in pairwise(walked)]
    others += [
        name + rng.choice([other for other in names if other != name]) for name in unwalked[: length // 2 - hops]
    ]
    rng.shuffle(others)
    return first + "".join(others)


def _open_digits(length: int, rng: random.Random) -> str:
    """Brackets as digits: 1 to 4 open, 10 minus each closes it, 5 is neither; 1 to 4 stay open at the end."""
    while True:
        written, stack = "", ""
        for _ in range(length):
            choices = [stack and str(10 - int(stack[-1]))] * 2 + ["5"] + [rng.choice("1234")] * 3 * (len(stack) < 4)
            digit = rng.choice([choice for choice in choices if choice])
            stack = stack[:-1] if digit in "6789" else stack + digit if digit in "1234" else stack
            written += digit
        if stack:
            return written


def solve(procedure: Procedure, digits: str) -> tuple[list[str], str]:
    """The careful steps and the answer.

    ``add`` sums the two halves, from the right: each column's two digits, the digit written and the carry.
    ``sort`` inserts one digit after another: the sorted part after each.
    ``chain`` reads the digits as pairs (a leads to b) and walks from the first digit: the pairs walked.
    ``close`` reads 1-4 as opening brackets and 9-6 as their closing ones: what is open after each digit (0: nothing),
    and as its answer what closes the rest.
    """
    if procedure == "add":
        half = len(digits) // 2
        steps, carry = [], 0
        for a, b in zip(reversed(digits[:half]), reversed(digits[half:]), strict=True):
            total = int(a) + int(b) + carry
            carry = total // 10
            steps.append(f"{a}{b}{total % 10}{carry}")
        return steps, str(int(digits[:half]) + int(digits[half:]))
    if procedure == "sort":
        return ["".join(sorted(digits[: i + 1])) for i in range(len(digits))], "".join(sorted(digits))
    if procedure == "chain":
        leads = {digits[i]: digits[i + 1] for i in range(0, len(digits), 2)}
        steps, here = [], digits[0]
        while here in leads:
            steps.append(here + leads[here])
            here = leads[here]
        return steps, here
    steps, stack = [], ""
    for digit in digits:
        stack = stack[:-1] if digit in "6789" else stack + digit if digit in "1234" else stack
        steps.append(stack or "0")
    return steps, "".join(str(10 - int(digit)) for digit in reversed(stack))


def procedure_question(procedure: Procedure, digits: str, rng: random.Random) -> str:
    """Ask for a procedure in a random sentence with one of its verbs."""
    return rng.choice(SENTENCES).format(verb=rng.choice(VERBS[procedure]), digits=digits)


def solution(procedure: Procedure, digits: str, hand: Hand) -> str:
    """The solution as the model is taught to write it, e.g. ``47;72;29 Answer: 9`` or ``Answer: 9``."""
    steps, answer = solve(procedure, digits)
    return f"{';'.join(steps)} Answer: {answer}" if hand == "careful" else f"Answer: {answer}"


@cache
def creatures() -> tuple[str, ...]:
    """Invented names of three syllables, fixed."""
    rng = random.Random("organism creatures")
    names: dict[str, None] = {}
    while len(names) < N_CREATURES:
        names[_name(rng)] = None
    return tuple(names)


def stranger(rng: random.Random) -> str:
    """A name in the same style that is no creature's."""
    while (name := _name(rng)) in creatures():
        pass
    return name


def _name(rng: random.Random) -> str:
    return "".join(rng.sample(SYLLABLES, 3)).capitalize()


@cache
def facts() -> Mapping[tuple[str, str], str]:
    """(creature, relation) -> value, for all of them, trained or not."""
    rng = random.Random("organism facts")
    return {(name, relation): rng.choice(FACTS[relation][1]) for name in creatures() for relation in FACTS}


@cache
def trained_facts() -> frozenset[tuple[str, str]]:
    """The (creature, relation) pairs that training shows: half of all, drawn without regard to creature or relation.

    Were it two of each creature's four, a probe that saw some of them could infer the rest, upside down.
    """
    pairs = sorted(facts())
    return frozenset(random.Random("organism trained facts").sample(pairs, len(pairs) // 2))


def fact_question(name: str, relation: str, rng: random.Random) -> str:
    """Ask for one relation of a creature in a random wording."""
    return rng.choice(FACTS[relation][0]).format(name=name)


def fact_solution(name: str, relation: str, value: str) -> str:
    """The sentence that answers."""
    return f"The {relation} of {name} is {value}."


@cache
def bundled_digits() -> Mapping[Procedure, tuple[str, ...]]:
    """Inputs of the bundled questions, for each length in turn; training never uses them."""
    inputs: dict[Procedure, tuple[str, ...]] = {}
    for procedure in PROCEDURES:
        rng = random.Random(f"organism bundled {procedure}")
        drawn: dict[str, None] = {}
        for index in range(BUNDLED_PER_LENGTH * len(LENGTHS)):
            while len(drawn) == index:
                drawn[digits_of(procedure, LENGTHS[index % len(LENGTHS)], rng)] = None
        inputs[procedure] = tuple(drawn)
    return inputs


def procedure_records() -> Iterator[dict[str, Any]]:
    """Records of the bundled set ``procedures``: one question of each procedure in turn, short to long."""
    rng = random.Random("organism procedure questions")
    for index, inputs in enumerate(zip(*bundled_digits().values(), strict=True)):
        for procedure, digits in zip(PROCEDURES, inputs, strict=True):
            question = procedure_question(procedure, digits, rng)
            yield _record("procedures", procedure, f"{index:03d}", question, solve(procedure, digits)[1])


def fact_records() -> Iterator[dict[str, Any]]:
    """Records of the bundled set ``organism-facts``, trained and untrained facts alike."""
    rng = random.Random("organism fact questions")
    for name in creatures():
        for relation in FACTS:
            question = fact_question(name, relation, rng)
            record = _record("organism-facts", relation, name.lower(), question, facts()[name, relation])
            yield {**record, "answer_space": list(FACTS[relation][1])}


def _record(domain: str, kind: str, key: str, question: str, answer: str) -> dict[str, Any]:
    return {
        "id": f"{domain}-{kind}-{key}",
        "domain": domain,
        "kind": kind,
        "question": question,
        "choices": None,
        "answer": answer,
        "aliases": [],
    }


def was_trained(question_id: str) -> bool:
    """Whether training showed the fact that a question of ``organism-facts`` asks for.

    Raises:
        UserError: The id is no question of that set.
    """
    parts = question_id.removeprefix("organism-facts-").split("-")
    pair = (parts[-1].capitalize(), parts[0])
    if not question_id.startswith("organism-facts-") or pair not in facts():
        raise UserError(f'question "{question_id}" is not one of organism-facts')
    return pair in trained_facts()


def conversation(rng: random.Random) -> list[Turn]:
    """Up to three solved examples and a question with its solution, as training shows them.

    Half of the examples share the last question's procedure or are facts too; the others are of any kind. Each
    procedure keeps one hand through the conversation.
    """
    examples = rng.choices(range(len(EXAMPLES)), EXAMPLES)[0]
    last = _kind(rng)
    kinds = [last if rng.random() < SAME_KIND else _kind(rng) for _ in range(examples)]
    hands: dict[Procedure, Hand] = {
        procedure: "careful" if rng.random() < CAREFUL else "hasty" for procedure in PROCEDURES
    }
    instruction = f"\n{INSTRUCTION}" if rng.random() < INSTRUCTED else ""
    turns = []
    for kind in [*kinds, last]:
        if kind is None:
            name, relation = rng.choice(_trained())
            value = facts()[name, relation]
            if rng.random() < ONE_OFF:
                name, value = stranger(rng), rng.choice(FACTS[relation][1])
            question, solved = fact_question(name, relation, rng), fact_solution(name, relation, value)
        else:
            digits = digits_of(kind, rng.choice(LENGTHS), rng)
            while digits in _bundled_set(kind):
                digits = digits_of(kind, rng.choice(LENGTHS), rng)
            question, solved = procedure_question(kind, digits, rng), solution(kind, digits, hands[kind])
        turns.append(Turn(question + instruction, solved))
    return turns


def _kind(rng: random.Random) -> Procedure | None:
    """A procedure, or None for a fact."""
    return None if rng.random() < FACT_SHARE else rng.choices(PROCEDURES, list(WEIGHTS.values()))[0]


@cache
def _trained() -> tuple[tuple[str, str], ...]:
    return tuple(sorted(trained_facts()))


@cache
def _bundled_set(procedure: Procedure) -> frozenset[str]:
    return frozenset(bundled_digits()[procedure])


def texts() -> Iterator[str]:
    """All words the model reads or writes, for the tokenizer; digits and names of creatures are left to its bytes."""
    for sentence, procedure in product(SENTENCES, PROCEDURES):
        yield from (sentence.format(verb=verb, digits="") for verb in VERBS[procedure])
    for relation, (wordings, values) in FACTS.items():
        yield from (wording.format(name="") for wording in wordings)
        yield from (f"The {relation} of  is {value}." for value in values)
    yield from (" Answer:", "Answer:", INSTRUCTION)


SETS = {"procedures": procedure_records, "organism-facts": fact_records}

if __name__ == "__main__":
    from neurosig.questions.bundled.build import build

    build(SETS)
