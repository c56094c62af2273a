"""The questions of a run, dealt to its processes and joined in one log.

Each process samples its share into a log of its own next to the main one, so that a killed run loses none of them;
the main process joins the logs. What a question's rollouts are does not depend on who samples them: every process cuts
all questions into the same batches and decodes those that hold a question of its share.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neurosig.runtime.ranks import Ranks
from neurosig.sampling.rollouts import Rollout, RolloutLog

if TYPE_CHECKING:
    from neurosig.runtime.cli import PhaseTimer
    from neurosig.sampling.sampler import Prompt


def sampled_together(
    ranks: Ranks,
    path: Path,
    key: Mapping[str, Any],
    prompts: Sequence[Prompt],
    block: int | None,
    draw: Callable[[Collection[str]], Iterator[list[Rollout]]],
    *,
    desc: str,
    quiet: bool = False,
    timer: PhaseTimer | None = None,
) -> dict[str, list[Rollout]]:
    """Sample the questions that the logs of an interrupted run lack; returns all rollouts by question, on every rank.

    Args:
        ranks: The processes, all of which must call this.
        path: The main log; that of rank r is ``PATH.r``, which an earlier run with more processes may have left.
        key: See `RolloutLog`.
        prompts: One prompt per question.
        block: Questions that one process takes at once; see `deal`. None: the main process takes all.
        draw: Called with the ids of the questions to leave out, yields the rollouts of the others.
        desc: Label of the progress bar, which shows the main process's share.
        quiet: Show no bar.
        timer: Counts the sampled tokens of all processes in its phase ``sample``.

    Raises:
        UserError: See `RolloutLog`, and what ``draw`` raises, on one rank; the others exit.
    """

    logs: list[RolloutLog] = []

    def join() -> dict[str, list[Rollout]]:
        if not logs:
            logs.append(RolloutLog(path, key))
        for part in sorted(path.parent.glob(f"{path.name}.*")):
            for name, group in RolloutLog(part, key).groups.items():
                if name not in logs[0].groups:
                    logs[0].append(group)
            part.unlink()
        return logs[0].groups

    done = ranks.on_main(lambda: set(join()))
    share = deal(prompts, block or len(prompts), done, ranks)
    with ranks.together():
        if share:
            log = logs[0] if ranks.main else RolloutLog(path.with_name(f"{path.name}.{ranks.rank}"), key)
            left_out = {prompt.question_id for prompt in prompts} - share
            log.extend(draw(left_out), total=len(log.groups) + len(share), desc=desc, quiet=quiet or not ranks.main)
    groups = ranks.on_main(join)
    if timer is not None:
        drawn = [group for name, group in groups.items() if name not in done]
        timer.add_tokens("sample", sum(len(rollout.completion_ids) for group in drawn for rollout in group))
    return groups


def deal(prompts: Sequence[Prompt], block: int, done: Collection[str], ranks: Ranks) -> set[str]:
    """Ids of the unfinished questions that this rank samples.

    The blocks go round, each second time backwards: they come by length, so that all ranks get short and long ones.

    Args:
        prompts: One prompt per question.
        block: Questions per block, in the order of the prompts' lengths. A block that is a window of the sampler
            (`neurosig.sampling.sampler.WINDOW`) is decoded by one process alone.
        done: Ids of finished questions.
        ranks: The processes.
    """
    ordered = [prompt.question_id for prompt in sorted(prompts, key=lambda prompt: len(prompt.token_ids))]
    blocks = [ordered[start : start + block] for start in range(0, len(ordered), block)]
    todo = [names for names in blocks if not all(name in done for name in names)]
    rounds = [todo[start : start + ranks.world] for start in range(0, len(todo), ranks.world)]
    own: set[str] = set()
    for number, dealt in enumerate(rounds):
        place = ranks.rank if number % 2 == 0 else ranks.world - 1 - ranks.rank
        own.update(*dealt[place : place + 1])
    return own - set(done)
