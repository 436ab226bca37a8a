"""A user of lm-eval: ask an export questions through the onnxruntime-genai backend, and let it continue a prompt.

``python run_lm_eval.py FOLDER TASK PROMPT NEW_TOKENS``; the last line of stdout is JSON. TASK is a YAML file of
multiple-choice questions. It stands alone: what it knows of a folder is what its files say.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lm_eval
from datasets import Dataset
from lm_eval.tasks import TaskManager


def main(folder: str, task: Path, prompt: str, new_tokens: int) -> None:
    """One evaluation of two tasks: the questions, and a single prompt to continue."""
    manager = TaskManager(include_path=str(task.parent), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model="onnxruntime-genai",
        model_args={"pretrained": folder},
        tasks=[task.stem, _continuation(prompt, new_tokens)],
        task_manager=manager,
        bootstrap_iters=0,
        log_samples=True,
    )
    samples = found["samples"]
    answers = [
        {"context": asked[0], "continuation": asked[1], "loglikelihood": float(answer[0][0])}
        for sample in samples[task.stem]
        for asked, answer in zip(sample["arguments"], sample["resps"], strict=True)
    ]
    result = {
        "text": samples["continuation"][0]["resps"][0][0],
        "acc": float(found["results"][task.stem]["acc,none"]),
        "answers": answers,
    }
    sys.stdout.write(json.dumps(result) + "\n")


def _continuation(prompt: str, new_tokens: int) -> dict[str, Any]:
    """A task that asks for text."""
    return {
        "task": "continuation",
        "custom_dataset": lambda **_: {"test": Dataset.from_list([{"prompt": prompt}])},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "prompt",
        "doc_to_target": "prompt",
        "generation_kwargs": {"until": [], "max_gen_toks": new_tokens, "do_sample": False},
        "metric_list": [{"metric": "bypass", "aggregation": "bypass", "higher_is_better": True}],
    }


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
