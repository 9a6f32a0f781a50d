"""`pvae::wide_attention`: attention with heads wider than flash kernels take, such as a VAE's one head of 384 or 512 channels.

    O = softmax(scale * Q K^T) V

Block by block of queries and keys: S = Q K^T in fp32 by the matrix library, its weights P in half precision by one kernel,
written over S, and O += P V in fp32 by the library again. A row's maximum m and sum l are carried from block to block of
keys, as flash attention does within its kernel:

    m' = max(m, max S)    P = exp(S - m')    l' = l exp(m - m') + sum P    O' = O exp(m - m') + P V    at last O / l

so P is rounded once, where flash rounds it. Blocks are large: of ones that stay in the L2 cache the device is done before the
host has launched the next (6240 tokens of 384 channels on H200, six blocks of 32 MiB: 1.24 ms launched by the host, 0.23
replayed as a graph; one block replayed 0.19).

Source: flash attention (Dao et al., 2022), with its inner products left to the library: an accumulator of 512 channels
leaves a kernel no registers to hide anything behind, and torch runs its memory-efficient kernel instead.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pvae.kernels.channel_norm_launch import Step
from pvae.kernels.norm_config import next_power_of_2
from pvae.kernels.norm_launch import device_refusal
from pvae.kernels.norm_op import functional_op
from pvae.kernels.triton_launch import on_device

HALVES = (torch.float16, torch.bfloat16)
WIDEST_FLASH = 256  # channels of a head; flash attention takes no more
FEW_SCORES = 2**20  # with fewer, one launch of SDPA is over sooner than several of ours
SCORE_BYTES = 256 * 2**20  # of a block of scores: large enough that a launch takes longer than the host needs for it
ROWS = 8192  # of a block at most, if there are as many keys
MOST_COLUMNS = 16384  # of a block: a row is held in one program's registers
TILE = 128  # blocks are multiples of a matrix product's tile


@dataclass(frozen=True)
class Block:
    """What is computed at a time: scores [entries, rows, columns] of entries of the batch, queries and keys."""

    entries: int
    rows: int
    columns: int


def block_of(batches: int, queries: int, keys: int, score_bytes: int = SCORE_BYTES, rows: int = ROWS) -> Block:
    """About `rows` queries (more of few keys, of several entries where one has fewer), and what keys `score_bytes` hold."""
    scores = score_bytes // 4
    most = max(rows, scores // keys)
    rows = _even(queries, max(1, round(queries / most)))
    entries = -(-batches // -(-batches // min(batches, max(1, most // rows))))
    columns = max(TILE, min(MOST_COLUMNS, scores // (entries * rows)) // TILE * TILE)
    return Block(entries, rows, _even(keys, -(-keys // columns)))


def _even(size: int, parts: int) -> int:
    """What each of so many parts has, in whole tiles; the last may have less."""
    return min(size, _round_up(-(-size // parts), TILE))


def _round_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def supports(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why these are no case for the op on any device, or None. Takes fake tensors; of sizes it looks at the channels only."""
    if q.dtype not in HALVES:
        return f"{q.dtype} is not fp16 or bf16"
    for name, x in (("keys", k), ("values", v)):
        if x.dtype != q.dtype:
            return f"the queries are {q.dtype}, the {name} {x.dtype}"
    if q.shape[-1] <= WIDEST_FLASH:
        return f"{q.shape[-1]} channels a head: flash attention takes it"
    return None


def scores_of(q: Tensor, k: Tensor) -> int:
    """How many scores there are in all."""
    return math.prod(q.shape[:-1]) * k.shape[-2]


def refusal(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why this call runs in the reference, or None: `supports`, the device, and how much there is to do."""
    if reason := supports(q, k, v) or device_refusal(q.device.type):
        return reason
    if q.device.type not in ("cuda", "cpu"):  # the CPU is Triton's interpreter
        return f"no product of {q.dtype} with an fp32 result on {q.device.type}"
    if scores_of(q, k) < FEW_SCORES:
        return f"{scores_of(q, k)} scores: SDPA's one launch is cheaper below {FEW_SCORES}"
    return None


@functional_op(fake=lambda q, k, v, scale: q.new_empty([*q.shape[:-1], v.shape[-1]]))
def wide_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q [..., L, E], k [..., S, E], v [..., S, F] -> [..., L, F], contiguous. No mask.

    Whatever matrices a matrix product reads without a copy may be given: rows, or columns, some way apart. fp16 and bf16 of
    more than 256 channels on a GPU; everything else runs in the reference. Raises ValueError where shapes do not go together.
    """
    if q.shape[:-2] != k.shape[:-2] or q.shape[-1] != k.shape[-1] or k.shape[:-1] != v.shape[:-1] or q.dim() < 2:
        raise ValueError(
            f"wide_attention: queries {list(q.shape)}, keys {list(k.shape)} and values {list(v.shape)} do not go together"
        )
    if refusal(q, k, v) is not None:
        return reference(q, k, v, scale).contiguous()
    query, key, val = (x.reshape(-1, *x.shape[-2:]) for x in (q, k, v))
    block = block_of(query.shape[0], query.shape[1], key.shape[1])
    return on_device(q.device, attend, query, key, val, scale, block).view(*q.shape[:-1], v.shape[-1])


OP = wide_attention


def reference(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The semantics, in torch's own op."""
    return functional.scaled_dot_product_attention(q, k, v, scale=scale)


Weigh = Callable[[Tensor, int, torch.dtype, Tensor, Tensor, Tensor, float, bool], None]


def weigh_reference(
    scores: Tensor, keys: int, dtype: torch.dtype, peak: Tensor, total: Tensor, mixed: Tensor, scale: float, first: bool
) -> None:
    """The step between the products in plain torch: what `weigh_kernel` does.

    scores [..., W] fp32 of which `keys` columns count become weights of `dtype`, in the first half of their row. peak and
    total [...] are m (times log2 e) and l of the keys before, mixed [..., F] their O; all are brought up to date, and
    written anew if `first`.
    """
    x = scores[..., :keys] * (scale * math.log2(math.e))
    top = x.amax(-1) if first else torch.maximum(peak, x.amax(-1))
    weights = torch.exp2(x - top.unsqueeze(-1))
    summed = weights.sum(-1)
    if not first:
        kept = torch.exp2(peak - top)
        mixed.mul_(kept.unsqueeze(-1))
        summed += kept * total
    peak.copy_(top)
    total.copy_(summed)
    scores.view(dtype)[..., :keys] = weights.to(dtype)


def weigh(
    scores: Tensor, keys: int, dtype: torch.dtype, peak: Tensor, total: Tensor, mixed: Tensor, scale: float, first: bool
) -> None:
    """`weigh_reference` by the kernel; all tensors contiguous, W a multiple of 16."""
    step = _step(scores.device, dtype, peak.numel(), scores.shape[-1], keys, mixed.shape[-1], scale, first)
    step.launch({"scores": scores, "weights": scores.view(dtype), "peak": peak, "total": total, "mixed": mixed})


@functools.lru_cache(maxsize=4096)
def _step(
    device: torch.device, dtype: torch.dtype, rows: int, width: int, keys: int, channels: int, scale: float, first: bool
) -> Step:
    """One for each device and dtype: a Step keeps what Triton compiled for it."""
    lanes = torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32
    return weigh_step(rows, width, keys, channels, scale, first, lanes)


def weigh_step(rows: int, width: int, keys: int, channels: int, scale: float, first: bool, lanes: int) -> Step:
    """The launch for so many rows of `width` scores, of which `keys` count, on a device with warps of `lanes` threads."""
    block = next_power_of_2(width)
    constants = {
        "FIRST": first,
        "BLOCK": block,
        "CHANNELS": next_power_of_2(channels),
    }
    return Step(
        "wide_attention_kernel.weigh_kernel",
        (rows, 1, 1),
        ("scores", "weights", "peak", "total", "mixed"),
        (width, _round_up(keys, 16), keys, channels),
        (scale * math.log2(math.e),),
        constants,
        warps=min(16, max(1, block // (16 * lanes))),  # 16 values a thread
    )


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, block: Block, weigh: Weigh = weigh) -> Tensor:
    """q [B, L, E], k [B, S, E], v [B, S, F] -> [B, L, F], block by block.

    Needs the memory of one block of scores, and of the fp32 results of its queries.
    """
    (batches, queries, _), (keys, channels) = q.shape, v.shape[1:]
    y = q.new_empty(batches, queries, channels)
    width = _round_up(block.columns, 16)
    most = block.entries * block.rows
    score_memory, mixed_memory, peaks, totals = (
        torch.empty(most * size, dtype=torch.float32, device=q.device) for size in (width, channels, 1, 1)
    )
    for b in range(0, batches, block.entries):
        entries = slice(b, b + block.entries)
        for i in range(0, queries, block.rows):
            query, out = (x[entries, i : i + block.rows] for x in (q, y))
            rows = out.shape[:2].numel()
            scores = score_memory[: rows * width].view(*out.shape[:2], width)
            mixed = mixed_memory[: rows * channels].view(out.shape)
            peak, total = (x[:rows].view(out.shape[:2]) for x in (peaks, totals))
            for j in range(0, keys, block.columns):
                key, val = (x[entries, j : j + block.columns] for x in (k, v))
                count = key.shape[1]
                _multiply(query, key.mT, scores[..., :count], add=False)
                weigh(scores, count, q.dtype, peak, total, mixed, scale, j == 0)
                _multiply(scores.view(q.dtype)[..., :count], val, mixed, add=j > 0)
            torch.div(mixed, total.unsqueeze(-1), out=out)
    return y


def _multiply(a: Tensor, b: Tensor, y: Tensor, add: bool) -> None:
    """y [B, M, N] fp32 = a [B, M, K] @ b [B, K, N], or += that; the sums are kept in fp32 wherever the library cuts them."""
    if a.device.type == "cpu":
        torch.baddbmm(y, a.float(), b.float(), beta=int(add), out=y)
    elif a.shape[0] == 1:
        y = y[0]
        torch.ops.aten.addmm.dtype_out(y, a[0], b[0], torch.float32, beta=int(add), out=y)
    else:
        torch.ops.aten.baddbmm.dtype_out(y, a, b, torch.float32, beta=int(add), out=y)


__all__ = ["OP", "Block", "attend", "block_of", "reference", "refusal", "scores_of", "supports", "wide_attention"]
