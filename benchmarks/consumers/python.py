"""Consumers of an ONNX export in Python: a script of their own each, and where versions collide an environment too."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.consumers.base import ENVIRONMENTS, Measured, last_line
from benchmarks.scoring import language_model, logits_scorer
from compress.errors import BackendError, require
from exporters.onnx_session import MODEL_FILE, OnnxSession, graph_of, load_tokenizer

HERE = Path(__file__).resolve().parent
RUN_SECONDS, INSTALL_SECONDS = 900.0, 3600.0
STAMP = "installed.json"
TASK = HERE / "capitals.yaml"
LOGLIKELIHOOD_NATS = 1e-2
"""How far lm-eval's log-likelihoods may be from ours in fp32; where weights are rounded, they are only measured."""

VERSIONS = """
import importlib.metadata, json, sys
print(json.dumps({name: importlib.metadata.version(name) for name in sys.argv[1:]}))
"""


@dataclass(frozen=True)
class InOurEnvironment:
    """A consumer whose packages are those of our extras.

    Attributes:
        script: a file beside this one, which imports nothing of foldaway.
        packages: what it is made of.
    """

    script: str
    packages: tuple[str, ...]

    @property
    def python(self) -> Path:
        """The interpreter that it runs in."""
        return Path(sys.executable)

    def prepare(self) -> None:
        """Nothing to build: see that the packages are there."""
        self.versions()

    def versions(self) -> dict[str, str]:
        """Versions of its packages."""
        found = last_line([str(self.python), "-I", "-c", VERSIONS, *self.packages], RUN_SECONDS)
        return {str(name): str(version) for name, version in found.items()}

    def run(self, export: Path, prompt: str, new_tokens: int) -> str:
        """The text that it generates."""
        return str(self.answer(export, graph_of(export) or MODEL_FILE, prompt, new_tokens)["text"])

    def answer(self, export: Path, second: str, prompt: str, new_tokens: int) -> dict[str, Any]:
        """Everything that its script says; `second` is the script's second argument."""
        command = [str(self.python), "-I", str(HERE / self.script), str(export.resolve()), second]
        answer: dict[str, Any] = last_line([*command, prompt, str(new_tokens)], RUN_SECONDS)
        return answer


@dataclass(frozen=True)
class InItsOwn(InOurEnvironment):
    """A consumer whose packages collide with ours.

    Attributes:
        folder: of its environment.
        pins: what is installed there. What they need in turn comes as pip finds it.
        torch: the release of torch, which is installed first.
    """

    folder: Path
    pins: tuple[str, ...]
    torch: str

    @property
    def python(self) -> Path:
        """The interpreter of its environment."""
        return self.folder / "bin" / "python"

    def prepare(self, torch_index: str | None = None) -> None:
        """Make the environment, once.

        Args:
            torch_index: where torch alone comes from; None for the index that pip is set up with.

        Raises:
            BackendError: an install failed.
        """
        stamp, wanted = self.folder / STAMP, json.dumps([self.torch, *self.pins])
        if stamp.is_file() and stamp.read_text("utf-8") == wanted:
            return
        _call([sys.executable, "-m", "venv", "--clear", str(self.folder)])
        install = [str(self.python), "-m", "pip", "install"]
        # As `make install` does: the CPU build from an index of its own comes without what that index may lack.
        _call([*install, *(["--no-deps", "--index-url", torch_index] if torch_index else []), self.torch])
        _call([*install, self.torch, *self.pins])
        stamp.write_text(wanted, "utf-8")

    def versions(self) -> dict[str, str]:
        """Versions of its packages.

        Raises:
            BackendError: there is no environment yet.
        """
        if not (self.folder / STAMP).is_file():
            raise BackendError("its environment is missing: `make test-consumers` builds it")
        return super().versions()


@dataclass(frozen=True)
class LmEval(InOurEnvironment):
    """lm-eval over its onnxruntime-genai backend, which is also asked the questions of capitals.yaml."""

    def run(self, export: Path, prompt: str, new_tokens: int) -> str:
        """The text that a task of lm-eval gets."""
        return str(self.answer(export, str(TASK), prompt, new_tokens)["text"])

    def measure(self, export: Path, prompt: str, new_tokens: int, dtype: str) -> Measured:
        """The text, the score on the questions, ``acc``, and how far log-likelihoods are from ours, ``worst_nats``."""
        found = self.answer(export, str(TASK), prompt, new_tokens)
        theirs = [answer["loglikelihood"] for answer in found["answers"]]
        ours = loglikelihoods(export, [(answer["context"], answer["continuation"]) for answer in found["answers"]])
        worst = max(abs(our - their) for our, their in zip(ours, theirs, strict=True))
        far = dtype == "fp32" and not worst <= LOGLIKELIHOOD_NATS
        wrong = f"log-likelihoods {worst:.2g} nats from ours" if far else None
        return Measured(str(found["text"]), {"acc": float(found["acc"]), "worst_nats": worst}, wrong)


def loglikelihoods(export: Path, pairs: list[tuple[str, str]]) -> list[float]:
    """What our own session says of continuations, in nats."""
    session, tokenizer = OnnxSession(export, threads=1), load_tokenizer(export)
    adapter = language_model(logits_scorer(session.logits), tokenizer, session.context_length)
    instance = require("lm_eval.api.instance", "eval").Instance
    asked = [instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    return [float(answer[0]) for answer in adapter.loglikelihood(asked)]


def _call(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=INSTALL_SECONDS)
    except subprocess.CalledProcessError as error:
        said = (str(error.stderr).strip().splitlines() or ["it failed"])[-1]
        raise BackendError(f"{' '.join(command[1:4])}: {said}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BackendError(f"{' '.join(command[1:4])}: {error}") from error


ONNXRUNTIME = InOurEnvironment("run_onnxruntime.py", ("onnxruntime", "tokenizers"))
GENAI = InOurEnvironment("run_genai.py", ("onnxruntime-genai", "onnxruntime"))
LM_EVAL = LmEval("run_lm_eval.py", ("lm_eval", "onnxruntime-genai", "transformers"))
OPTIMUM = InItsOwn(
    "run_optimum.py",
    ("optimum", "optimum-onnx", "transformers", "onnxruntime", "torch"),
    folder=ENVIRONMENTS / "optimum",
    pins=("transformers==4.57.6", "optimum==2.1.0", "optimum-onnx==0.1.0", "onnxruntime==1.31.1"),
    torch="torch==2.13.0",
)
