"""LoRA adapters: given to a loaded model, the modules they are for, and their dropout; and a checkpoint's weights."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from neurosig.models.run_folder import (
    ADAPTER_CONFIG,
    TrainedWeights,
    base_of,
    find_adapter,
    full_checkpoint,
    read_record,
)
from neurosig.runtime.errors import UserError
from neurosig.runtime.files import read_once

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from neurosig.models.load import LoadedModel, ModelInfo

logger = logging.getLogger(__name__)


def load_trained(load: Callable[[Any], LoadedModel], spec: Any, adapter: str | Path | None) -> LoadedModel:
    """A model with the weights of an adapter, or of a checkpoint of a run with ``--full``.

    Args:
        load: Loads a base model.
        spec: See `neurosig.models.load.load_model`; without ``adapter`` such a checkpoint.
        adapter: See `read_adapter`.

    Raises:
        UserError: See `read_adapter` and `apply_checkpoint`.
    """
    if adapter is not None:
        find_adapter(Path(adapter))  # before the model loads
        return apply_adapter(load(spec), Path(adapter))
    found = full_checkpoint(Path(spec).expanduser())
    assert found is not None
    record = read_record(found.folder) or {}
    return apply_checkpoint(load(record["model"]["id"]), found, str(spec))


def apply_adapter(loaded: LoadedModel, folder: Path) -> LoadedModel:
    """Make the model in place what it was at the end of the adapter's training; its `ModelInfo` then names the adapter.

    In float32 the adapter is merged, which is the same function to rounding and samples faster. In half precision it
    stays beside the weights: rounded together with them, most of a small change would be lost.

    Raises:
        UserError: See `read_adapter`.
    """
    adapter, digest = read_adapter(loaded, folder)
    if loaded.model.dtype.itemsize >= 4:
        adapter.merge_and_unload()
    return replace(loaded, info=replace(loaded.info, adapter=digest))


def read_adapter(loaded: LoadedModel, folder: Path, *, trainable: bool = False) -> tuple[PeftModel, str]:
    """Put the adapter's layers, in float32, into the model; and the SHA-256 of its weights.

    Args:
        loaded: The base model.
        folder: See `neurosig.models.run_folder.find_adapter`.
        trainable: Whether the adapter's weights require gradients.

    Raises:
        UserError: The folder has no adapter, or one of another model (`check_base`).
    """
    found = find_adapter(folder)
    check_base(found.folder, loaded.info)
    from peft import PeftModel
    from safetensors import SafetensorError

    try:
        with read_once(found.file) as digest:
            if found.in_checkpoint:
                adapter = _from_checkpoint(loaded.model, found, trainable)
            else:
                adapter = PeftModel.from_pretrained(loaded.model, found.folder, is_trainable=trainable)
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise UserError(
            f"--adapter {folder}: not an adapter of {loaded.info.id} ({str(error).strip().splitlines()[0]}); give the "
            "folder of its training run"
        ) from error
    adapter.eval()
    return adapter, str(digest)


def check_base(adapter: Path, info: ModelInfo) -> None:
    """Refuse an adapter that distill.train trained on other weights; warn where another program names another base.

    Live weights, whose files are not known, are taken as they are.

    Args:
        adapter: Its folder.
        info: The model that it is put into.

    Raises:
        UserError: It was trained on other weights, or a record cannot be read.
    """
    record = read_record(adapter)
    if record is None:
        made_for = base_of(adapter / ADAPTER_CONFIG)
        if made_for not in ("", info.id):
            says = f"as its {ADAPTER_CONFIG} says"
            logger.warning("%s: made for %s, %s, and put into %s", adapter, made_for, says, info.id)
        return
    own, base = set(info.weights.values()), record["model"]
    if "state_dict" not in info.weights and not own <= set(base["weights"].values()):
        raise UserError(
            f"model {info.id}: its weights are not those that {adapter} was trained on; give --model {base['id']}"
        )


def _from_checkpoint(model: PreTrainedModel, found: TrainedWeights, trainable: bool) -> PeftModel:
    """The adapter of a checkpoint, whose weights have the names of the model's parameters."""
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file

    config = LoraConfig.from_pretrained(str(found.folder))
    config.inference_mode, config.base_model_name_or_path = not trainable, None  # else peft warns of a moved model
    adapter = get_peft_model(model, config)
    _copy_weights(model, load_file(found.file), [name for name, _ in model.named_parameters() if ".lora_" in name])
    return adapter


def apply_checkpoint(loaded: LoadedModel, found: TrainedWeights, name: str) -> LoadedModel:
    """Give the base model in place the weights of a checkpoint of a run with ``--full``.

    Args:
        loaded: The base model.
        found: See `neurosig.models.run_folder.full_checkpoint`.
        name: What the model is called in records and messages.

    Raises:
        UserError: They are weights of another model.
    """
    from safetensors.torch import load_file

    try:
        with read_once(found.file) as digest:
            stored = load_file(found.file)
            _copy_weights(loaded.model, stored, [*stored])
    except (LookupError, RuntimeError) as error:
        raise UserError(f"model {name}: not a checkpoint of {loaded.info.id} ({error})") from error
    weights = {**loaded.info.weights, found.file.name: str(digest)}
    return replace(loaded, info=replace(loaded.info, id=name, weights=weights))


@torch.no_grad()
def _copy_weights(model: PreTrainedModel, stored: dict[str, Tensor], names: Sequence[str]) -> None:
    parameters = dict(model.named_parameters())
    if lacking := {*names} ^ stored.keys() | stored.keys() - parameters.keys():
        raise LookupError(f"{min(lacking)} is in one of them alone")
    for name in names:
        if stored[name].shape != parameters[name].shape:
            raise LookupError(f"{name} has {tuple(stored[name].shape)} instead of {tuple(parameters[name].shape)}")
        parameters[name].copy_(stored[name])


class LearningDropout(torch.nn.Dropout):
    """Dropout where gradients are recorded, whatever the model's mode: only the student's learning forward does so."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.nn.functional.dropout(input, self.p, training=torch.is_grad_enabled())


def lora_targets(targets: Sequence[str], model: PreTrainedModel) -> str | list[str]:
    """``target_modules`` of PEFT's configuration: names, or a text that is a keyword or a regular expression.

    Raises:
        UserError: One matches nothing, or more than linear modules of the decoder.
    """
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists
    from transformers.pytorch_utils import Conv1D

    modules, head, decoder = dict(model.named_modules()), model.get_output_embeddings(), model.get_decoder()
    every = [name for name, m in modules.items() if isinstance(m, (torch.nn.Linear, Conv1D)) and m is not head]
    text = next(name for name, module in modules.items() if module is decoder)
    linear = [name for name in every if name.startswith(text)]
    names = dict.fromkeys(name.rpartition(".")[2] for name in linear)
    # a multimodal model's other towers get no gradient from text
    inside = "" if len(linear) == len(every) else rf"{re.escape(text)}\.(.*\.)?"
    if (*targets,) == ("all-linear",):
        if not inside:
            return "all-linear"
        targets = [*names]
    alone = len(targets) == 1 and re.search(r"[^\w.]", targets[0]) is not None
    for target in targets:
        lora = LoraConfig(target_modules=target if alone else inside + target if inside else [target])
        try:
            found = [name for name in modules if check_target_module_exists(lora, name)]
        except re.error as error:
            raise UserError(f"--lora-targets {target}: not a regular expression ({error})") from error
        wrong = sorted({*found} - {*linear})
        if wrong or not found:
            raise UserError(
                f"--lora-targets {target}: matches {wrong[0] or 'the whole model' if wrong else 'nothing'}; the "
                f"model's linear modules are {', '.join(names)}"
            )
    if inside and not alone:
        return f"{inside}({'|'.join(targets)})"
    return targets[0] if alone else [*targets]
