"""The options of ``python -m distill.train``, their presets and their bounds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

from neurosig.options import SamplerOptions
from neurosig.questions.columns import parse_fields
from neurosig.runtime.errors import UserError
from neurosig.runtime.extras import check_installed
from neurosig.runtime.help import Section
from neurosig.runtime.shapes import Above0, AtLeast, Shapes, option_names


@dataclass(kw_only=True)
class TrainConfig(SamplerOptions):
    """Distil a manifest's contexts into the model.

    The student sees the bare question, the teacher also sees the manifest's demonstrations; both read the student's own
    completion.
    """

    method: Annotated[
        Literal["nopsd", "u-opsd", "opsa", "lmsi", "ttrl", "intuitor"], Shapes.TRAINING, Section.TRAINING
    ] = "nopsd"
    """nopsd: Neuron-OPSD; the others are baselines on the same manifest. opsa is the control without a teacher; lmsi,
    ttrl and intuitor need TRL."""
    manifest: Annotated[tuple[Path, ...] | Path, Shapes.TRAINING]
    """Folders written by neurosig.export, of the same model and prompts: all of their questions are trained on."""
    manifest_weights: Annotated[tuple[float, ...], Shapes.TRAINING] = ()
    """Factor of each manifest on its questions' weights in the loss, in the order of --manifest; default: 1 each."""
    out: Annotated[Path, Shapes.PLACE]
    """Folder of metrics.jsonl, checkpoints/ and the final adapter/ (or model/)."""
    model: Annotated[str | None, Shapes.MODEL] = None
    """Load the model from here instead of the id in the manifest; the weights must match."""
    adapter: Annotated[Path | None, Shapes.MODEL] = None
    """Where the manifest's adapter is, if not where it was: training continues it, with its rank and targets."""
    allow_model_mismatch: Annotated[bool, Shapes.TRAINING] = False
    """Train although the weights are not those that made the manifest; the run record says so."""
    resume: Annotated[bool, Shapes.PLACE, Section.OUTPUT] = False
    """Continue from the newest checkpoint, also a finished run if --steps has grown; memory and speed options may
    change."""
    overwrite: Annotated[bool, Shapes.PLACE] = False
    """Replace an earlier run in --out."""

    steps: Annotated[int, Shapes.TRAINING | Shapes.EXTENDS, Section.TRAINING, AtLeast(1)] = 20
    """Optimizer steps; --resume with more of them continues a finished run."""
    questions_per_step: Annotated[int, Shapes.TRAINING, AtLeast(1)] = 8
    """Questions per step."""
    num_generations: Annotated[int, Shapes.TRAINING, AtLeast(1)] = 2
    """Rollouts per question and step."""
    micro_batch_size: Annotated[int, Shapes.RESOURCES, AtLeast(1)] = 16
    """Most rollouts per forward and backward pass; memory and speed only."""
    micro_batch_tokens: Annotated[int | None, Shapes.RESOURCES | Shapes.DISTILLATION, AtLeast(1)] = None
    """Most tokens of the student per pass, prompts (once per question) and completions, padding included; a single
    rollout may have more. Default: no limit."""
    learning_rate: Annotated[float, Shapes.TRAINING, Above0] = 5e-4
    """Peak learning rate of AdamW."""
    warmup_steps: Annotated[int, Shapes.TRAINING, AtLeast(0)] = 3
    """Steps of linear warm-up (constant has none); a step whose rollouts are all masked makes no update, but counts."""
    lr_scheduler: Annotated[
        Literal["constant_with_warmup", "constant", "linear", "cosine", "inverse_sqrt"], Shapes.TRAINING
    ] = "constant_with_warmup"
    """transformers' schedule of that name; linear and cosine fall to 0 after the last step, so --steps cannot grow."""
    adam_beta1: Annotated[float, Shapes.TRAINING] = 0.9
    """AdamW's decay of the gradient's running mean, 0 to below 1."""
    adam_beta2: Annotated[float, Shapes.TRAINING] = 0.999
    """AdamW's decay of the squared gradient's running mean, 0 to below 1."""
    weight_decay: Annotated[float, Shapes.TRAINING] = 0.0
    """AdamW's decoupled decay of all trained weights, 0 or more."""
    max_grad_norm: Annotated[float, Shapes.TRAINING, Above0] = 1.0
    """Largest gradient norm; larger gradients are scaled down to it."""
    full: Annotated[bool, Shapes.TRAINING] = False
    """Train all weights but the input and output embeddings, instead of LoRA; they are kept in float32, products are
    computed in --dtype."""
    lora_r: Annotated[int, Shapes.TRAINING, AtLeast(1)] = 16
    """LoRA rank."""
    lora_alpha: Annotated[int, Shapes.TRAINING] = 32
    """LoRA scale numerator."""
    lora_targets: Annotated[tuple[str, ...], Shapes.TRAINING] = ("all-linear",)
    """Modules with LoRA, as in PEFT: all-linear, names such as q_proj v_proj, or one regular expression."""
    lora_dropout: Annotated[float, Shapes.TRAINING] = 0.0
    """Dropout before LoRA while learning, never while sampling or in the teacher; its masks also depend on
    --micro-batch-size."""
    lora_rslora: Annotated[bool, Shapes.TRAINING] = False
    """Scale LoRA by alpha / sqrt(r) instead of alpha / r (rank-stabilised LoRA)."""

    teacher: Annotated[Literal["base", "live", "ema"], Shapes.TRAINING | Shapes.TEACHER, Section.LOSS] = "base"
    """base: the model before training, the manifest's adapter included; live: the current student, a target that moves
    away as fast as it is followed; ema: a moving average of the student's weights."""
    teacher_model: Annotated[str | None, Shapes.TRAINING | Shapes.TEACHER] = None
    """Another model with the same tokenizer as the teacher (hub id or folder), frozen, in --dtype on the student's
    device. It also sees the context. Memory: its weights, and its keys and values, besides the student's."""
    ema_decay: Annotated[float, Shapes.TRAINING | Shapes.TEACHER] = 0.99
    """Share of its own weights that the ema teacher keeps per step, 0 to below 1."""
    divergence: Annotated[
        Literal["forward_kl", "reverse_kl", "jsd", "sampled_token"], Shapes.TRAINING | Shapes.TEACHER
    ] = "forward_kl"
    """forward_kl is KL(teacher || student); sampled_token estimates reverse_kl from the student's own tokens."""
    topk: Annotated[int, Shapes.TRAINING | Shapes.TEACHER, AtLeast(0)] = 0
    """Compute the divergence on the student's k likeliest vocabulary entries; 0: on the whole vocabulary."""
    tail: Annotated[bool, Shapes.TRAINING | Shapes.TEACHER] = True
    """With --topk: add the remaining entries as one more."""
    beta: Annotated[float, Shapes.TRAINING | Shapes.TEACHER] = 0.5
    """The teacher's share of the mixture in jsd, strictly between 0 and 1."""
    loss_temperature: Annotated[float, Shapes.TRAINING | Shapes.TEACHER, Above0] = 1.0
    """Temperature of both distributions in the loss, above 0."""
    clip: Annotated[Literal["none", "token", "entry"], Shapes.TRAINING | Shapes.TEACHER] = "none"
    """token: scale the divergence of a token above --clip-value down to it; entry: cut each vocabulary entry there,
    above which it teaches nothing. The metric clip_fraction is the share of the loss that was cut."""
    clip_value: Annotated[float, Shapes.TRAINING | Shapes.TEACHER, Above0] = 0.2
    """The cap, in nats. A low one (.05 on the model organism) cuts all that forward_kl has to teach from entries."""
    loss_mean: Annotated[Literal["token", "sequence"], Shapes.TRAINING | Shapes.TEACHER] = "token"
    """token: mean over the step's completion tokens; sequence: mean over its rollouts' means."""
    skip_first: Annotated[int, Shapes.TRAINING, AtLeast(0)] = 0
    """First N completion tokens of each rollout to leave out of the loss."""
    loss_on: Annotated[Literal["all", "disagreeing"], Shapes.TRAINING | Shapes.TEACHER] = "all"
    """disagreeing: only rollouts whose answer is not the pseudo-label, as u-opsd always does."""
    keep_truncated: Annotated[bool, Shapes.TRAINING] = False
    """Also learn from rollouts that were cut off before an end-of-sequence token."""

    answer_parser: Annotated[str | None, Shapes.TRAINING] = None
    """MODULE:FUNCTION that parses completions; default: what parsed the manifest's, which another contradicts."""
    questions_of: Annotated[Literal["selected", "all"], Shapes.TRAINING, Section.BASELINES] = "selected"
    """opsa, lmsi, ttrl, intuitor: train on nopsd's questions, or on all of the manifest as in their papers."""
    opsa_share: Annotated[float, Shapes.TRAINING] = 0.2
    """opsa: share of each rollout's tokens, those with the lowest log-probabilities, that is in the loss; above 0, at
    most 1. The paper's .1 sharpened too much; .2, .3 and .4 did equally well."""
    opsa_advantage: Annotated[Literal["adaptive", "centred", "fixed"], Shapes.TRAINING] = "adaptive"
    """opsa: adaptive: -1/2 to -1, the larger the entropy the more negative, as published; centred: -1/4 to -3/4, the
    same around -1/2; fixed: -1/2 for all, the paper's first control."""
    vote_generations: Annotated[int | None, Shapes.TRAINING] = None
    """ttrl: rollouts per question that vote, of which --num-generations are trained on; default: the same number."""

    temperature: Annotated[float | None, Shapes.TRAINING, Section.SAMPLING] = None
    """Sampling temperature; default: the manifest's."""
    max_new_tokens: Annotated[int | None, Shapes.TRAINING] = None
    """Most completion tokens per rollout; default: the manifest's."""
    batch_rows: Annotated[int, Shapes.RESOURCES] = 256
    """Rollouts per decoded batch; memory and speed only."""
    compile_decoding: Annotated[bool, Shapes.RESOURCES] = False
    """Sample with fixed shapes and replay each step as a CUDA graph, as in neurosig.export."""
    seed: Annotated[int, Shapes.TRAINING] = 0
    """Seed of the question order, the rollouts and the adapter."""
    adapter_dir: Annotated[Path | None, Shapes.PLACE, Section.SERVER] = None
    """With --sampler openai: folder of the student's adapter, which the server reads; default: OUT/served."""
    sync_steps: Annotated[int, Shapes.TRAINING, AtLeast(0)] = 1
    """Steps between adapters sent to the server; 0: none, rollouts come from the weights it serves."""
    max_staleness: Annotated[int, Shapes.TRAINING, AtLeast(0)] = 0
    """Most steps that the server's weights may be behind the student's."""
    save_steps: Annotated[int, Shapes.PLACE, Section.OUTPUT, AtLeast(1)] = 10
    """Steps between checkpoints."""
    keep_checkpoints: Annotated[int, Shapes.PLACE, AtLeast(1)] = 2
    """Newest checkpoints to keep, at least 1."""
    keep_rollouts: Annotated[int, Shapes.PLACE, AtLeast(0)] = 1
    """Keep the sampled rollouts of every Nth step in --out/rollouts, about 3 bytes per token; 0: none."""
    fields: Annotated[tuple[str, ...], Shapes.TRAINING | Shapes.DISTILLATION, Section.REPLAY] = ()
    """FIELD=COLUMN for columns of --replay and --dev-questions with other names, as in neurosig.export."""
    replay: Annotated[str | None, Shapes.TRAINING | Shapes.TEACHER, Section.REPLAY] = None
    """Questions (file, folder, bundled set) to mix in as general prompts without a context, so that the model keeps
    answering them as before."""
    replay_per_step: Annotated[int, Shapes.TRAINING | Shapes.TEACHER, AtLeast(1)] = 2
    """Prompts of --replay per step, in addition to --questions-per-step."""
    replay_weight: Annotated[float, Shapes.TRAINING | Shapes.TEACHER, Above0] = 1.0
    """Weight of the --replay prompts in the loss, above 0."""
    stop_on_collapse: Annotated[bool, Shapes.TRAINING, Section.STOPPING] = True
    """Stop when completion lengths change by half, distinct trigrams fall below half, or the student's entropy falls
    below half of the teacher's (opsa, which has none: of its own first steps), and return to the last checkpoint before
    that."""
    collapse_window: Annotated[int, Shapes.TRAINING, AtLeast(1)] = 10
    """Steps whose mean is compared with the mean of the first steps."""
    license: Annotated[str | None, Shapes.PLACE, Section.OUTPUT] = None
    """SPDX name of the licence in the model card; default: none, the base model's applies."""
    push_to_hub: Annotated[str | None, Shapes.PLACE] = None
    """Upload the result to this private Hugging Face repository; needs `hf auth login`."""
    dev_questions: Annotated[str | None, Shapes.TRAINING | Shapes.DISTILLATION, Section.STOPPING] = None
    """Labelled questions whose maj@K is measured at every save: training stops when it falls, and --keep-step goes by
    it. Their gold answers serve no other purpose."""
    dev_limit: Annotated[int, Shapes.TRAINING, AtLeast(2)] = 64
    """Use only the first N of --dev-questions, at least 2."""
    dev_generations: Annotated[int, Shapes.TRAINING, AtLeast(1)] = 8
    """K, rollouts per development question."""
    keep_step: Annotated[Literal["best", "last"], Shapes.TRAINING | Shapes.DISTILLATION] = "best"
    """With --dev-questions, the saved step whose weights are the result: the one with the best maj@K (the latest such),
    whose maj@K is then too optimistic, or the last good one."""
    report_to: Annotated[tuple[Literal["tensorboard", "wandb"], ...], Shapes.PLACE, Section.OUTPUT] = ()
    """Also send the metrics to these trackers; tensorboard writes to --out."""
    dtype: Annotated[str, Shapes.TRAINING, Section.RESOURCES] = "auto"
    """Parameter dtype; auto: float32 on CPU, bfloat16 on an accelerator."""
    device: Annotated[str | None, Shapes.RESOURCES] = None
    """torch device; default: the first accelerator, else the CPU."""
    attn_implementation: Annotated[Literal["sdpa", "eager", "flash_attention_2"] | None, Shapes.RESOURCES] = None
    """Attention kernels; default: sdpa, or eager for a model without it (Gemma 2). flash_attention_2 needs the package
    flash-attn and an accelerator."""
    gradient_checkpointing: Annotated[bool, Shapes.RESOURCES] = False
    """Recompute the student's activations in the backward pass to save memory."""
    compile: Annotated[bool, Shapes.RESOURCES | Shapes.DISTILLATION] = False
    """Compile the student's layers for training with torch.compile."""

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_fields(self.fields)
        for name in ("ema_decay", "adam_beta1", "adam_beta2", "lora_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')}: expected 0 to below 1, got {getattr(self, name)}")
        if not 0 < self.opsa_share <= 1:
            raise UserError(f"--opsa-share: expected above 0 and at most 1, got {self.opsa_share}")
        if not 0 <= self.weight_decay < math.inf:
            raise UserError(f"--weight-decay: expected 0 or more, got {self.weight_decay}")
        if self.divergence == "jsd" and not 0 < self.beta < 1:
            raise UserError(f"--beta: expected strictly between 0 and 1, got {self.beta}; its ends are the two KLs")
        if self.full and self.dtype == "float16":
            raise UserError("--full --dtype float16: its gradients would need loss scaling; use bfloat16")
        if self.divergence == "sampled_token" and (self.topk or self.clip != "none"):
            raise UserError("--divergence sampled_token scores one entry per token; leave out --topk and --clip")

    @property
    def manifests(self) -> tuple[Path, ...]:
        """The folders of ``--manifest``."""
        return (self.manifest,) if isinstance(self.manifest, Path) else self.manifest

    @property
    def on_disagreeing(self) -> bool:
        """Whether rollouts that agree with the majority leave the loss."""
        return self.method == "u-opsd" or self.loss_on == "disagreeing"

    def saves_after(self, step: int) -> bool:
        """Whether a checkpoint is written after this step."""
        return step % self.save_steps == 0 or step == self.steps


BASELINES = ("lmsi", "ttrl", "intuitor")
"""The methods of `distill.baselines.trl`."""

QWEN3_4B: Mapping[str, object] = {
    **{"steps": 100, "questions_per_step": 32, "num_generations": 1, "save_steps": 25},
    **{"micro_batch_size": 8, "micro_batch_tokens": 5120},
    **{"learning_rate": 2e-5, "warmup_steps": 10, "lora_r": 64, "lora_alpha": 128},
}
INFLOW: Mapping[str, object] = {
    **{"steps": 250, "questions_per_step": 4, "num_generations": 1, "save_steps": 50},
    **{"micro_batch_size": 8, "micro_batch_tokens": 5120},
    **{"learning_rate": 2.5e-6, "lr_scheduler": "cosine", "warmup_steps": 8, "weight_decay": 0.0, "max_grad_norm": 1.0},
    **{"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "temperature": 0.6, "max_new_tokens": 2048},
    **{"teacher": "ema", "ema_decay": 0.995, "divergence": "reverse_kl", "loss_mean": "sequence"},
    **{"keep_truncated": True},
}
CANON: Mapping[str, object] = {**QWEN3_4B, "teacher": "base", "divergence": "jsd", "beta": 0.5}
_LONG: Mapping[str, object] = {"gradient_checkpointing": True, "batch_rows": 32}
U_OPSD: Mapping[str, object] = {
    **{**QWEN3_4B, **_LONG, "method": "u-opsd", "steps": 150, "questions_per_step": 4, "num_generations": 8},
    **{"learning_rate": 5e-6, "max_grad_norm": 0.1, "temperature": 1.1, "max_new_tokens": 4096},
}
OPSA: Mapping[str, object] = {
    **{**_LONG, "method": "opsa", "questions_of": "all", "steps": 500, "questions_per_step": 64, "num_generations": 1},
    **{"micro_batch_size": 8, "micro_batch_tokens": 5120, "save_steps": 20, "full": True},
    **{"learning_rate": 1e-6, "lr_scheduler": "constant", "warmup_steps": 0, "temperature": 1.0},
    **{"max_new_tokens": 12000, "keep_truncated": True, "stop_on_collapse": False},
}
_READINGS = {
    "inflow": "INFLOW's training (appendix E.1)",
    "published": "the training that INFLOW gives N-OPSD in the only published reading of it (appendix D)",
    "consistency": (
        "INFLOW's baseline of agreeing answers, whose teacher has no context: it begins as the student, so the first "
        "divergence is 0 and nothing is ever learned but, in bfloat16, roundings"
    ),
    "redundancy": "INFLOW's baseline that drops similar examples, after DEITA",
    "mutual": "INFLOW's baseline of mutual information",
    "full": "INFLOW's baseline of all questions",
}
"""Whose training `INFLOW` is."""
PRESETS: Mapping[str, Mapping[str, object]] = {
    "cpu": {},
    "organism": {"steps": 20, "learning_rate": 1e-3},
    "qwen3-4b": QWEN3_4B,
    "qwen3-4b-thinking": {**QWEN3_4B, **_LONG},
    **dict.fromkeys(_READINGS, INFLOW),
    "canon": CANON,
    "u-opsd": U_OPSD,
    "opsa": OPSA,
}

_SWEEP = (
    "not run at full size; public recipes have learning rates of 2.5e-6 (reverse KL) to 2e-4 (JSD); with this loss and "
    "adapter in bfloat16, 40 steps changed the model organism's divergence by -5% at 5e-6, -26% at 2e-5, -71% at 1e-4 "
    "and +245% at 1e-3"
)
_SIZE = (
    "made for models of 4B to 9B: smaller ones need a higher --learning-rate (the model organism 5e-4 to 1e-3), and "
    "it was not run at full size here"
)
_INFLOW = (
    "INFLOW and all its baselines share it; cut-off rollouts stay in the loss, as in their code, because their "
    "divergence is as good as any other's; the average is of the merged weights, and the cosine ends after 250 steps, "
    f"theirs perhaps after 500; {_SIZE}"
)
BASIS: Mapping[str, str] = {
    "qwen3-4b": _SWEEP,
    "qwen3-4b-thinking": f"the numbers of qwen3-4b with memory for completions of 4,096 tokens; {_SWEEP}",
    **{name: f"{text}; {_INFLOW}" for name, text in _READINGS.items()},
    "canon": (
        "CANON (arXiv 2607.13643) as summarised: a frozen snapshot teaches all of the student's rollouts by JSD; it "
        "samples them once, here every step does; rank, learning rate, batch and steps are those of qwen3-4b, a "
        f"reading; {_SIZE}"
    ),
    "u-opsd": (
        "U-OPSD (arXiv 2608.06296) as summarised: LoRA, learning rate, gradient norm, temperature, length, 8 rollouts "
        "and a frozen teacher; 4 questions, 150 steps and the warm-up are a reading, and its clip of entries, which "
        f"pushes the teacher's favourite down, is left out; {_SIZE}"
    ),
    "opsa": (
        "OPSA (arXiv 2608.31046, table 4): learning rate, batch, temperature, length, all weights; the constant rate, "
        "500 steps and cut-off rollouts in the loss are a reading; its answers grow to several times their length, so "
        "the stop rules are off; made for models of 1.7B to 9B, not run at full size here"
    ),
}
"""What the numbers of a preset rest on; printed before training."""


def check_options(config: TrainConfig) -> None:
    """Refuse options out of range, before anything is loaded or written.

    Raises:
        UserError: Naming the flag and its bounds.
    """
    if config.attn_implementation == "flash_attention_2" and find_spec("flash_attn") is None:
        raise UserError("--attn-implementation flash_attention_2: the package flash-attn is not installed; use sdpa")
    for name in config.report_to:
        check_installed(f"--report-to {name}", name)
    if "wandb" in config.report_to:
        _check_login()
    _check_method(config)
    if config.replay is not None and config.teacher == "live":
        raise UserError("--replay teaches nothing with --teacher live, which sees the same prompt; choose base or ema")
    if config.teacher_model is not None and (config.teacher != "base" or config.replay is not None):
        raise UserError(
            "--teacher-model is a frozen teacher; leave out --teacher, and --replay, which the student teaches"
        )
    if config.sampler == "openai" or config.base_url is not None:
        _check_server_options(config)


def _check_login() -> None:
    import wandb

    if wandb.setup().settings.mode in ("online", "shared") and not wandb.login(prompt=False):
        raise UserError("--report-to wandb: not logged in; run `wandb login`, or set WANDB_MODE=offline")


def _check_server_options(config: TrainConfig) -> None:
    config.server_config("")
    if config.full:
        raise UserError("--sampler openai: a server loads the student's adapter, but --full trains none")
    if config.server_api != "completions":
        raise UserError(f"--server-api {config.server_api}: training needs the tokens as sampled; use completions")
    behind = (config.sync_steps or config.steps) - 1
    if behind > config.max_staleness:
        raise UserError(
            f"--sync-steps {config.sync_steps}: rollouts would come from weights up to {behind} steps old; give "
            f"--max-staleness {behind} to allow that"
        )
    if config.dev_questions is not None and not config.sync_steps:
        raise UserError("--dev-questions measures the student, which --sync-steps 0 never sends to the server")


def _check_method(config: TrainConfig) -> None:
    """Refuse options that the method ignores."""
    method = config.method
    unknown = () if method in ("nopsd", "u-opsd") else option_names(TrainConfig, Shapes.TEACHER)
    unknown += option_names(TrainConfig, Shapes.DISTILLATION) if method in BASELINES else ()
    unknown += ("questions_of",) if method in ("nopsd", "u-opsd") else ()
    unknown += () if method == "opsa" else ("opsa_share", "opsa_advantage")
    unknown += () if method == "ttrl" else ("vote_generations",)
    for field in fields(TrainConfig):
        if field.name in unknown and getattr(config, field.name) != field.default:
            raise UserError(f"--{field.name.replace('_', '-')}: --method {method} has no such option; leave it out")
    if method in BASELINES:
        check_installed(f"--method {method}", "trl")
    if method in ("ttrl", "intuitor") and config.num_generations < 2:
        raise UserError(f"--num-generations: --method {method} compares rollouts, expected at least 2")
    if method in ("ttrl", "intuitor") and config.temperature == 0:
        raise UserError(f"--temperature: --method {method} learns from differing rollouts, expected more than 0")
    if config.vote_generations is not None and config.vote_generations < config.num_generations:
        raise UserError(
            f"--vote-generations: expected at least --num-generations ({config.num_generations}), got "
            f"{config.vote_generations}"
        )
