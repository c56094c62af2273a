"""The options of ``python -m distill.train``, their presets and their bounds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from neurosig.options import SERVER_PLACES, SamplerOptions
from neurosig.runtime.cli import config_record
from neurosig.runtime.errors import UserError

if TYPE_CHECKING:
    from neurosig.manifest import Manifest
    from neurosig.sampling.sampler import SamplingConfig


@dataclass(kw_only=True)
class TrainConfig(SamplerOptions):
    """Distil a manifest's contexts into the model.

    The student sees the bare question, the teacher also sees the manifest's solved examples; both read the student's
    own completion.
    """

    method: Literal["nopsd", "u-opsd", "lmsi", "ttrl", "intuitor"] = "nopsd"
    """nopsd: Neuron-OPSD; the others are its baselines on the same manifest. lmsi, ttrl and intuitor need TRL."""
    manifest: Path
    """Folder written by neurosig.export."""
    out: Path
    """Folder for metrics.jsonl, checkpoints/ and the final adapter/ (or model/)."""
    model: str | None = None
    """Load the model from here instead of the id in the manifest; the weights must match."""
    allow_model_mismatch: bool = False
    """Train although the model is not the one that made the manifest; recorded in train.json."""
    resume: bool = False
    """Continue from the newest checkpoint; leave a finished run alone."""
    overwrite: bool = False
    """Replace an earlier run in --out."""

    steps: int = 20
    """Optimizer steps."""
    questions_per_step: int = 8
    """Questions sampled per step."""
    num_generations: int = 2
    """Rollouts per question in each step."""
    micro_batch_size: int = 16
    """Rollouts per forward and backward pass; memory and speed only."""
    learning_rate: float = 5e-4
    """Peak learning rate of AdamW."""
    warmup_steps: int = 3
    """Steps of linear warm-up, then constant."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    full: bool = False
    """Full fine-tuning (input and output embeddings stay frozen) instead of LoRA."""
    lora_r: int = 16
    """LoRA rank."""
    lora_alpha: int = 32
    """LoRA scale numerator."""

    teacher: Literal["base", "live", "ema"] = "base"
    """base: the model before training; live: the student as it is now; ema: the average of its past weights."""
    ema_decay: float = 0.99
    """Share of its weights that the ema teacher keeps at each step."""
    divergence: Literal["forward_kl", "reverse_kl", "jsd", "sampled_token"] = "forward_kl"
    """forward_kl is KL(teacher || student); sampled_token estimates reverse_kl from the student's own tokens."""
    topk: int = 0
    """Sum over the student's k likeliest vocabulary entries only; 0 sums over the whole vocabulary."""
    tail: bool = True
    """With --topk: treat the other entries as one more."""
    beta: float = 0.5
    """Teacher's share of the mixture in jsd."""
    loss_temperature: float = 1.0
    """Divides both logits in the loss."""
    clip: Literal["none", "pointwise", "token"] = "none"
    """Cap the contribution of each vocabulary entry (pointwise) or of each token."""
    clip_value: float = 0.05
    """The cap, in nats."""
    loss_mean: Literal["token", "sequence"] = "token"
    """Mean over all completion tokens of the step, or over its rollouts, each with the mean of its tokens."""
    skip_first: int = 0
    """Completion tokens masked at the start of each rollout."""
    loss_on: Literal["all", "disagreeing"] = "all"
    """disagreeing: only rollouts whose answer is not their question's majority answer, which u-opsd always implies."""
    keep_truncated: bool = False
    """Learn from rollouts without an end-of-sequence token too."""

    questions_of: Literal["selected", "all"] = "selected"
    """lmsi, ttrl, intuitor: train on the questions of nopsd, or on all in the manifest as in their papers."""
    vote_generations: int | None = None
    """ttrl: rollouts that vote, of which --num-generations are trained on; default: as many."""

    temperature: float | None = None
    """Sampling temperature; default: the manifest's."""
    max_new_tokens: int | None = None
    """Completion tokens before a rollout is cut off; default: the manifest's."""
    batch_rows: int = 256
    """Rollouts decoded at a time (memory and speed only)."""
    seed: int = 0
    """Seed of the question order, the rollouts and the adapter."""
    adapter_dir: Path | None = None
    """With --sampler openai: where the student's adapter is written for the server to read; default: OUT/served."""
    sync_steps: int = 1
    """Send the adapter to the server every N steps; 0: never, rollouts come from the weights it serves."""
    max_staleness: int = 0
    """Maximum steps between the weights sampled from and the student."""
    save_steps: int = 10
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints kept."""
    replay: str | None = None
    """Questions (file, folder, bundled set) mixed in as general prompts; the teacher sees no context on them either, so
    the model keeps answering them as before."""
    replay_per_step: int = 2
    """Prompts of --replay sampled per step, in addition to the manifest's questions."""
    replay_weight: float = 1.0
    """Their weight in the loss."""
    stop_on_collapse: bool = True
    """Stop, and go back, when lengths change by half, or entropy or distinct trigrams fall below half."""
    collapse_window: int = 10
    """Compare the mean of the last N steps with that of the first N."""
    license: str | None = None
    """SPDX name of the licence in the model card; default: the base model's."""
    push_to_hub: str | None = None
    """Upload the result to this Hugging Face repository, private; needs `hf auth login`."""
    dev_questions: str | None = None
    """Labelled questions whose maj@K is measured at every save; stop when it falls. Gold answers have no other use."""
    dev_limit: int = 64
    """Use only the first N of --dev-questions."""
    dev_generations: int = 8
    """Rollouts per question of --dev-questions."""
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Also log the metrics to these trackers; tensorboard writes to --out."""
    dtype: str = "auto"
    """Parameter dtype; auto: float32 on CPU, bfloat16 on an accelerator."""
    device: str | None = None
    """torch device; default: the first accelerator, else the CPU."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention kernels; flash_attention_2 needs the package flash-attn and an accelerator."""
    gradient_checkpointing: bool = False
    """Recompute the student's activations in the backward pass instead of storing them."""
    compile: bool = False
    """Compile the student's layers for training with torch.compile."""

    @property
    def on_disagreeing(self) -> bool:
        """Whether rollouts that agree with the majority leave the loss."""
        return self.method == "u-opsd" or self.loss_on == "disagreeing"

    def saves_after(self, step: int) -> bool:
        """Whether a checkpoint is written after this step."""
        return step % self.save_steps == 0 or step == self.steps


BASELINES = ("lmsi", "ttrl", "intuitor")
"""The methods of `distill.baselines.trl`."""
_OF_DISTILLATION = [
    *("teacher", "divergence", "topk", "loss_temperature", "loss_mean", "loss_on"),
    *("replay", "dev_questions", "compile", "sampler", "base_url"),
]

PRESETS: Mapping[str, Mapping[str, object]] = {
    "cpu": {},
    "organism": {"steps": 20, "learning_rate": 1e-3},
    "qwen3-4b": {
        **{"steps": 100, "questions_per_step": 32, "num_generations": 1, "micro_batch_size": 4, "save_steps": 25},
        **{"learning_rate": 5e-6, "warmup_steps": 10, "lora_r": 64, "lora_alpha": 128, "clip": "pointwise"},
    },
}
_AT_LEAST = {
    **dict.fromkeys(("warmup_steps", "topk", "skip_first", "sync_steps", "max_staleness"), 0),
    **dict.fromkeys(("steps", "questions_per_step", "num_generations", "micro_batch_size", "lora_r", "save_steps"), 1),
    **dict.fromkeys(("keep_checkpoints", "collapse_window", "replay_per_step", "dev_generations"), 1),
    "dev_limit": 2,
}


def check_options(config: TrainConfig) -> None:
    """Refuse options out of range, before anything is loaded or written.

    Raises:
        UserError: Naming the flag and its bounds.
    """
    for name, least in _AT_LEAST.items():
        if getattr(config, name) < least:
            raise UserError(f"--{name.replace('_', '-')}: expected at least {least}, got {getattr(config, name)}")
    if config.attn_implementation == "flash_attention_2" and find_spec("flash_attn") is None:
        raise UserError("--attn-implementation flash_attention_2: the package flash-attn is not installed; use sdpa")
    _check_method(config)
    if not 0 <= config.ema_decay < 1:
        raise UserError(f"--ema-decay: expected 0 to below 1, got {config.ema_decay}")
    if config.replay is not None and config.teacher == "live":
        raise UserError("--replay teaches nothing with --teacher live, which sees the same prompt; choose base or ema")
    if config.divergence == "jsd" and not 0 < config.beta < 1:
        raise UserError(f"--beta: expected strictly between 0 and 1, got {config.beta}; its ends are the two KLs")
    if config.divergence == "sampled_token" and (config.topk or config.clip != "none"):
        raise UserError("--divergence sampled_token scores one entry per token; leave out --topk and --clip")
    if config.sampler == "openai" or config.base_url is not None:
        _check_server_options(config)
    for name in ("learning_rate", "max_grad_norm", "loss_temperature", "clip_value", "replay_weight"):
        if not (getattr(config, name) > 0 and math.isfinite(getattr(config, name))):
            raise UserError(f"--{name.replace('_', '-')}: expected a number above 0, got {getattr(config, name)}")


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
    unknown = [] if method in BASELINES else ["questions_of"]
    unknown += _OF_DISTILLATION if method in BASELINES else []
    unknown += [] if method == "ttrl" else ["vote_generations"]
    for field in fields(TrainConfig):
        if field.name in unknown and getattr(config, field.name) != field.default:
            raise UserError(f"--{field.name.replace('_', '-')}: --method {method} has no such option; leave it out")
    if method in BASELINES and find_spec("trl") is None:
        raise UserError(f"--method {method}: TRL is not installed; run `pip install 'neurosig[baselines]'`")
    if method in ("ttrl", "intuitor") and config.num_generations < 2:
        raise UserError(f"--num-generations: --method {method} compares rollouts, expected at least 2")
    if method in ("ttrl", "intuitor") and config.temperature == 0:
        raise UserError(f"--temperature: --method {method} learns from differing rollouts, expected more than 0")
    if config.vote_generations is not None and config.vote_generations < config.num_generations:
        raise UserError(
            f"--vote-generations: expected at least --num-generations ({config.num_generations}), got "
            f"{config.vote_generations}"
        )


def resume_key(config: TrainConfig, manifest: Manifest, sampling: SamplingConfig) -> dict[str, Any]:
    """Everything that must be unchanged for a resumed run to equal an uninterrupted one."""
    import torch

    free = {"preset", "config", "manifest", "out", "model", "resume", "overwrite", "save_steps", "keep_checkpoints"}
    free |= {"license", "push_to_hub", "report_to", "adapter_dir", *SERVER_PLACES}
    record = {name: value for name, value in config_record(config).items() if name not in free}
    return {
        **record,
        **sampling.as_dict(),
        "manifest": manifest.header.content_sha256,
        "torch": torch.__version__,
        "threads": None if torch.accelerator.is_available() else torch.get_num_threads(),
    }
