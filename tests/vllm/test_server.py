"""foldaway's server around vLLM's, with SmolLM2: what it answers, what it does under load, and how it ends."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import torch

from compress import artifact
from compress.sources import load
from deploy.cli import main
from exporters import ExportOptions, export
from tests.vllm.conftest import (
    NEW_TOKENS,
    PROMPTS,
    Server,
    greedy,
    logprobs,
    serving,
    text_tokens,
)

pytestmark = [pytest.mark.vllm, pytest.mark.model]


def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=300)


def complete(server: Server, prompt: Any, **options: Any) -> Any:
    name = client(server).models.list().data[0].id
    return client(server).completions.create(model=name, prompt=prompt, temperature=0, **options)


def same_as_transformers(folder: Path, server: Server, reference: Path) -> None:
    """Greedy tokens of five prompts, and the log-probabilities of a text."""
    loaded = load(str(reference))
    for prompt in PROMPTS:
        tokens = loaded.tokenizer(prompt)["input_ids"]
        body = {"return_token_ids": True, "ignore_eos": True}
        answer = complete(server, tokens, max_tokens=NEW_TOKENS, extra_body=body).choices[0]
        assert answer.token_ids == greedy(loaded.model, tokens, NEW_TOKENS), prompt
    text = text_tokens(loaded)
    scored = complete(server, text, max_tokens=1, echo=True, logprobs=0).choices[0].logprobs.token_logprobs
    differences = [abs(a - b) for a, b in zip(scored[1:], logprobs(loaded.model, text), strict=False)]
    assert len(differences) == len(text) - 1
    print(f"{folder.name}: worst difference of a log-probability {max(differences):.2g}")
    assert max(differences) < 1e-3


def ended_by_sigterm(server: Server) -> None:
    assert server.stop(signal.SIGTERM) == 0


def ended_by_a_crash_of_the_engine(server: Server) -> None:
    engine = next(each for each in server.family[1:] if "EngineCore" in " ".join([each.name(), *each.cmdline()]))
    engine.send_signal(signal.SIGKILL)
    assert server.process.wait(90) == 2
    server.stop()
    assert server.lines[-1].startswith("foldaway: vLLM ended by itself")
    assert "engine" in server.lines[-1].lower().partition("by itself")[2]


def ended_by_killing_foldaway(server: Server) -> None:
    server.process.kill()


@pytest.mark.parametrize(
    ("kind", "end"),
    [
        ("dense", ended_by_sigterm),
        ("ragged", ended_by_a_crash_of_the_engine),
        ("widths", ended_by_killing_foldaway),
    ],
)
def test_an_artifact_answers_as_in_transformers_and_leaves_no_process(
    kind: str, end: Callable[[Server], None], smollm2: Any
) -> None:
    with serving(smollm2(kind)) as server:
        same_as_transformers(smollm2(kind), server, smollm2(kind))
        family = server.family
        assert len(family) >= 3
        end(server)
        assert _gone(family)


def test_an_expanded_export_answers_as_the_folded_artifact(smollm2: Any, tmp_path: Path) -> None:
    loaded = load(str(smollm2("folded")))
    tokens = loaded.tokenizer("A few words to check on.", return_tensors="pt")["input_ids"]
    export(loaded, tmp_path / "expanded", to="vllm", options=ExportOptions(plugin=False), check_tokens=tokens)
    with serving(tmp_path / "expanded") as server:
        same_as_transformers(tmp_path / "expanded", server, smollm2("folded"))


def test_a_ragged_export_needs_no_flag_beside_the_plugin(smollm2: Any, tmp_path: Path) -> None:
    loaded = load(str(smollm2("ragged")))
    tokens = loaded.tokenizer("A few words to check on.", return_tensors="pt")["input_ids"]
    folder = export(loaded, tmp_path / "deci", to="vllm", check_tokens=tokens).path
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["DeciLMForCausalLM"]
    with serving(folder) as server:
        same_as_transformers(folder, server, smollm2("ragged"))


class TestUnderLoad:
    """One server of the folded model."""

    @pytest.fixture(scope="class")
    def server(self, smollm2: Any) -> Iterator[Server]:
        with serving(smollm2("folded"), "--served-model-name", "folded") as server:
            yield server

    def test_a_folded_artifact_answers_as_in_transformers(self, server: Server, smollm2: Any) -> None:
        same_as_transformers(smollm2("folded"), server, smollm2("folded"))

    def test_it_has_the_name_that_was_asked_for(self, server: Server) -> None:
        assert [model.id for model in client(server).models.list()] == ["folded"]

    def test_200_requests_at_16_in_flight_are_all_answered(self, server: Server) -> None:
        async def ask_all() -> list[int]:
            slots = asyncio.Semaphore(16)
            asker = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=300, max_retries=0)

            async def ask(number: int) -> int:
                async with slots:
                    messages = [{"role": "user", "content": f"Say something about the number {number}."}]
                    answer: Any = await asker.chat.completions.create(
                        model="folded", messages=messages, max_tokens=8, extra_body={"ignore_eos": True}
                    )
                    return answer.usage.completion_tokens

            async with asker:
                return await asyncio.gather(*(ask(number) for number in range(200)))

        assert asyncio.run(ask_all()) == [8] * 200

    def test_vllms_own_serving_benchmark_runs(self, server: Server, smollm2: Any, tmp_path: Path) -> None:
        from vllm.benchmarks.serve import add_cli_args
        from vllm.benchmarks.serve import main as run

        parser = argparse.ArgumentParser()
        add_cli_args(parser)
        given = ["--base-url", str(server.url), "--model", "folded", "--tokenizer", str(smollm2("folded"))]
        given += ["--dataset-name", "random", "--random-input-len", "16", "--random-output-len", "8"]
        given += ["--num-prompts", "8", "--max-concurrency", "4", "--disable-tqdm"]
        result = run(parser.parse_args(given))
        assert result["completed"] == 8
        assert result["output_throughput"] > 0

    def test_ctrl_c_lets_an_answer_finish_and_leaves_no_process(self, server: Server) -> None:
        family = server.family
        assert len(family) >= 3
        stream = client(server).completions.create(
            model="folded", prompt="One two three", max_tokens=64, stream=True, extra_body={"ignore_eos": True}
        )
        chunks = iter(stream)
        next(chunks)
        server.process.send_signal(signal.SIGINT)
        assert sum(1 for _ in chunks) > 30
        assert server.process.wait(90) == 0
        assert _gone(family)


def test_a_signal_while_it_loads_ends_it(smollm2: Any) -> None:
    server = Server(smollm2("dense"))
    deadline = time.monotonic() + 60
    while len(server.family) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    family = server.family
    assert server.stop(signal.SIGINT) == 0
    assert _gone(family)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--dtype", "float8"), "--dtype"),
        (("--dtype", "float32", "--tensor-parallel-size", "2"), "attention heads"),
        (("--no-such-flag",), "--no-such-flag"),
    ],
)
def test_what_vllm_refuses_is_told_in_one_line(flags: tuple[str, ...], words: str, smollm2: Any) -> None:
    server = Server(smollm2("dense"), flags=flags)
    assert server.process.wait(120) == 2
    server.stop()
    assert server.lines[-1].startswith("foldaway: vLLM did not start: ")
    assert words in server.lines[-1]
    log = Path(server.lines[-1].rpartition("its log is ")[2])
    assert log.read_text()
    log.unlink()


def test_a_delta_is_merged_and_served_under_its_name_behind_a_key(smollm2: Any, tmp_path: Path) -> None:
    base, tuned = str(smollm2("dense")), load(str(smollm2("dense")))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in tuned.model.named_parameters():
            if name.endswith("q_proj.weight"):
                parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
    artifact.write_model(tuned.model, tuned.tokenizer, tmp_path / "tuned")
    package, merged, key = (tmp_path / name for name in ("package", "merged", "key"))
    assert main(["delta", "pack", base, str(tmp_path / "tuned"), "--set", "p=0.5", "-o", str(package)]) == 0
    assert main(["delta", "apply", base, str(package), "-o", str(merged)]) == 0
    reference = load(str(merged))
    tokens = reference.tokenizer(PROMPTS[0])["input_ids"]
    expected = greedy(reference.model, tokens, 16)
    assert expected != greedy(load(base).model, tokens, 16)
    key.write_text("secret\n")
    with serving(base, "--delta", f"tuned={package}", "--api-key-file", str(key)) as server:
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        assert not any("secret" in " ".join(each.cmdline()) for each in server.family)
        asker = openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", timeout=300)
        assert [model.id for model in asker.models.list()] == ["tuned"]
        body = {"return_token_ids": True, "ignore_eos": True}
        answer: Any = asker.completions.create(
            model="tuned", prompt=tokens, temperature=0, max_tokens=16, extra_body=body
        )
        assert answer.choices[0].token_ids == expected


def _gone(family: list[psutil.Process], patience: float = 30) -> bool:
    """Whether every process of a server has ended."""
    _, alive = psutil.wait_procs(family, timeout=patience)
    for each in alive:
        each.kill()
    return not alive
