"""Packed documents: each one's logits must be what it gives alone, by the plain path."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from equilibrium_mcore.certify.float64 import in_float64
from equilibrium_mcore.certify.tokens import MadeUpTokens
from equilibrium_mcore.certify.verdict import Verdict, worst_verdict
from equilibrium_mcore.config.layout import expert_parallel_size, model_parallel_size
from equilibrium_mcore.config.load import run_from_mapping
from equilibrium_mcore.config.schema import ParallelismConfig, RunConfig
from equilibrium_mcore.files.errors import naming
from equilibrium_mcore.models.packing import packed_documents, rank_tokens
from equilibrium_mcore.parallel import process_groups
from equilibrium_mcore.parallel.launch import RankInfo
from equilibrium_mcore.training.setup import build_chunks

# Borders inside a chunk of the scan, at its end, and across several chunks; multiplied so that each
# divides among ranks.
LENGTHS = (12, 4, 20, 8)
# Sums over one document are the same sums; only the order within a chunk of the scan differs.
TOLERANCE = 1e-9


def compare_packing(
    config: RunConfig,
    run_ranks: Callable[[Callable[[RankInfo], None], int], None],
    folder: Path,
    *,
    prepare: Callable[[], None] | None,
) -> list[Verdict]:
    """Packed against unpacked documents in the layout of `config`, without its pipeline."""
    values = config.model_dump(mode="json")
    layout = values["parallelism"]
    layout.update(pipeline=1, virtual_pipeline=1)
    parallelism = ParallelismConfig(**layout)
    dense = model_parallel_size(parallelism)
    world_size = max(dense, expert_parallel_size(parallelism))
    layout["world_size"] = world_size
    values["training"].update(micro_batch_size=1, global_batch_size=2 * world_size // dense)
    alone = run_from_mapping(values)
    folder.mkdir(parents=True, exist_ok=True)
    run_ranks(partial(_packed, config=alone, folder=folder, prepare=prepare), world_size)
    ranks = [torch.load(folder / f"rank_{rank}.pt") for rank in range(world_size)]
    differences = {document: max(rank[document] for rank in ranks) for document in ranks[0]}
    return [worst_verdict("packed documents against each alone", differences, TOLERANCE)]


def _packed(
    rank_info: RankInfo, *, config: RunConfig, folder: Path, prepare: Callable[[], None] | None
) -> None:
    if prepare is not None:
        prepare()
    with in_float64():
        differences = _differences(rank_info, config)
    with naming(folder / f"rank_{rank_info.rank}.pt"):
        torch.save(differences, folder / f"rank_{rank_info.rank}.pt")


def _differences(rank_info: RankInfo, config: RunConfig) -> dict[str, float]:
    """How far each document's logits are off in the pack, by document. Collective."""
    layout = config.parallelism
    groups = process_groups.join(rank_info, layout, seed=config.training.seed)
    _, (chunk,) = build_chunks(config, groups)
    # 2 * CP chunks of a document, of which TP ranks take equal parts under sequence parallelism.
    multiple = max(2, layout.context * layout.tensor // 2)
    lengths = torch.tensor(LENGTHS) * multiple
    source = MadeUpTokens(
        samples=len(lengths),
        sequence_length=int(lengths.max()),
        vocab_size=config.model.vocab_size,
        seed=config.training.seed,
    )
    documents = [source[i]["tokens"][:length] for i, length in enumerate(lengths)]
    # A rank's tokens of the pack are its tokens of each document, one after the other.
    together = _packed_logits(chunk, documents, groups.cp)
    parts = together.split((lengths // layout.context).tolist())
    differences = {}
    for index, (packed, tokens) in enumerate(zip(parts, documents, strict=True)):
        alone = _plain_logits(chunk, tokens, groups.cp)
        difference = ((packed - alone).norm() / alone.norm()).item()
        differences[f"document {index} ({len(tokens)} tokens)"] = difference
    torch.distributed.barrier()
    process_groups.destroy()
    return differences


@torch.no_grad()
def _packed_logits(
    chunk: torch.nn.Module, documents: list[Tensor], cp: torch.distributed.ProcessGroup
) -> Tensor:
    """(tokens of this rank, its part of the vocabulary), of documents one after the other."""
    lengths = torch.tensor([len(tokens) for tokens in documents])
    mine = rank_tokens(lengths, cp_size=cp.size(), cp_rank=cp.rank())
    positions = torch.cat([torch.arange(len(tokens)) for tokens in documents])
    chunk.eval()
    return chunk(
        input_ids=torch.cat(documents)[mine].unsqueeze(0),
        position_ids=positions[mine].unsqueeze(0),
        attention_mask=None,
        packed_seq_params=packed_documents(lengths, cp_size=cp.size()),
    )[0]


@torch.no_grad()
def _plain_logits(
    chunk: torch.nn.Module, tokens: Tensor, cp: torch.distributed.ProcessGroup
) -> Tensor:
    """The same of one document as a plain sequence, by megatron-core's own cut."""
    batch = get_batch_on_this_cp_rank(
        {
            "tokens": tokens.unsqueeze(0),
            "position_ids": torch.arange(len(tokens)).unsqueeze(0),
            "cu_seqlens": None,
        },
        is_hybrid_cp=False,
        cp_group=cp,
    )
    chunk.eval()
    return chunk(
        input_ids=batch["tokens"], position_ids=batch["position_ids"], attention_mask=None
    )[0]
