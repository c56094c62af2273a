"""LoRA adapters: given to a loaded model, the modules they are for, and their dropout."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from neurosig.models.load import LoadedModel
from neurosig.models.trained import check_base
from neurosig.runtime.errors import UserError
from neurosig.runtime.files import read_once

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def apply_adapter(loaded: LoadedModel, folder: Path) -> str:
    """Make the model in place what it was at the end of the adapter's training.

    In float32 the adapter is merged, which is the same function to rounding and samples faster. In half precision it
    stays beside the weights: rounded together with them, most of a small change would be lost.

    Returns:
        The SHA-256 of its weights.

    Raises:
        UserError: See `read_adapter`.
    """
    adapter, digest = read_adapter(loaded, folder)
    if loaded.model.dtype.itemsize >= 4:
        adapter.merge_and_unload()
    return digest


def read_adapter(loaded: LoadedModel, folder: Path) -> tuple[PeftModel, str]:
    """Put the adapter's layers, in float32, into the model; and the SHA-256 of its weights.

    Raises:
        UserError: The folder has no adapter, or one of another model (`neurosig.models.trained.check_base`).
    """
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise UserError(f"--adapter {folder}: no {weights.name} there; give an adapter folder of distill.train")
    check_base(folder, loaded.info)
    from peft import PeftModel
    from safetensors import SafetensorError

    try:
        with read_once(weights) as digest:
            adapter = PeftModel.from_pretrained(loaded.model, folder)
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise UserError(
            f"--adapter {folder}: not an adapter of {loaded.info.id} ({str(error).strip().splitlines()[0]}); give the "
            "folder of its training run"
        ) from error
    adapter.eval()
    return adapter, str(digest)


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
