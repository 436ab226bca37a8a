"""Do the runtimes that people use open our ONNX exports, and generate the same text?

``python -m benchmarks.consumers EXPORT...`` asks them all. Each is asked from outside, by a small program of its own
that imports nothing of foldaway.
"""

from __future__ import annotations

from benchmarks.consumers import javascript, python
from benchmarks.consumers.base import Consumer

CONSUMERS: dict[str, Consumer] = {
    "onnxruntime": python.ONNXRUNTIME,
    "onnxruntime-genai": python.GENAI,
    "optimum": python.OPTIMUM,
    "lm-eval": python.LM_EVAL,
    "transformers.js-node": javascript.NODE,
    "transformers.js-chromium": javascript.CHROMIUM,
}
"""name -> what runs it, in the order of tables."""
