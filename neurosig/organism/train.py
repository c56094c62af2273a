"""Train the model organism from scratch: a Qwen3 of 2 million parameters, in about half an hour on one CPU core.

    OMP_NUM_THREADS=1 python -m neurosig.organism.train --out runs/organism

Conversations of ``tasks`` with the loss on every solution; afterwards the bundled questions are sampled and the folder
(weights, tokenizer, ``training.json`` and ``README.md``) is written atomically. ``--model FOLDER`` loads it;
the packaged one, ``--model organism``, is in ``neurosig/organism/data``.
"""

from __future__ import annotations

import json
import logging
import math
import os
import random
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from neurosig.runtime.cli import CommonConfig, config_record, progress, run_command
from neurosig.runtime.errors import UserError
from neurosig.runtime.shapes import AtLeast, check_bounds

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from neurosig.organism.tasks import Turn

logger = logging.getLogger(__name__)

PAD, SYSTEM, USER, ASSISTANT, END = "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message.role + '|>' + message.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CONTEXT = 1024
"""Positions of the model; a question and three long examples take about 450."""
POOL = 1024
"""Conversations drawn at a time and sorted by length, so that a batch pads little."""
RECORD, CARD = "training.json", "README.md"
CARD_TEXT = """\
# Model organism

A Qwen3 of {parameters:,} parameters, trained from scratch by `python -m neurosig.organism.train` on generated text
alone (`neurosig/organism/tasks.py`): four procedures over strings of digits, solved either step by step or at once,
and invented facts of which half occur nowhere in training.

{steps} steps, {tokens:,} tokens, seed {seed}, {cpu_seconds:.0f} CPU seconds on {threads} thread(s). Loss {first:.3f} ->
{last:.3f} nats per token, the means of the first and the last twentieth of the steps. Licence: Apache-2.0.

Bundled questions (no input of the procedures and no made-up fact occurs in training), K=8 samples at T=0.8, seed 0:

| group | n | Avg@8 | majority's share | solved step by step |
|---|---|---|---|---|
{rows}
"""


@dataclass(kw_only=True)
class OrganismConfig(CommonConfig):
    """Train the model organism and measure it on the bundled questions."""

    out: Path
    """Folder of the model; must not exist."""
    steps: Annotated[int, AtLeast(1)] = 900
    """Optimizer steps."""
    tokens_per_step: Annotated[int, AtLeast(1)] = 2048
    """Tokens of a batch, padding included."""
    learning_rate: float = 4e-3
    """Peak learning rate of Muon (the layers' matrices) and AdamW (the embedding and the gains)."""
    warmup_steps: int = 50
    """Steps of linear warm-up; then a cosine down to a twentieth."""
    weight_decay: float = 0.01
    """Weight decay of the layers' matrices."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    d_model: int = 192
    """Width."""
    d_mlp: int = 576
    """FFN neurons per layer."""
    n_layers: Annotated[int, AtLeast(1)] = 5
    """Layers."""
    seed: int = 0
    """Seed of the weights and of the conversations."""
    threads: Annotated[int, AtLeast(1)] = 1
    """torch threads; another number gives other last bits."""
    bfloat16: bool = True
    """Run the forward pass under bfloat16 autocast."""
    eval_limit: int | None = None
    """Measure on the first N questions of each bundled set only."""


def main(config: OrganismConfig) -> None:
    """Run the training described by ``config``."""
    import torch

    if config.out.exists():
        raise UserError(f"--out {config.out}: exists already; give another folder")
    check_bounds(config)
    if config.d_model < 64 or config.d_model % 64:
        raise UserError(f"--d-model: expected a multiple of 64 (two key-value heads of 32), got {config.d_model}")
    torch.set_num_threads(config.threads)
    start = time.process_time()
    tokenizer = build_tokenizer()
    model = build_model(config, tokenizer)
    losses, tokens = fit(config, model, tokenizer)
    trained = time.process_time() - start
    model.bfloat16().float()  # what is measured is what is saved
    record = {
        "config": {name: value for name, value in config_record(config).items() if name != "out"},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens": tokens,
        "cpu_seconds": round(trained, 1),
        "loss": losses,
        "accuracy": measure(model, tokenizer, limit=config.eval_limit),
    }
    save(config.out, model, tokenizer, record)
    logger.info("%s: %d steps, %.0f CPU seconds, loss %.4f", config.out, config.steps, trained, losses[-1])


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: any text round-trips; whole words for the tasks' words, one token a digit."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from neurosig.organism.tasks import texts

    special = [PAD, SYSTEM, USER, ASSISTANT, END]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        min_frequency=1,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        model_max_length=CONTEXT,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def build_model(config: OrganismConfig, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A Qwen3 with random weights: grouped-query attention, tied embeddings."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(config.seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=config.d_model,
            intermediate_size=config.d_mlp,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.d_model // 32,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=CONTEXT,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def encode(tokenizer: PreTrainedTokenizerFast, turns: Sequence[Turn]) -> tuple[list[int], list[int]]:
    """Token ids of a conversation as the chat template writes it, and its labels: -100 but for the solutions."""
    special: Any = tokenizer.convert_tokens_to_ids([USER, ASSISTANT, END])
    user, assistant, end = special
    texts = [text for turn in turns for text in (turn.question, turn.solution)]
    pieces: Any = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])
    ids: list[int] = []
    labels: list[int] = []
    for question, solution in zip(pieces, pieces, strict=True):
        prompt = [user, *question, end, assistant]
        ids += [*prompt, *solution, end]
        labels += [*[-100] * len(prompt), *solution, end]
    return ids, labels


def batches(
    tokenizer: PreTrainedTokenizerFast, tokens: int, seed: int
) -> Iterator[tuple[Int[Tensor, "rows seq"], Int[Tensor, "rows seq"]]]:
    """Endless batches of ids and labels, padded on the right to at most ``tokens`` each; fixed by the seed."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    from neurosig.organism.tasks import conversation

    rng = random.Random(f"organism training {seed}")
    while True:
        pool = sorted((encode(tokenizer, conversation(rng)) for _ in range(POOL)), key=lambda row: len(row[0]))
        groups: list[list[tuple[list[int], list[int]]]] = [[]]
        for row in pool:
            if groups[-1] and (len(groups[-1]) + 1) * len(row[0]) > tokens:
                groups.append([])
            groups[-1].append(row)
        rng.shuffle(groups)
        for group in groups:
            ids, labels = ([torch.tensor(part) for part in parts] for parts in zip(*group, strict=True))
            yield pad_sequence(ids, batch_first=True), pad_sequence(labels, batch_first=True, padding_value=-100)


def fit(config: OrganismConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> tuple[list[float], int]:
    """Train in place; returns the mean loss of each twentieth of the steps (nats per token) and the tokens read."""
    import torch
    from torch.nn.functional import cross_entropy

    embedding: Any = model.get_input_embeddings().weight
    matrices = [p for p in model.parameters() if p.ndim > 1 and p is not embedding]
    others = [embedding, *(p for p in model.parameters() if p.ndim <= 1)]
    muon = torch.optim.Muon(matrices, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    stream = batches(tokenizer, config.tokens_per_step, config.seed)
    losses, tokens = [], 0
    model.train()
    with progress(total=config.steps, desc="train", quiet=config.quiet) as bar:
        for step in range(config.steps):
            for group in (*muon.param_groups, *adamw.param_groups):
                group["lr"] = config.learning_rate * rate(step, config)
            ids, labels = next(stream)
            tokens += ids.numel()
            with torch.autocast("cpu", torch.bfloat16, enabled=config.bfloat16):
                hidden = model.base_model(input_ids=ids).last_hidden_state[:, :-1]  # causal: the padding is unseen
                learned = labels[:, 1:] >= 0
                logits = model.get_output_embeddings()(hidden[learned])
            loss = cross_entropy(logits.float(), labels[:, 1:][learned])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            for optimizer in (muon, adamw):
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
            bar.update()
            if (step + 1) % 100 == 0:
                logger.debug("step %d: loss %.4f, %.0f CPU s", step + 1, sum(losses[-100:]) / 100, time.process_time())
    model.eval()
    part = math.ceil(config.steps / 20)
    return [
        round(sum(chunk) / len(chunk), 4) for i in range(0, config.steps, part) if (chunk := losses[i : i + part])
    ], tokens


def rate(step: int, config: OrganismConfig) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine down to a twentieth."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return 0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, *, limit: int | None = None
) -> dict[str, dict[str, int | float]]:
    """Accuracy on the bundled questions, 8 samples each at temperature 0.8, seed 0, by group.

    Groups are ``add-4`` (procedure and number of digits), ``trained`` and ``made-up`` (facts); each has ``n``
    questions, ``avg_at_8``, the majority's ``vote_share`` and, of procedures, the share of ``careful`` solutions.
    """
    from neurosig.models.load import load_model
    from neurosig.organism.tasks import was_trained
    from neurosig.questions.load import load_questions
    from neurosig.questions.prompts import PromptBuilder, PromptConfig
    from neurosig.questions.reader import AnswerReader
    from neurosig.sampling.config import SamplingConfig
    from neurosig.sampling.sampler import Prompt, sample

    loaded = load_model((model, tokenizer))
    builder = PromptBuilder(tokenizer, PromptConfig(instruction=""))
    questions = {q.id: q for name in ("procedures", "organism-facts") for q in load_questions(name, limit=limit)}
    prompts = [Prompt(question.id, builder.student(question)) for question in questions.values()]
    groups: dict[str, list[tuple[float, float, float]]] = {}
    reader = AnswerReader()
    for rollouts in sample(loaded, prompts, SamplingConfig(temperature=0.8, max_new_tokens=96)):
        question = questions[rollouts[0].question_id]
        reading = reader.read(rollouts, question)
        strict = reader.grade(reading, rollouts, question).strict
        right = sum(strict) / len(strict)
        careful = sum(not rollout.text.startswith("Answer") for rollout in rollouts) / len(rollouts)
        group = (
            f"{question.kind}-{sum(map(str.isdigit, question.question))}"
            if question.domain == "procedures"
            else "trained" if was_trained(question.id) else "made-up"
        )  # fmt: skip
        groups.setdefault(group, []).append((right, reading.vote.share, careful))
    table: dict[str, dict[str, int | float]] = {}
    for group, rows in sorted(groups.items()):
        right, share, careful = (round(sum(column) / len(rows), 4) for column in zip(*rows, strict=True))
        table[group] = {"n": len(rows), "avg_at_8": right, "vote_share": share}
        if "-" in group and group != "made-up":
            table[group]["careful"] = careful
    return table


def save(out: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, record: dict[str, Any]) -> None:
    """Write the model in bfloat16 with its tokenizer, record and card, atomically."""
    from neurosig.runtime.provenance import run_record

    aside = out.with_name(f".{out.name}.making")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    model.bfloat16().save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    run = run_record()
    record = {**record, "libraries": run["libraries"], "python": run["python"], "machine": run["machine"]}
    (aside / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    (aside / CARD).write_text(card(record))
    (aside / "model.safetensors").chmod(0o644)  # save_pretrained leaves it to the owner alone
    os.replace(aside, out)


def card(record: dict[str, Any]) -> str:
    """The model card, from the record of the training."""
    config = record["config"]
    rows = [
        f"| {group} | {cells['n']} | {cells['avg_at_8']:.3f} | {cells['vote_share']:.3f} | {cells.get('careful', '')} |"
        for group, cells in record["accuracy"].items()
    ]
    return CARD_TEXT.format(
        parameters=record["parameters"],
        steps=config["steps"],
        tokens=record["tokens"],
        seed=config["seed"],
        cpu_seconds=record["cpu_seconds"],
        threads=config["threads"],
        first=record["loss"][0],
        last=record["loss"][-1],
        rows="\n".join(rows),
    )


if __name__ == "__main__":
    sys.exit(run_command(OrganismConfig, main, presets={}, prog="python -m neurosig.organism.train"))
