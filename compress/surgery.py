"""Permanent edits of a model: fewer neurons, attentions, FFNs or blocks, or fewer sets of weights.

Every edit ends in `settle`, the one place where what the model says of itself (config, class, numbers of its caches)
is made to agree with what it has.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel

from compress.arch import composite_of
from compress.decoder import Block, Decoder, Projection
from compress.errors import BudgetError, ConfigError, UnsupportedArchitecture
from compress.layout import layout_of
from compress.remote_code import (
    adapt,
    linears,
    make_plain,
    make_ragged,
    merge_adapters,
    number_caches,
    share_weights,
    submodule,
)


def clone(model: PreTrainedModel) -> PreTrainedModel:
    """Copy a model's structure and share its tensors: cutting the clone leaves the original as it is."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def without_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Copy a model's structure to the meta device, so that an edit can be tried on its shapes alone."""
    twins: dict[int, torch.Tensor] = {id(p): _on_meta(p) for p in model.parameters()}
    twins |= {id(buffer): torch.empty_like(buffer, device="meta") for buffer in model.buffers()}
    return copy.deepcopy(model, twins)


def _on_meta(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)


def keep_neurons(model: PreTrainedModel, kept: Mapping[int, torch.Tensor]) -> None:
    """Keep some hidden neurons of each FFN, in their order.

    Args:
        model: changed in place.
        kept: block index -> ascending neuron indices (K,), int64.

    Raises:
        BudgetError: a block would keep no neuron.
        UnsupportedArchitecture: widths would differ, which a vision-language model has no words for; or blocks share.
    """
    check_owns(model, "cutting neurons")
    decoder = Decoder(model)
    if len({len(kept[block.index]) if block.index in kept else block.width for block in decoder}) > 1:
        check_may_differ(model, "FFNs of different widths")
    for block in decoder:
        if block.index in kept:
            _keep_neurons(block, kept[block.index])
    settle(model)


def cut_ffn(model: PreTrainedModel, widths: Sequence[int]) -> None:
    """Cut every FFN to a width, keeping its first neurons: for shapes alone. Width 0 means that there is none."""
    keep_neurons(model, {b: torch.arange(width) for b, width in enumerate(widths) if width})


def _keep_neurons(block: Block, index: torch.Tensor) -> None:
    if not block.has_ffn:
        raise BudgetError(f"block {block.index} has no FFN any more; leave it out")
    if len(index) == 0:
        raise BudgetError(f"block {block.index} would keep no FFN neuron; lower the sparsity")
    if index.equal(torch.arange(block.width, device=index.device)):
        return
    for projection in block.ffn_in:
        projection.keep_outputs(index)
    block.ffn_out.keep_inputs(index)


def keep_heads(model: PreTrainedModel, kept: Mapping[int, torch.Tensor]) -> None:
    """Keep some query heads of each attention, as many of every KV group; keys and values stay.

    Where every query head has keys and values of its own (H = K), those go with it.

    Args:
        model: of a plain layout; changed in place.
        kept: block index -> query heads (X,), int64, those of one KV group after the other; of all blocks.

    Raises:
        ConfigError: KV groups or blocks would keep different numbers of heads.
        UnsupportedArchitecture: the config cannot say how many heads there are; or blocks share weights.

    Source: Minitron, table of the slices.
    """
    check_owns(model, "cutting heads")
    slice_heads(model, kept)
    settle(model)
    conform(model)
    check_words(model)


def slice_heads(model: PreTrainedModel, kept: Mapping[int, torch.Tensor]) -> None:
    """`keep_heads` for several edits in a row, which end in `settle` and `conform`."""
    decoder = Decoder(model)
    heads, groups, width = decoder.heads, decoder.kv_heads, decoder.head_dim
    counts = {len(index) for index in kept.values()}
    if sorted(kept) != list(range(len(decoder))) or len(counts) > 1:
        raise ConfigError("every block must keep as many heads: a config has one number for all")
    (count,) = counts
    alone = decoder.heads_are_alone
    for block in decoder:
        index = kept[block.index].to("cpu")
        if not alone and (count % groups or not (index // (heads // groups)).equal(_groups(count, groups))):
            raise ConfigError(f"block {block.index} must keep the same number of heads in each of {groups} KV groups")
        queries = channels_of(index, width)
        if len(block.attention_in) == 1:
            stacked = torch.arange(heads * width, block.attention_in[0].outputs)
            others = torch.cat([queries + part * heads * width for part in (1, 2)]) if alone else stacked
            block.attention_in[0].keep_outputs(torch.cat([queries, others]))
        else:
            for projection in block.attention_in if alone else block.attention_in[:1]:
                projection.keep_outputs(queries)
        block.attention_out.keep_inputs(queries)
    if decoder.arch.has_head_dim:
        decoder.config.head_dim = width
    decoder.config.num_attention_heads = count
    if alone:
        setattr(decoder.config, decoder.arch.num_key_value_heads, count)


def _groups(count: int, groups: int) -> torch.Tensor:
    """The KV group of each of so many query heads."""
    return torch.arange(groups).repeat_interleave(count // groups)


def channels_of(index: torch.Tensor, width: int) -> torch.Tensor:
    """The channels of some heads."""
    return (index[:, None] * width + torch.arange(width)).flatten()


def keep_channels(model: PreTrainedModel, index: torch.Tensor) -> None:
    """Keep some hidden channels, everywhere: in the embeddings, the head, every norm over them, and every linear.

    Heads stay as wide as they are. Where the embeddings are scaled by the square root of the number of channels
    (gemma3), the weights make up for the change.

    Args:
        model: of a plain layout; changed in place.
        index: hidden channels (X,), int64.

    Raises:
        UnsupportedArchitecture: the config cannot say how many channels there are beside the width of a head; a
            vision-language model, whose other towers write to these channels; or blocks share weights.

    Source: Minitron, table of the slices.
    """
    if composite_of(model.config) is not None:
        raise UnsupportedArchitecture(
            f"hidden channels of a {model.config.model_type} model cannot be cut: its image features have as many"
        )
    check_owns(model, "cutting hidden channels")
    slice_channels(model, index)
    settle(model)
    conform(model)
    check_words(model)


def slice_channels(model: PreTrainedModel, index: torch.Tensor) -> None:
    """`keep_channels` for several edits in a row, which end in `settle` and `conform`."""
    decoder = Decoder(model)
    arch, config, before = decoder.arch, decoder.config, decoder.config.hidden_size
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    tied = head.weight is embedding.weight
    scale = 1.0
    if hasattr(embedding, "embed_scale") and len(index) != before:
        roots = (
            torch.tensor([before**0.5, len(index) ** 0.5]).to(embedding.weight.dtype).double()
        )  # as stock rounds them
        scale = float(roots[0] / roots[1])
    for module in (embedding, *(submodule(model, path) for path in arch.position_embeddings)):
        _keep_columns(module, index, scale if module is embedding else 1.0)
    if tied:
        head.weight = embedding.weight
        head.in_features = len(index)
    else:
        Projection(head).keep_inputs(index)
    for block in decoder:
        for path in (*arch.attention_norms, *arch.ffn_norms):
            _keep_entries(submodule(block.module, path), index)
        for projection in (*block.attention_in, *block.ffn_in):
            projection.keep_inputs(index)
        for projection in (block.attention_out, block.ffn_out):
            projection.keep_outputs(index)
    final = submodule(model, arch.final_norm)
    _keep_entries(final, index)
    if tied and scale != 1.0:
        scale_norm(final, 1 / scale, arch.norm_offset)
    if arch.has_head_dim:
        config.head_dim = decoder.head_dim
    for key in arch.hidden_keys:
        setattr(config, key, len(index))


def _keep_columns(embedding: Any, index: torch.Tensor, scale: float) -> None:
    """Keep some columns of an embedding table."""
    old = embedding.weight
    kept = old.index_select(1, index.to(old.device))
    value = kept if scale == 1.0 else (kept.to(torch.promote_types(old.dtype, torch.float32)) * scale).to(old.dtype)
    embedding.weight = torch.nn.Parameter(value.detach(), requires_grad=old.requires_grad)
    embedding.embedding_dim = len(index)


def _keep_entries(norm: Any, index: torch.Tensor) -> None:
    """Keep some channels of a norm."""
    for name, old in list(norm.named_parameters(recurse=False)):
        kept = old.index_select(0, index.to(old.device)).detach()
        setattr(norm, name, torch.nn.Parameter(kept, requires_grad=old.requires_grad))
    if isinstance(norm, torch.nn.LayerNorm):
        norm.normalized_shape = (len(index),)


def scale_norm(norm: Any, factor: float | torch.Tensor, offset: float) -> None:
    """Scale what a norm multiplies with, which is its weight plus ``offset``; a bias stays."""
    old = norm.weight
    wide = old.to(torch.promote_types(old.dtype, torch.float32))
    value = ((wide + offset) * factor - offset).to(old.dtype)
    norm.weight = torch.nn.Parameter(value.detach(), requires_grad=old.requires_grad)


def check_words(model: PreTrainedModel) -> None:
    """Refuse sizes that the architecture's config does not take, such as channels that are no multiple of the heads.

    Raises:
        UnsupportedArchitecture: saying what is wrong.
    """
    try:
        Decoder(model).config.validate()
    except (StrictDataclassError, ValueError) as error:
        why = str(error).strip().splitlines()[-1].strip().removeprefix("ValueError: ")
        raise UnsupportedArchitecture(f"a {model.config.model_type} config cannot say these sizes: {why}") from error


def conform(model: PreTrainedModel) -> None:
    """Let every module say of itself what one that is built from the config says, and check that the shapes agree.

    Args:
        model: of a plain layout, cut and settled; changed in place.

    Raises:
        UnsupportedArchitecture: a model built from the config has other shapes.
    """
    with torch.device("meta"):
        twin = type(model)(copy.deepcopy(model.config))
    wanted = {name: tuple(each.shape) for name, each in twin.named_parameters(remove_duplicate=False)}
    for name, parameter in model.named_parameters():
        if tuple(parameter.shape) != wanted.get(name):
            raise UnsupportedArchitecture(
                f"a {model.config.model_type} config has no words for these sizes: {name} would be "
                f"{wanted.get(name)} in place of {tuple(parameter.shape)}"
            )
    modules: dict[str, Any] = dict(model.named_modules())
    for name, module in twin.named_modules():
        for key, value in vars(module).items():
            if type(value) in (int, float) and key in vars(modules[name]):
                setattr(modules[name], key, value)
        if "embed_scale" in module._buffers:  # of the scaled embeddings of gemma3
            scale: Any = modules[name].embed_scale
            modules[name].embed_scale = torch.full_like(scale, module.scalar_embed_scale)


def drop_attention(model: PreTrainedModel, blocks: Sequence[int]) -> None:
    """Remove whole attentions, with the norms that only they need. Blocks that are left with neither part go.

    Args:
        model: changed in place.
        blocks: indices of the blocks that lose their attention.

    Raises:
        BudgetError: no attention would be left.
        UnsupportedArchitecture: a vision-language model, which has no words for blocks without an attention; or blocks
            share weights.
    """
    check_may_differ(model, "removing attentions")
    decoder = Decoder(model)
    if not set(layout_of(model).attention_blocks) - set(blocks):
        raise BudgetError("no attention would be left; a model needs at least one")
    for block in decoder:
        if block.index in blocks and block.attention is not None:
            block.remove_attention()
    drop_blocks(model, empty_blocks(model))


def drop_ffn(model: PreTrainedModel, blocks: Sequence[int]) -> None:
    """Remove whole FFNs, with the norms that only they need. Blocks that are left with neither part go.

    Args:
        model: changed in place.
        blocks: indices of the blocks that lose their FFN.

    Raises:
        UnsupportedArchitecture: a vision-language model, which has no words for blocks without an FFN; or blocks share
            weights.
    """
    check_may_differ(model, "removing FFNs")
    for block in Decoder(model):
        if block.index in blocks and block.has_ffn:
            block.remove_ffn()
    drop_blocks(model, empty_blocks(model))


def empty_blocks(model: PreTrainedModel) -> list[int]:
    """Indices of the blocks that have neither an attention nor an FFN."""
    return [block.index for block in Decoder(model) if block.is_empty]


def drop_blocks(model: PreTrainedModel, blocks: Sequence[int]) -> None:
    """Remove whole blocks; the others close up.

    Args:
        model: changed in place.
        blocks: indices of the blocks to remove.

    Raises:
        BudgetError: no block with attention would be left.
    """
    decoder = Decoder(model)
    kept = [i for i in range(len(decoder)) if i not in set(blocks)]
    if not set(kept) & set(layout_of(model).attention_blocks):
        raise BudgetError(f"removing {len(blocks)} of {len(decoder)} blocks leaves none that attends")
    modules = [decoder.block_list[i] for i in kept]
    del decoder.block_list[:]
    decoder.block_list.extend(modules)
    for key in decoder.arch.per_block_keys:
        if getattr(decoder.config, key, None) is not None:
            setattr(decoder.config, key, [getattr(decoder.config, key)[i] for i in kept])
    settle(model)


def removable(
    model: PreTrainedModel, goes: int, blocks: Sequence[int] | None, protect: Sequence[int], sparsity: float
) -> frozenset[int]:
    """Check which blocks may go.

    Args:
        model: on any device.
        goes: how many are to go.
        blocks: that are to go; None where they will be chosen.
        protect: that stay; negative ones count from the end.
        sparsity: that was asked for, for messages.

    Returns:
        The protected ones, counted from the start.

    Raises:
        BudgetError: too many are protected, or none that attends would be left.
        ConfigError: a block that is not there, one that is to go and to stay, or another number than is to go.
    """
    count = len(Decoder(model))
    for name, named, low in (("blocks", blocks or (), 0), ("protect", protect, -count)):
        if wrong := [place for place in named if not low <= place < count]:
            raise ConfigError(f"{name}: there is no block {wrong[0]}; the model has blocks 0 to {count - 1}")
    protected = frozenset(place % count for place in protect)
    if blocks is not None:
        if len(blocks) != goes:
            raise ConfigError(
                f"blocks names {len(blocks)}, and sparsity {sparsity} of {count} blocks is {goes}: "
                "name as many, or change the sparsity"
            )
        if kept := protected.intersection(blocks):
            raise ConfigError(f"block {min(kept)} is among those to remove and among those to protect")
    attending = set(layout_of(model).attention_blocks)
    if not attending - set(blocks or ()):
        raise BudgetError("no block that attends would be left: leave one of those out")
    # One that attends stays, and where few do it may be one that is not protected.
    if count - len(protected | (attending if len(attending) == 1 else set())) < goes:
        raise BudgetError(
            f"sparsity {sparsity} removes {goes} of {count} blocks, and {len(protected)} are protected: "
            "protect fewer, or lower the sparsity"
        )
    return protected


def drop_some(model: PreTrainedModel, goes: int, blocks: Sequence[int] | None, protected: frozenset[int]) -> None:
    """Remove so many blocks, for shapes alone: those named, or the first that may go; one that attends stays."""
    attending = layout_of(model).attention_blocks
    stays = protected if protected & set(attending) else protected | {attending[-1]}
    drop_blocks(model, blocks or [block for block in range(len(Decoder(model))) if block not in stays][:goes])


def check_may_differ(model: PreTrainedModel, what: str) -> None:
    """Refuse, before anything is cut, what would leave unlike blocks in a model whose config cannot say so.

    Args:
        model: on any device; nothing but its config is looked at.
        what: makes blocks differ.

    Raises:
        UnsupportedArchitecture: a vision-language model, whose artifacts are stock ones; or blocks share weights.
    """
    if composite_of(model.config) is not None:
        raise UnsupportedArchitecture(
            f"{what} leaves blocks that differ, which a {model.config.model_type} model's config cannot say: take a "
            "method that removes whole blocks (such as fusegpt or sleb) or the same share of every FFN (wanda)"
        )
    check_owns(model, what)


def check_owns(model: PreTrainedModel, what: str) -> None:
    """Refuse, before anything is done, what changes the weights of single blocks where blocks share them.

    Args:
        model: on any device.
        what: changes weights.

    Raises:
        UnsupportedArchitecture: blocks share weights.
    """
    for i, block in enumerate(layout_of(model).blocks):
        if block.shares_with is not None:
            raise UnsupportedArchitecture(
                f"{what} would part blocks {block.shares_with} and {i}, which share one set of weights: do that first "
                "and share afterwards, or give each block its own (foldaway export --to hf --expand)"
            )


def check_may_share(model: PreTrainedModel) -> None:
    """Refuse, before anything is done, a model whose blocks cannot share weights.

    Args:
        model: on any device.

    Raises:
        ConfigError: its blocks lie on several devices.
        UnsupportedArchitecture: a vision-language model, whose config cannot say it.
    """
    if composite_of(model.config) is not None:
        raise UnsupportedArchitecture(
            f"a {model.config.model_type} model's config cannot say that blocks share weights: remove blocks (fusegpt, "
            "sleb), which it can"
        )
    if len({parameter.device for parameter in model.parameters()}) > 1:
        raise ConfigError("blocks that share must lie on one device: give --device cuda or cpu, or group=1")


def block_kinds(model: PreTrainedModel) -> list[tuple[object, ...]]:
    """What two blocks must have alike to share weights: the kind of attention, and every linear's shape and bias."""
    decoder = Decoder(model)
    types = getattr(decoder.config, "layer_types", None) or [None] * len(decoder)
    return [(types[block.index], *_linear_shapes(block)) for block in decoder]


def _linear_shapes(block: Block) -> list[tuple[object, ...]]:
    return [(path, tuple(module.weight.shape), module.bias is None) for path, module in linears(block.module)]


def share_blocks(
    model: PreTrainedModel,
    parents: Mapping[int, Sequence[int]],
    *,
    own_biases: bool = False,
    adapter_rank: int = 0,
    generator: torch.Generator | None = None,
) -> None:
    """Let blocks compute with the weights of another. Each keeps its norms, its place and its KV cache.

    Args:
        model: changed in place.
        parents: a block whose weights are used -> the other blocks that use them, before or behind it.
        own_biases: blocks keep the biases of their linears as well.
        adapter_rank: rank of a low-rank product, zero at first, that each of the others adds to every matrix; 0: none.
        generator: of the CPU, for the adapters.

    Raises:
        ConfigError: a block is named twice, shares already, or is not there.
        UnsupportedArchitecture: blocks of different kinds; or a vision-language model, whose config cannot say it.

    Source: FoldGPT, section "grouped parameter sharing".
    """
    check_may_share(model)
    decoder = Decoder(model)
    blocks, kinds = decoder.blocks, block_kinds(model)
    named = [block for parent, others in parents.items() for block in (parent, *others)]
    taken = {i for i, b in enumerate(layout_of(model).blocks) if b.shares_with is not None for i in (i, b.shares_with)}
    for block in named:
        if not 0 <= block < len(blocks) or named.count(block) > 1 or block in taken:
            raise ConfigError(f"block {block} cannot share: it is not there, shares already, or is named twice")
    for parent, others in parents.items():
        for other in others:
            if kinds[other] != kinds[parent]:
                raise UnsupportedArchitecture(
                    f"blocks {parent} and {other} cannot share weights: their attentions or the shapes of their "
                    "linears differ"
                )
    for parent, others in parents.items():
        for other in others:
            module = blocks[other].module
            share_weights(module, blocks[parent].module, own_biases=own_biases)
            if adapter_rank:
                adapt(module, adapter_rank)
                _draw_adapters(module, generator)
    settle(model)


def _draw_adapters(block: torch.nn.Module, generator: torch.Generator | None) -> None:
    """Fill the right factors by Kaiming's rule, as a LoRA has it; the left ones are zero."""
    for _, module in linears(block):
        right = module.lora_right
        if right.device.type != "meta":
            bound = right.shape[1] ** -0.5
            drawn = torch.empty(right.shape).uniform_(-bound, bound, generator=generator)
            module.lora_right = torch.nn.Parameter(drawn.to(right), requires_grad=right.requires_grad)


def expand(model: PreTrainedModel) -> None:
    """Give every block weights of its own, equal to those that it shared: it computes the same, and is larger.

    Args:
        model: changed in place.
    """
    layout = layout_of(model)
    for block, shape in zip(Decoder(model), layout.blocks, strict=True):
        if shape.shares_with is None:
            continue
        for _, module in linears(block.module):
            for name in ("weight", "bias"):
                old = getattr(module, name)
                if old is not None:
                    setattr(module, name, torch.nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad))
    settle(model)


def settle(model: PreTrainedModel) -> None:
    """Make config, class and cache numbers agree with the blocks that the model has now."""
    decoder = Decoder(model)
    _merge_lone_adapters(decoder)
    layout = layout_of(model)
    number_caches(decoder.block_list, decoder.arch.block_parts())
    decoder.config.num_hidden_layers = len(decoder)
    if width := max(block.intermediate_size for block in layout.blocks):  # 0: every FFN is gone, and the old one stays
        setattr(decoder.config, decoder.arch.ffn_width, width)
    for block in decoder:
        _tell_width(block)
    if layout.kind == "plain":
        make_plain(model)
    else:
        make_ragged(model, layout.block_configs(), decoder.arch.block_parts())


def _merge_lone_adapters(decoder: Decoder) -> None:
    """Where a block shares with none any more, what it added to the shared weights becomes part of its own."""
    shapes = layout_of(decoder.model).blocks
    owners = {shape.shares_with for shape in shapes}
    for block, shape in zip(decoder, shapes, strict=True):
        if shape.adapter_rank and shape.shares_with is None and block.index not in owners:
            merge_adapters(block.module)


def _tell_width(block: Block) -> None:
    """Some FFN modules repeat their width in an attribute."""
    for module in block.ffn_modules:
        if hasattr(module, "intermediate_size"):
            setattr(module, "intermediate_size", block.width)  # noqa: B010  (not a submodule, as types have it)
