"""Check that neurosig reads a model's neurons correctly before building on them.

    python -m neurosig.check --model smollm2-135m
    python -m neurosig.check --model path/to/model --questions world-facts:dev

Locates the FFN neurons, samples answers to a few prompts, and reads the contributions behind them in several ways: with
nnsight one rollout at a time and in padded batches that share prompts, with plain PyTorch hooks, and with
TransformerLens. Prints how far these differ, and whether the model's outputs are the same afterwards.

Exit codes: 0 all within tolerance; 1 some are not (the last line names them); 2 the model cannot be read.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neurosig.neurons.config import TraceConfig, check_set_size
from neurosig.runtime.cli import CommonConfig, progress, run_command
from neurosig.runtime.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from neurosig.models.load import LoadedModel
    from neurosig.neurons.backends import Backend
    from neurosig.neurons.parity import Agreement
    from neurosig.neurons.sites import FFNSites
    from neurosig.sampling.sampler import Prompt

SENTENCES = ("The capital of France is", "Water boils at a temperature of", "Once upon a time there was", "1, 2, 3, 4,")
TOLERANCE = {"float64": 1e-3, "float32": 1e-3, "float16": 0.05, "bfloat16": 0.3}
"""Largest relative difference of a contribution that rounding explains, by dtype. Measured on the embedded model: 1e-5,
0.01 and 0.15; reading a position off by one gives 0.9 or more."""


@dataclass(kw_only=True)
class CheckConfig(CommonConfig):
    """Print where a model's FFN neurons are, and how closely nnsight, plain hooks and TransformerLens agree on them.

    Ends with exit code 0 when they agree, 1 when they do not, 2 when the model cannot be read.
    """

    model: str
    """Hub id, folder, GGUF file, or smollm2-135m (embedded)."""
    adapter: Path | None = None
    """Check a trained model: folder of a distill.train run, its adapter/ or one of its checkpoints/step-N."""
    questions: tuple[str, ...] = ()
    """Bundled set (such as world-facts:dev) or file of questions; default: four sentences to continue."""
    fields: tuple[str, ...] = ()
    """FIELD=COLUMN for columns of --questions with other names, as in neurosig.export."""
    limit: int = 4
    """Use only the first N questions or sentences."""
    num_generations: int = 2
    """Rollouts per prompt; they share it in the batched trace."""
    max_new_tokens: int = 16
    """Most completion tokens per rollout."""
    set_size: int | float = TraceConfig().set_size
    """Neurons per active set, spread evenly over the layers: a number, or below 1 a share of the model's neurons."""
    tolerance: float | None = None
    """Largest relative difference of a contribution; default: 0.001 in float32, 0.05 in float16, 0.3 in bfloat16.
    Rounding stays below it; reading a position off by one is far above."""
    template: str | None = None
    """'plain' or a Jinja file to use instead of the tokenizer's chat template; --questions needs one."""
    dtype: str = "auto"
    """Parameter dtype; auto: float32 on CPU, bfloat16 on an accelerator."""
    device: str | None = None
    """torch device; default: the first accelerator, else the CPU."""
    seed: int = 0
    """Seed of the sampled rollouts."""


def main(config: CheckConfig) -> None:
    """Run the check described by ``config``.

    Raises:
        SystemExit: With exit code 1: a difference is above the tolerance.
    """
    from neurosig.models.load import load_model
    from neurosig.neurons.contributions import neurons_per_layer
    from neurosig.neurons.sites import ffn_sites
    from neurosig.runtime.extras import check_installed

    check_installed("neurosig.check", "nnsight")
    for flag, value in (("--limit", config.limit), ("--set-size", config.set_size)):
        if value <= 0:
            raise UserError(f"{flag} {value}: give at least 1")
    check_set_size("--set-size", config.set_size)
    where: Any = {"dtype": config.dtype, "device": config.device, "template": config.template}
    loaded = load_model(config.model, **where, adapter=config.adapter)
    sites = ffn_sites(loaded.model)
    tolerance = TOLERANCE[loaded.info.dtype] if config.tolerance is None else config.tolerance
    prompts, completions = _rollouts(config, loaded)
    print(_description(loaded, sites))
    print(
        f"rollouts       {len(prompts)}, {sum(map(len, prompts))} prompt and {sum(map(len, completions))} completion "
        f"tokens, seed {config.seed}\n"
    )

    agreements, unchanged, reason = compare(loaded, prompts, completions, config.set_size, quiet=config.quiet)
    print(
        _table(agreements, tolerance, sites.n_layers * neurons_per_layer(sites.n_layers, sites.d_mlp, config.set_size))
    )
    print(f"{'logits after = before':<31}{'the same to the bit' if unchanged else 'they differ'}")
    if reason:
        print(f"\nTransformerLens was not compared: {reason}")
    failed = [name for name, one in agreements.items() if one is not None and not one.max_rel <= tolerance]
    failed += [] if unchanged else ["logits after = before"]
    if failed:
        print(f"\nfailed: {', '.join(failed)}")
        raise SystemExit(1)
    print(f"\nall within tolerance ({tolerance:g} of a contribution in {loaded.info.dtype})")


def compare(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    set_size: int | float,
    *,
    quiet: bool = True,
) -> tuple[dict[str, Agreement | None], bool, str]:
    """Read the rollouts' contributions in four ways.

    Returns:
        How far they agree, by what is compared (None: TransformerLens cannot read the model); whether the model's
        logits are the same to the bit afterwards; and why TransformerLens was not compared, if it was not.
    """
    from neurosig.neurons.contributions import neurons_per_layer
    from neurosig.neurons.parity import agreement, hooked_means
    from neurosig.neurons.sites import ffn_sites

    sites, lens, reason = ffn_sites(loaded.model), None, ""
    with progress(total=4, desc="read", quiet=quiet) as bar:
        before = _logits(loaded, prompts[0])
        hooks = hooked_means(loaded.model, sites, prompts, completions)
        bar.update()
        single = _traced(loaded, "nnsight", prompts, completions, batch_tokens=1)
        bar.update()
        batched = _traced(loaded, "nnsight", prompts, completions, batch_tokens=4096)
        unchanged = bool((_logits(loaded, prompts[0]) == before).all())
        bar.update()
        try:
            lens = _traced(loaded, "transformer_lens", prompts, completions, batch_tokens=4096)
        except UserError as error:
            reason = str(error)
        bar.update()
    share = neurons_per_layer(sites.n_layers, sites.d_mlp, set_size)
    pairs = {
        "nnsight = plain hooks": (single, hooks),
        "padded batch = alone": (batched, single),
        "TransformerLens = plain hooks": (lens, hooks),
    }
    agreements = {
        name: None if traced is None else agreement(traced, reference, share)
        for name, (traced, reference) in pairs.items()
    }
    return agreements, unchanged, reason


def _rollouts(config: CheckConfig, loaded: LoadedModel) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and the model's completions, as token ids."""
    from neurosig.sampling.config import SamplingConfig
    from neurosig.sampling.sampler import Prompt, sample

    sampling = SamplingConfig(
        num_generations=config.num_generations,
        temperature=1.0,
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
    )
    if config.questions:
        prompts = _question_prompts(config, loaded)
    else:
        encoded = (loaded.tokenizer(sentence)["input_ids"] for sentence in SENTENCES[: config.limit])
        prompts = [Prompt(str(number), tuple(ids)) for number, ids in enumerate(encoded)]
    ids = {prompt.question_id: prompt.token_ids for prompt in prompts}
    rollouts = [rollout for group in sample(loaded, prompts, sampling) for rollout in group]
    return [list(ids[rollout.question_id]) for rollout in rollouts], [
        list(rollout.completion_ids) for rollout in rollouts
    ]


def _question_prompts(config: CheckConfig, loaded: LoadedModel) -> list[Prompt]:
    from neurosig.questions.load import load_questions
    from neurosig.questions.prompts import PromptBuilder, PromptConfig
    from neurosig.sampling.sampler import Prompt

    builder = PromptBuilder(loaded.tokenizer, PromptConfig())
    questions = load_questions(config.questions, limit=config.limit, fields=config.fields)
    return [Prompt(question.id, builder.student(question)) for question in questions]


def _traced(
    loaded: LoadedModel,
    backend: Backend,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    batch_tokens: int,
) -> Tensor:
    """Every neuron's mean contribution: [n, n_layers, d_mlp]."""
    from neurosig.neurons.backends import tracer_class

    every = loaded.model.num_parameters()  # more than there are neurons
    tracer = tracer_class(backend)(loaded.model, TraceConfig(set_size=every, batch_tokens=batch_tokens))
    means = tracer.trace(prompts, completions).contributions
    return means.unflatten(1, (tracer.sites.n_layers, tracer.sites.d_mlp))


def _logits(loaded: LoadedModel, ids: Sequence[int]) -> Tensor:
    import torch

    with torch.no_grad():
        logits: Tensor = loaded.model(torch.tensor([ids], device=loaded.model.device)).logits
    return logits


def _description(loaded: LoadedModel, sites: FFNSites) -> str:
    model, info = loaded.model, loaded.info
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    tied = "tied to the embedding" if head is embedding else "not tied to the embedding"
    wide = head.shape[1] == sites.d_model
    rows = {
        "model": f"{info.id}: {type(model).__name__} ({model.config.model_type}), {info.dtype}, "
        f"{info.attn_implementation} attention" + (f", adapter {info.adapter[:12]}" if info.adapter else ""),
        "layers": f"{sites.n_layers}, {sites.blocks[0]} to {sites.blocks[-1]}",
        "d_mlp": f"{sites.d_mlp} neurons per layer, {sites.n_layers * sites.d_mlp:,} in all",
        "d_model": f"{sites.d_model}",
        "gated": "yes, a value is act(gate) * up" if sites.gated else "no, a value is act(x)",
        "values": f"input of {sites.layers[0]} and so on",
        "activations": f"output of {sites.acts[0]} and so on",
        "head": f"{sites.head}, {tied}; the score unembed "
        + ("works" if wide else f"does not: it reads {head.shape[1]} dimensions"),
    }
    return "\n".join(f"{name:<15}{text}" for name, text in rows.items())


def _table(agreements: dict[str, Agreement | None], tolerance: float, size: int) -> str:
    lines = [f"{'':<31}{'max abs':>9}{'max rel':>9}  {'same sets':>9}  {'overlap':>7}   sets of {size} neurons"]
    for name, one in agreements.items():
        if one is None:
            lines.append(f"{name:<31}not compared")
            continue
        verdict = "ok" if one.max_rel <= tolerance else f"above {tolerance:g}"
        lines.append(
            f"{name:<31}{one.max_abs:>9.1e}{one.max_rel:>9.1e}  {one.same_sets:>9.0%}  {one.overlap:>7.4f}   {verdict}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_command(CheckConfig, main, presets={}, prog="python -m neurosig.check"))
