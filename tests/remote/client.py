"""Tracing here, as a local dry run, and on a server (server.py) that alone has the weights gives the same sets."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from nnsight.intervention.backends.remote import RemoteBackend
from nnsight.modeling.huggingface import _ID_CACHE
from nnsight.schema.request import RequestModel
from transformers import AutoConfig, AutoModelForCausalLM

from neurosig.neurons.backends import trace_neurons
from neurosig.neurons.config import TraceConfig
from neurosig.neurons.contributions import ActiveSets

PROMPTS, COMPLETIONS = [[5, 6, 7, 8, 9], [10, 11, 12], [5, 6, 7, 8, 9]], [[20, 21, 22], [30, 31], [40, 41]]
CONFIGS = [
    TraceConfig(set_size=20),
    TraceConfig(score="unembed", active="global", set_size=20, positive_only=True),
    TraceConfig(value="act", score="magnitude", active="per_token", set_size=6),
    TraceConfig(active="entries", set_size=30),
]

server = subprocess.Popen(
    [sys.executable, "-I", str(Path(__file__).with_name("server.py"))],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
)
payloads: list[int] = []


def over_a_file(backend: RemoteBackend, request: RequestModel, tracer: Any) -> dict[str, Any]:
    """Replaces the network: request and answer go through files."""
    assert server.stdin and server.stdout
    blob = backend._serialize(tracer)
    payloads.append(len(blob))
    sent, answer = folder / "request", folder / "answer"
    sent.write_bytes(blob)
    print(folder, sent, answer, sep="\t", file=server.stdin, flush=True)
    assert server.stdout.readline() == "done\n"
    saved: dict[str, Any] = torch.load(answer)
    assert set(saved) == {"result"}
    return saved


def assert_same(sets: ActiveSets, expected: ActiveSets) -> None:
    assert torch.equal(sets.neuron_ids, expected.neuron_ids)
    torch.testing.assert_close(sets.contributions, expected.contributions, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sets.hidden_states, expected.hidden_states, rtol=1e-4, atol=1e-5)


RemoteBackend.request = over_a_file  # type: ignore[method-assign]
for name in sys.argv[1:]:
    folder = Path(name)
    _ID_CACHE[name] = name  # else nnsight looks up the id's spelling on the hub
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.device("meta"):
        hollow = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval()
    for config in CONFIGS:
        here = trace_neurons(model, PROMPTS, COMPLETIONS, config)
        assert_same(trace_neurons(model, PROMPTS, COMPLETIONS, config, remote="local"), here)
        assert_same(trace_neurons(hollow, PROMPTS, COMPLETIONS, config, remote=True), here)
assert server.stdin
server.stdin.close()
server.wait(timeout=60)
assert len(payloads) == len(CONFIGS) * len(sys.argv[1:])
print("largest request", max(payloads))
