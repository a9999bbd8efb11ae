"""Packed documents: each one's logits must be what it gives alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from equilibrium_mcore.certify.compare import Verdict
from equilibrium_mcore.certify.tokens import MadeUpTokens
from equilibrium_mcore.config.load import run_from_mapping
from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.parallel import process_groups
from equilibrium_mcore.parallel.launch import Place
from equilibrium_mcore.training.setup import build_chunks

# Borders inside a chunk of the scan, at its end, and across several chunks; each divides among
# ranks.
LENGTHS = (24, 8, 40, 16)
# Sums over one document are the same sums; only the order within a chunk of the scan differs.
TOLERANCE = 1e-4


def compare_packing(
    config: RunConfig,
    run_ranks: Callable[[Callable[[Place], None], int], None],
    folder: Path,
    *,
    prepare: Callable[[], None] | None,
) -> list[Verdict]:
    """Packed against unpacked documents in the layout of `config`, without pipeline and context.

    Under context parallelism megatron-core's packing needs Transformer Engine; the certificate says
    so.
    """
    values = config.model_dump(mode="json")
    layout = values["parallelism"]
    layout.update(pipeline=1, virtual_pipeline=1, context=1)
    world_size = max(layout["tensor"], layout["expert"] * layout["expert_tensor"])
    layout["world_size"] = world_size
    values["training"]["global_batch_size"] = world_size
    alone = run_from_mapping(values)
    folder.mkdir(parents=True, exist_ok=True)
    run_ranks(partial(_packed, config=alone, folder=folder, prepare=prepare), world_size)
    worst, where = 0.0, "every document"
    for rank in range(world_size):
        for document, difference in torch.load(folder / f"rank_{rank}.pt").items():
            if not difference <= worst:
                worst, where = difference, document
    return [Verdict("packed documents against each alone", worst, TOLERANCE, where)]


def _packed(
    place: Place, *, config: RunConfig, folder: Path, prepare: Callable[[], None] | None
) -> None:
    if prepare is not None:
        prepare()
    process_groups.initialize_distributed(
        rank=place.rank,
        world_size=place.world_size,
        local_rank=place.local_rank,
        timeout_minutes=config.parallelism.timeout_minutes,
        init_method=place.init_method,
    )
    groups = process_groups.initialize_groups(config.parallelism)
    process_groups.seed_everything(config.training.seed)
    _, (chunk,) = build_chunks(config, groups)
    source = MadeUpTokens(
        samples=len(LENGTHS),
        sequence_length=max(LENGTHS),
        vocab_size=config.model.vocab_size,
        seed=config.training.seed,
    )
    documents = [source[i]["tokens"][:length] for i, length in enumerate(LENGTHS)]
    together = _logits(chunk, documents).split(LENGTHS)
    differences = {}
    for index, (packed, tokens) in enumerate(zip(together, documents, strict=True)):
        alone = _logits(chunk, [tokens])
        difference = ((packed - alone).norm() / alone.norm()).item()
        differences[f"document {index} ({len(tokens)} tokens)"] = difference
    torch.save(differences, folder / f"rank_{place.rank}.pt")
    torch.distributed.barrier()
    process_groups.destroy()


@torch.no_grad()
def _logits(chunk: torch.nn.Module, documents: list[Tensor]) -> Tensor:
    """(tokens, this rank's part of the vocabulary), of documents packed one behind the other."""
    lengths = [len(tokens) for tokens in documents]
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        total_tokens=sum(lengths),
    )
    positions = torch.cat([torch.arange(length) for length in lengths])
    chunk.eval()
    return chunk(
        input_ids=torch.cat(documents).unsqueeze(0),
        position_ids=positions.unsqueeze(0),
        attention_mask=None,
        packed_seq_params=packed,
    )[0]
