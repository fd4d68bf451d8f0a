"""Greedy decoding of a GGUF file by llama.cpp, in an environment of its own.

    .venv-llama/bin/python benchmarks/llama.py FILE THREADS

Prints one JSON object; `benchmarks/decode.py` runs it.
"""

import importlib.metadata
import json
import statistics
import sys
import time

TOKENS, REPEATS = 128, 5


def main() -> None:
    from llama_cpp import Llama

    model = Llama(sys.argv[1], n_ctx=512, n_threads=int(sys.argv[2]), n_threads_batch=int(sys.argv[2]), verbose=False)
    rates = []
    for _ in range(REPEATS + 1):
        model.reset()
        prompt = model.tokenize(b"The history of the city", add_bos=False)
        marks = []
        for _ in model.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0):
            marks.append(time.perf_counter())
            if len(marks) > TOKENS:
                break
        rates.append(TOKENS / (marks[-1] - marks[0]))
    version = importlib.metadata.version("llama_cpp_python")
    print(json.dumps({"tokens_per_second": statistics.median(rates[1:]), "version": version}))


if __name__ == "__main__":
    main()
