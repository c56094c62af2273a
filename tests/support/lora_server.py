"""A small server with vLLM's completions API and adapter calls, and faults on request.

    python tests/support/lora_server.py FOLDER PORT

It samples with `neurosig.sampling.sampler` from the model in FOLDER, one request at a time. ``POST /control`` sets the
fault of the next requests, ``GET /seen`` lists the requests so far.
"""

from __future__ import annotations

import copy
import gzip
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from peft import PeftModel

from neurosig.models.load import LoadedModel, load_model
from neurosig.sampling.config import SamplingConfig
from neurosig.sampling.rollouts import Rollout
from neurosig.sampling.sampler import Prompt, sample

app = FastAPI()
lock = threading.Lock()
served: dict[str, LoadedModel] = {}
adapters: dict[str, str] = {}
seen: list[dict[str, Any]] = []
control: dict[str, Any] = {"kind": "none", "times": 0, "after": 0}


@app.get("/health")
def health() -> dict[str, bool]:
    return {"ok": True}


@app.post("/control")
def set_control(body: dict[str, Any]) -> None:
    control.update({"times": 1, "after": 0, **body})
    seen.clear()


@app.get("/seen")
def get_seen() -> list[dict[str, Any]]:
    return seen


@app.post("/v1/completions")
def completions(request: Request, body: dict[str, Any]) -> Response:
    with lock:
        seen.append({"time": time.time(), "path": "completions", "key": request.headers["authorization"], **body})
        kind = _kind_of_this_request()
        if (fault := _fault(kind, "seed" in body)) is not None:
            return fault
        loaded = served.get(body["model"])
        if loaded is None:
            return _error(404, f"The model `{body['model']}` does not exist.")
        if not (isinstance(body["prompt"], list) and all(type(token) is int for token in body["prompt"])):
            return _error(400, "prompt: expected token ids")
        if body["temperature"] == 0 and body["n"] > 1:
            return _error(400, f"n must be 1 when using greedy sampling, got {body['n']}.")
        answer = _answer(loaded, body, divisor=body["temperature"] if kind == "scaled" else 1.0)
    _spoil(answer, kind)
    return Response(json.dumps(answer), media_type="application/json")


def _fault(kind: str, seeded: bool) -> Response | None:
    """The answer of a server that is broken in this way, if it is no answer to the request; "hang" answers late."""
    match kind:
        case "429":
            return _error(429, "slow down", {"Retry-After": "0.3"})
        case "500":
            return _error(500, "a fault of the server")
        case "hang":
            time.sleep(1.5)
        case "die":
            os._exit(1)
        case "no seeds" if seeded:
            return _error(500, "EngineCore encountered an issue.")  # vLLM's words
        case "truncated":
            return Response(b'{"choices": [', headers={"Content-Length": "5000"}, media_type="application/json")
        case "half":
            return Response('{"choices": [{"index": 0, "token_', media_type="application/json")
        case "redirect":
            return Response(status_code=307, headers={"Location": "/health"})
        case "html":
            return Response("<html>busy</html>", media_type="text/html")
        case "gzip":
            return Response(gzip.compress(b"{}"), headers={"Content-Encoding": "gzip"})
        case "huge":
            return Response(json.dumps({"choices": ["x" * (1 << 23)]}), media_type="application/json")
        case "nested":
            return Response("[" * 100_000, media_type="application/json")
    return None


def _kind_of_this_request() -> str:
    if control["after"] > 0:
        control["after"] -= 1
        return "none"
    if control["times"] <= 0:
        return "none"
    control["times"] -= 1
    return str(control["kind"])


def _answer(loaded: LoadedModel, body: dict[str, Any], divisor: float) -> dict[str, Any]:
    config = SamplingConfig(
        num_generations=body["n"],
        temperature=body["temperature"],
        top_p=body["top_p"],
        top_k=body["top_k"],
        repetition_penalty=body["repetition_penalty"],
        max_new_tokens=body["max_tokens"],
        seed=body.get("seed", 1000 + len(seen)),
    )
    (group,) = sample(loaded, [Prompt("", tuple(body["prompt"]))], config)
    choices = [_choice(loaded, body, rollout, divisor) for rollout in group]
    return {"id": "cmpl-1", "object": "text_completion", "model": body["model"], "choices": choices}


def _choice(loaded: LoadedModel, body: dict[str, Any], rollout: Rollout, divisor: float) -> dict[str, Any]:
    logprobs = None
    if body.get("logprobs") is not None:
        ids = torch.tensor([[*body["prompt"], *rollout.completion_ids]])
        with torch.inference_mode():
            log_p = torch.log_softmax(loaded.model(ids).logits[0].float() / divisor, dim=-1)
        first = len(body["prompt"])
        values = [float(log_p[first + i - 1, token]) for i, token in enumerate(rollout.completion_ids)]
        tokens = [loaded.tokenizer.decode([token]) for token in rollout.completion_ids]
        logprobs = {"text_offset": [0] * len(tokens), "token_logprobs": values, "tokens": tokens, "top_logprobs": []}
    last_allowed = len(rollout.completion_ids) == body["max_tokens"]  # vLLM looks at the length first
    return {
        "index": rollout.rollout_id,
        "text": rollout.text,
        "logprobs": logprobs,
        "finish_reason": "length" if last_allowed else rollout.finish_reason,
        "stop_reason": None,
        "token_ids": list(rollout.completion_ids) if body.get("return_token_ids") else None,
        "prompt_token_ids": body["prompt"],
    }


def _spoil(answer: dict[str, Any], kind: str) -> None:
    choice = answer["choices"][0]
    changes: dict[str, dict[str, Any]] = {
        "no ids": {"token_ids": None},
        "strings": {"token_ids": ["7"]},
        "booleans": {"token_ids": [True]},
        "floats": {"token_ids": [7.5]},
        "no tokens": {"token_ids": []},
        "outside": {"token_ids": [10**9, *choice["token_ids"][1:]]},
        "negative": {"token_ids": [-1, *choice["token_ids"][1:]]},
        "too long": {"token_ids": [7] * 10_000},
        "goes on": {"token_ids": [2, 7, 7, 7]},
        "stops short": {"token_ids": [7], "finish_reason": "length"},
        "no end": {"token_ids": [7, 7, 7, 7], "finish_reason": "stop"},
        "no reason": {"finish_reason": None},
        "no logprobs": {"logprobs": None},
        "few logprobs": {"logprobs": {"token_logprobs": [-1.0] * 99}},
        "nan": {"logprobs": {"token_logprobs": [float("nan")] * len(choice["token_ids"])}},
        "above zero": {"logprobs": {"token_logprobs": [3.0] * len(choice["token_ids"])}},
        "other model": {"logprobs": {"token_logprobs": [-20.0] * len(choice["token_ids"])}},
        "twice": {"index": 1},
    }
    choice.update(changes.get(kind, {}))
    if kind == "abort":
        choice |= {"finish_reason": "abort", "token_ids": choice["token_ids"][:2]}
        choice["logprobs"]["token_logprobs"] = choice["logprobs"]["token_logprobs"][:2]
    elif kind == "too many":
        answer["choices"] *= 2
    elif kind == "too few":
        del answer["choices"][0]
    elif kind == "no choices":
        answer["choices"] = None


CHAT: dict[str, tuple[dict[str, Any], str | None]] = {
    "number": ({"content": 7}, "stop"),
    "endless": ({"content": "y" * 50_000}, "stop"),
    "empty": ({"content": ""}, "stop"),
    "empty cut off": ({"content": ""}, "length"),
    "null": ({"content": None}, "stop"),
    "null cut off": ({"content": None}, "length"),
    "thought": ({"content": "\n\nyes", "reasoning_content": "\nno\n"}, "stop"),
    "thought, new name": ({"content": "yes", "reasoning": "no"}, "stop"),
    "thought cut off": ({"content": None, "reasoning": "no"}, "length"),
    "abort": ({"content": "ye"}, "abort"),
    "content_filter": ({"content": ""}, "content_filter"),
    "tool_calls": ({"content": None, "tool_calls": [{"id": "1"}]}, "tool_calls"),
    "None": ({"content": "yes"}, None),
}
"""Messages and finish reasons by kind."""


@app.post("/v1/chat/completions")
def chat(body: dict[str, Any]) -> Response:
    """Fixed text: the tests are about how the client reads it."""
    with lock:
        seen.append({"time": time.time(), "path": "chat", **body})
        kind = _kind_of_this_request()
        if (fault := _fault(kind, "seed" in body)) is not None:
            return fault
    message, reason = CHAT.get(kind, ({"content": "yes"}, "stop"))
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": reason}
    return JSONResponse({"object": "chat.completion", "choices": [choice] * (2 if kind == "two" else 1)})


@app.post("/v1/load_lora_adapter")
def load_adapter(body: dict[str, str]) -> Response:
    with lock:
        name, path = body["lora_name"], body["lora_path"]
        seen.append({"path": "load", "name": name, "rollouts": sum(call["path"] == "completions" for call in seen)})
        if control["kind"] == "no adapters":
            return _error(404, "Not Found")
        if name in served:
            return _error(400, f"The lora adapter '{name}' has already been loaded.")
        base = served["base"]
        adapted = PeftModel.from_pretrained(copy.deepcopy(base.model), path).merge_and_unload()
        served[name] = LoadedModel(adapted.eval(), base.tokenizer, base.info)
        adapters[name] = path
        return Response(f"Success: LoRA adapter '{name}' added successfully.")


@app.post("/v1/unload_lora_adapter")
def unload_adapter(body: dict[str, str]) -> Response:
    with lock:
        name = body["lora_name"]
        seen.append({"path": "unload", "name": name})
        if name not in adapters:
            return _error(404, f"The lora adapter '{name}' cannot be found.")
        del adapters[name], served[name]
        return Response(f"Success: LoRA adapter '{name}' removed successfully.")


@app.get("/v1/models")
def models() -> dict[str, Any]:
    return {"object": "list", "data": [{"id": name, "object": "model", "root": adapters.get(name)} for name in served]}


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": {"message": message, "code": status}}, status_code=status, headers=headers)


if __name__ == "__main__":
    torch.set_num_threads(1)
    model = load_model(Path(sys.argv[1]))
    served.update({"base": model, model.info.id: model})
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")
