"""An NDIF server without the network: one request per line of stdin (model folder, request file, answer file).

It has no neurosig and no jaxtyping: all code that it runs comes with the request.
"""

import importlib.abc
import sys

import torch
from nnsight import TransformersModel
from nnsight.schema.request import RequestModel
from nnsight.tracing.tracer import dec, inc
from transformers import AutoTokenizer


class NotInstalled(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.split(".")[0] in ("neurosig", "jaxtyping", "beartype"):
            raise ModuleNotFoundError(f"the server has no {name}")


sys.meta_path.insert(0, NotInstalled())
assert "neurosig" not in sys.modules and "jaxtyping" not in sys.modules
for line in sys.stdin:
    folder, request, answer = line.rstrip("\n").split("\t")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = TransformersModel(folder, tokenizer=tokenizer, task="text-generation", dispatch=True)
    with open(request, "rb") as file:
        tracer = RequestModel.deserialize(file.read(), model._remoteable_persistent_objects(), compress=True)
    before = set(tracer.info.frame.f_locals)
    inc()  # a trace's scope: only saved values come back
    tracer.execute(tracer.info.code)
    dec()
    saved = {name: value for name, value in tracer.info.frame.f_locals.items() if name not in before}
    torch.save(saved, answer)
    print("done", flush=True)
