"""A student without torch: onnxruntime and tokenizers alone.

python -m distill.export runs/quickstart --to onnx
python examples/onnx_text.py runs/quickstart/student "In 1969,"
"""

import sys

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

folder, prompt = sys.argv[1:]
tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
session = onnxruntime.InferenceSession(f"{folder}/model.onnx")

_, *parts = session.get_inputs()  # h and c of an LSTM, h of a GRU: all that the student remembers
state = {part.name: np.zeros((part.shape[0], 1, part.shape[2]), np.float32) for part in parts}
new = written = tokenizer.encode(prompt).ids
for _ in range(30):
    logits, *after = session.run(None, {"input_ids": np.array([new]), **state})
    state = dict(zip(state, after, strict=True))
    new = [int(logits[0, -1].argmax())]
    written = written + new
print(tokenizer.decode(written))
