"""Weights in few bits, and the output head in two steps.

Symmetric and without zero points: a row (or a block of 128 along it) of a matrix is `scale * whole numbers`,
scale = largest magnitude / 127 for int8, / 7 for int4.

The head is most of an LSTM's work: V x d numbers a token. `two_step_head` lets it be run as a preview of all
tokens along a few axes, then exactly for those in question (SVD-softmax: Shim, Lee, Choi, Boo and Sung, NeurIPS
2017). The principal axes of the weights alone are useless; those of the logits are wanted. With mean m and
covariance C of z over the student's own text, and the singular values of W C^(1/2) = P S Q^T,

    W z = W m + (P S^(1/2) R) (R^T S^(1/2) Q^T C^(-1/2) (z - m)) = bias + U u

for any rotation R, and the first r columns of P S are the best preview of rank r. Splitting S between both factors
and turning them by a random R spreads what is large over all columns (Ashkboos et al., arXiv 2404.00456), which
makes a scale per row fit: of 8 bits, some five would otherwise be lost to the few axes that are a hundred times
the others. A row added to all of W changes no probability, so W is centred first. What a preview leaves out
has variance |P S_rest,v|^2 in the logit of token v, and E[exp(logit)] is met by adding half of it (a log-normal's
mean), so that the tail's probability comes out right on average.

What is refined comes in blocks of tokens that lie together, so tokens that are likely in the same places should:
`alike_together` puts next to each other those whose logits have nearly the same mean and move alike.

Legend: V tokens, d head's width, r axes of the preview, N rows of a matrix, K columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.student import LSTMCache, LSTMForCausalLM

BLOCK = 128


def quantise_rows(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """int8 numbers (N, K) and fp32 scales (N, 1)."""
    scale_N1 = weight_NK.float().abs().amax(1, keepdim=True).clamp_min(1e-30) / 127
    return (weight_NK.float() / scale_N1).round().to(torch.int8), scale_N1


def quantise_blocks(weight_NK: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """As onnxruntime's MatMulNBits wants it: bytes (N, K / 128, 16 * bits) and fp32 scales (N, K / 128).

    Numbers are stored with 2^(bits - 1) added; two of 4 bits share a byte, the earlier one below. A last block that
    is not full is padded with zeros.
    """
    weight_NK = F.pad(weight_NK.float(), (0, -weight_NK.shape[1] % BLOCK))
    blocks_NbK = weight_NK.unflatten(1, (-1, BLOCK))
    scale_Nb = blocks_NbK.abs().amax(2).clamp_min(1e-30) / (2 ** (bits - 1) - 1)
    numbers_NbK = ((blocks_NbK / scale_Nb[..., None]).round() + 2 ** (bits - 1)).to(torch.uint8)
    if bits == 4:
        numbers_NbK = numbers_NbK[..., ::2] | numbers_NbK[..., 1::2] << 4
    return numbers_NbK.contiguous(), scale_Nb


def restore_blocks(numbers_Nbk: Tensor, scale_Nb: Tensor, columns: int) -> Tensor:
    """The matrix (N, columns) that `quantise_blocks` stored, in fp32."""
    if numbers_Nbk.shape[2] < BLOCK:
        numbers_Nbk = torch.stack([numbers_Nbk & 15, numbers_Nbk >> 4], dim=-1).flatten(2) + 120
    return ((numbers_Nbk.float() - 128) * scale_Nb[..., None]).flatten(1)[:, :columns]


def own_text(student: LSTMForCausalLM, sequences: int, length: int) -> Tensor:
    """ids (B, 1 + length) that the student draws itself, always the same: no corpus is needed, and none leaks."""
    config = student.config
    eos = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    start = next((token for token in (eos, config.bos_token_id) if token is not None), 0)
    generator = torch.Generator().manual_seed(0)
    ids, cache = [torch.full((sequences, 1), start)], LSTMCache()
    with torch.inference_mode():
        for _ in range(length):
            logits_BV = student(ids[-1], past_key_values=cache).logits[:, -1]
            ids.append(torch.multinomial(logits_BV.softmax(-1), 1, generator=generator))
    return torch.cat(ids, dim=1)


class Head(NamedTuple):
    """logits_V = bias_V + weight_Vr (turn_rd z + shift_r), in fp64 and up to a constant over V."""

    weight_Vr: Tensor
    bias_V: Tensor
    turn_rd: Tensor
    shift_r: Tensor


def two_step_head(weight_Vd: Tensor, z_Nd: Tensor, axes: int) -> tuple[Head, Head]:
    """(preview along so many axes, exact) of a head without its own bias."""
    weight_Vd, z_Nd = weight_Vd.double() - weight_Vd.double().mean(0), z_Nd.double()
    d, mean_d = z_Nd.shape[1], z_Nd.mean(0)
    covariance_dd = (z_Nd - mean_d).T @ (z_Nd - mean_d) / len(z_Nd)
    # Directions that were never seen keep a finite scale.
    covariance_dd += 1e-4 * covariance_dd.diagonal().mean() * torch.eye(d, dtype=torch.float64)
    values_d, vectors_dd = torch.linalg.eigh(covariance_dd)
    root_dd, inverse_dd = ((vectors_dd * values_d**power) @ vectors_dd.T for power in (0.5, -0.5))
    logits_Vd = weight_Vd @ root_dd
    squares_d, axes_dd = torch.linalg.eigh(logits_Vd.T @ logits_Vd)
    axes_dd, scale_d = axes_dd.flip(1), squares_d.flip(0).clamp_min(1e-12 * squares_d[-1]) ** 0.25  # S^(1/2)

    def head(rank: int) -> Head:
        generator = torch.Generator().manual_seed(rank)
        rotation_rr = torch.linalg.qr(torch.randn(rank, rank, generator=generator, dtype=torch.float64))[0]
        turn_rd = rotation_rr.T @ (axes_dd[:, :rank] * scale_d[:rank]).T @ inverse_dd
        weight_Vr = logits_Vd @ (axes_dd[:, :rank] / scale_d[:rank]) @ rotation_rr
        left_out_V = (logits_Vd @ axes_dd[:, rank:]).square().sum(1)
        return Head(weight_Vr, weight_Vd @ mean_d + left_out_V / 2, turn_rd, -turn_rd @ mean_d)

    return head(axes), head(d)


def alike_together(head: Head, z_Nd: Tensor, size: int) -> Tensor:
    """All tokens in an order in which every `size` that follow each other have similar logits at all z.

    Halves of halves, each cut across its longest axis. Only the last block may be short.
    """
    u_Nr = z_Nd.double() @ head.turn_rd.T + head.shift_r
    root_rr = torch.linalg.qr(u_Nr / len(u_Nr) ** 0.5)[1].T  # root @ root.T is the covariance
    logits_VD = torch.cat([head.weight_Vr @ root_rr, head.bias_V[:, None]], dim=1).float()
    generator = torch.Generator().manual_seed(0)

    def in_order(tokens_N: Tensor) -> list[Tensor]:
        if len(tokens_N) <= size:
            return [tokens_N]
        rows_ND = logits_VD[tokens_N]
        rows_ND = rows_ND - rows_ND.mean(0)
        axis_D = torch.randn(rows_ND.shape[1], generator=generator)
        for _ in range(8):  # power iterations: nearly the longest axis serves as well
            axis_D = F.normalize(rows_ND.T @ (rows_ND @ axis_D), dim=0)
        tokens_N = tokens_N[(rows_ND @ axis_D).argsort(stable=True)]
        half = -(-len(tokens_N) // size) // 2 * size
        return in_order(tokens_N[:half]) + in_order(tokens_N[half:])

    return torch.cat(in_order(torch.arange(len(logits_VD))))
