"""Compare what vLLM gave with the model here; vllm.sh calls it with its output folder, address and versions."""

import json
import re
import sys
from pathlib import Path

import torch

from distill.evaluate import read_sampled
from neurosig import load_model, load_questions
from neurosig.manifest import read_manifest
from neurosig.models.adapter import apply_adapter
from neurosig.models.load import LoadedModel
from neurosig.questions.prompts import PromptBuilder, PromptConfig
from neurosig.questions.reader import AnswerReader
from neurosig.sampling.config import SamplingConfig
from neurosig.sampling.http import ServerConfig
from neurosig.sampling.rollouts import Rollout
from neurosig.sampling.sampler import Prompt, sample
from neurosig.sampling.server import Server, next_token_logits

TOLERANCE = 1e-4
"""Nats per token."""

out, base_url, versions = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
failed: list[str] = []


def check(holds: bool, line: str) -> None:
    print("ok  " if holds else "FAIL", line)
    failed.extend([] if holds else [line])


def largest_difference(loaded: LoadedModel, rollouts: list[Rollout], ids_of: dict[str, tuple[int, ...]]) -> float:
    """Between the server's mean log-probability of a rollout and the model's, in nats per token."""
    differences = []
    for rollout in rollouts:
        logits = next_token_logits(loaded, ids_of[rollout.question_id], rollout.completion_ids)
        own = torch.log_softmax(logits, dim=-1).gather(1, torch.tensor(rollout.completion_ids)[:, None]).mean()
        differences.append(abs(float(own) - (rollout.mean_logprob or 0.0)))
    return max(differences)


def winners(seed: int) -> dict[str, str | None]:
    """The majority answers of rollouts that are sampled here."""
    groups = sample(base, prompts, SamplingConfig(seed=seed))
    return {
        group[0].question_id: AnswerReader().read(group, by_id[group[0].question_id]).vote.winner for group in groups
    }


def alike(one: dict[str, str | None], other: dict[str, str | None]) -> tuple[int, int]:
    both = [name for name in one if one[name] is not None and other[name] is not None]
    return sum(one[name] == other[name] for name in both), len(both)


print(" ".join(versions.split()))
base, adapted = load_model("smollm2-135m"), load_model("smollm2-135m")
apply_adapter(adapted, out / "trained" / "adapter")
builder = PromptBuilder(base.tokenizer, PromptConfig())
by_id = {question.id: question for question in load_questions("world-facts", split="train", limit=32)}
prompts = [Prompt(name, builder.student(question)) for name, question in by_id.items()]
ids_of = {prompt.question_id: prompt.token_ids for prompt in prompts}

rollouts = list(read_manifest(out / "served").rollouts.values())
gap = largest_difference(base, rollouts, ids_of)
check(gap < TOLERANCE, f"export: {len(rollouts)} rollouts, largest difference {gap:.1e} nats per token")
agreed = [float(x) for x in re.findall(r"agree with the model here \((\S+) nats", (out / "train.log").read_text())]
steps = [json.loads(line) for line in (out / "trained" / "metrics.jsonl").read_text().splitlines()]
behind = [(step["policy_step"], step["staleness"]) for step in steps]
check(behind == [(0, 0), (1, 0), (2, 0)], f"training: (policy_step, staleness) of each step {behind}")
check(len(agreed) == 3 and max(agreed) < TOLERANCE, f"training: student and served adapter differ by {agreed} nats")

server = Server(ServerConfig(base_url, "trained", seeds=False), adapted)
greedy = SamplingConfig(num_generations=1, temperature=0.0, max_new_tokens=24)
served = {group[0].question_id: group[0] for group in server.sample(prompts, greedy)}
to_adapted, to_base = (largest_difference(model, list(served.values()), ids_of) for model in (adapted, base))
check(to_adapted < TOLERANCE < to_base / 10, f"adapter: {to_adapted:.1e} from the student, {to_base:.1e} from the base")
own = {group[0].question_id: group[0] for group in sample(adapted, prompts, greedy)}
equal = sum(served[name].completion_ids == own[name].completion_ids for name in own)
check(equal >= 0.95 * len(own), f"greedy: {equal} of {len(own)} completions token for token the same")

by_server = {row.question_id: row.pseudo_label for row in read_manifest(out / "served").rows}
here, again = winners(0), winners(1)
(same, n), (usual, m) = alike(by_server, here), alike(again, here)
check(
    same / n >= usual / m - 0.2, f"votes: {same} of {n} as sampled here; {usual} of {m} between two seeds sampled here"
)
scores = [
    next(iter(read_sampled(out / name)[0]["domains"].values()))["avg_at_k"] for name in ("eval_served", "eval_local")
]
gap = abs(scores[0]["estimate"] - scores[1]["estimate"])
check(gap < 0.1, f"evaluation: Avg@8 {scores[0]['estimate']:.3f} by the server, {scores[1]['estimate']:.3f} here")
sys.exit(bool(failed))
