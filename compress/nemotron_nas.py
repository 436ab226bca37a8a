"""The config of a ragged model in the words that vLLM has for one: the module that such an export carries.

vLLM runs NVIDIA's Nemotron-NAS models (``DeciLMForCausalLM``), Llamas whose blocks differ: an FFN of another width, or
no attention, or no FFN. It ships no class for their config, and reads ``block_configs`` as objects with attributes. A
folder that names this module in ``auto_map`` needs ``--trust-remote-code``; where foldaway is installed beside vLLM its
plugin knows the class, and nothing is needed. It depends on transformers only.
"""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig

MODEL_TYPE = "nemotron-nas"
CODE = "foldaway_nemotron_nas.py"
"""The name that this module has in an exported folder."""


class Entry(dict[str, Any]):
    """A JSON object whose keys are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def entries(blocks: Any) -> list[Entry]:
    """Block configs as they stand in JSON, with attributes."""
    return [Entry({part: Entry(of) if isinstance(of, dict) else of for part, of in block.items()}) for block in blocks]


class NemotronNasConfig(LlamaConfig):
    """A Llama's config with one entry per block.

    ``{"attention": {"no_op", "n_heads_in_group"}, "ffn": {"no_op", "intermediate_size"}}``, where ``n_heads_in_group``
    is how many query heads share a KV head.
    """

    model_type = MODEL_TYPE
    block_configs: list[Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        self.block_configs = entries(self.block_configs or [])
