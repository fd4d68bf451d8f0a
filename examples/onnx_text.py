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

layers, _, width = session.get_inputs()[1].shape
h = c = np.zeros((layers, 1, width), np.float32)  # all that the student remembers
new = written = tokenizer.encode(prompt).ids
for _ in range(30):
    logits, h, c = session.run(None, {"input_ids": np.array([new]), "h": h, "c": c})
    new = [int(logits[0, -1].argmax())]
    written = written + new
print(tokenizer.decode(written))
