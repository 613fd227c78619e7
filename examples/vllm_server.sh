#!/bin/sh
# vLLM's OpenAI server with lmcache-core: examples/vllm_server.sh MODEL [CONFIG]
# On a CPU, pin the cores: vLLM uses another number of them with a connector than without.
set -eu
model=$1
config=${2:-examples/lmcache.yaml}
transfer=$(lmcachectl engine-args vllm --config "$config" --json |
    python -c 'import json, sys; print(json.dumps(json.load(sys.stdin)["kv_transfer_config"]))')
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
exec python -m vllm.entrypoints.openai.api_server --model "$model" --enforce-eager --kv-transfer-config "$transfer"
