"""The typed soft targets: in what form the teacher's knowledge reaches the loss.

Three forms. *Dense*: all logits. *Hidden*: the teacher's final hidden state, from which the same logits follow
through its head for d numbers a token; *mixed*: those of several teachers. *Sparse*: a few outcomes with their
probabilities, of two kinds that `SparseSignal` tells apart by its tail. An `Encoding` makes any of them from hidden
states; a loss does not know whether a signal comes from a live teacher or from `distill/cache.py`.

Legend: N tokens, V vocabulary, d width of the teacher, K outcomes a token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

ENCODING_ROWS = 128  # tokens whose logits exist at one time while a sparse signal is made
CACHE_ROWS = 16  # of these, tokens whose probabilities are worked on at one time on a CPU: 3 MiB at V = 49,152
LANES = 64  # outcomes v, v + G, v + 2 G ... are group v of G = V / LANES, so that sums over groups run along memory


@dataclass(frozen=True)
class Head:
    """A language model's output layer: logits = softcap(scale * (W h + b)) + offset.

    `weight_Vd` (V, d), `bias_V` and `offset_V` (V,) or None; `softcap` c applies c tanh(x / c), as in Gemma 2.
    """

    weight_Vd: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    offset_V: Tensor | None = None

    def rows(self, ids_C: Tensor, offset_C: Tensor) -> Head:
        """The head of some outcomes, with an offset for each."""
        ids_C, offset_C = ids_C.to(self.weight_Vd.device), offset_C.to(self.weight_Vd.device)
        bias_C = None if self.bias_V is None else self.bias_V[ids_C]
        return Head(self.weight_Vd[ids_C], bias_C, self.scale, self.softcap, offset_C)

    def logits(self, hidden_Nd: Tensor) -> Tensor:
        """(N, d) -> (N, V) in fp32; the matrix product runs in the weight's own type."""
        return self.finish(self.product(hidden_Nd))

    def product(self, hidden_Nd: Tensor, out: Tensor | None = None) -> Tensor:
        """W h + b (N, V) in the weight's own type."""
        hidden_Nd = hidden_Nd.to(self.weight_Vd.dtype)
        if out is None:
            return torch.nn.functional.linear(hidden_Nd, self.weight_Vd, self.bias_V)
        if self.bias_V is None:
            return torch.mm(hidden_Nd, self.weight_Vd.t(), out=out)
        return torch.addmm(self.bias_V, hidden_Nd, self.weight_Vd.t(), out=out)

    def finish(self, product_NV: Tensor) -> Tensor:
        """The logits in fp32, from what `product` gave."""
        logits_NV = product_NV.float()
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        if self.softcap is not None:
            logits_NV = torch.tanh(logits_NV / self.softcap) * self.softcap
        if self.offset_V is not None:
            logits_NV = logits_NV + self.offset_V
        return logits_NV


@dataclass(frozen=True)
class DenseSignal:
    """The teacher's logits (N, V) themselves."""

    logits_NV: Tensor

    def logits(self, rows: slice) -> Tensor:
        return self.logits_NV[rows]


@dataclass(frozen=True)
class HiddenSignal:
    """The teacher's final hidden states (N, d), after its last norm, and its head; `layers`: states (N, d) within."""

    hidden_Nd: Tensor
    head: Head
    layers: tuple[Tensor, ...] = ()

    def logits(self, rows: slice) -> Tensor:
        return self.head.logits(self.hidden_Nd[rows])


@dataclass(frozen=True)
class SparseSignal:
    """Some outcomes `ids_NK` (int64) of each token with probabilities `probs_NK` (fp32) at `temperature`.

    With `tail_N`, the mass outside the K ids, it is the teacher's distribution with all other outcomes in one:
    a divergence of two such distributions bounds the full one from below. Ids of a row are distinct.

    Without, it is a random sample that stands for the whole: `probs_NK` are importance weights which sum to 1, and
    E[sum over k of probs_k f(ids_k)] = sum over v of p_v f(v) for every f. Whatever is linear in p, so cross-entropy
    and forward KL with its gradient, is unbiased (arXiv 2503.16870); nothing else is. Unused places have weight 0.
    `entropy_N` is then that of p in nats, which KL needs besides.
    """

    ids_NK: Tensor
    probs_NK: Tensor
    temperature: float
    tail_N: Tensor | None = None
    entropy_N: Tensor | None = None

    def rows(self, rows: slice, device: torch.device) -> SparseSignal:
        """Some rows, on a device."""
        some = {name: part[rows].to(device) for name, part in by_token(self).items()}
        return replace(self, **some)  # type: ignore[arg-type]


@dataclass(frozen=True)
class MixedSignal:
    """States of several teachers, the first one's first: p is the mean of their softmaxes with `weights` that sum to 1.

    An arithmetic mean of distributions at the temperature at which they are used (arXiv 1503.02531, section 1).
    """

    parts: tuple[HiddenSignal, ...]
    weights: tuple[float, ...]

    def mix(self, logits: Sequence[Tensor], temperature: float) -> Tensor:
        """From the logits (N, V) of each, such logits that their softmax at the temperature is p."""
        log_p_NV: Tensor | None = None
        for logits_NV, weight in zip(logits, self.weights, strict=True):
            # Teachers may be on different devices.
            part_NV = torch.log_softmax(logits_NV.to(logits[0].device) / temperature, -1) + math.log(weight)
            log_p_NV = part_NV if log_p_NV is None else torch.logaddexp(log_p_NV, part_NV)
        assert log_p_NV is not None, "there is at least one teacher"
        return log_p_NV.mul_(temperature)


Signal = DenseSignal | HiddenSignal | SparseSignal | MixedSignal


def by_token(signal: Signal) -> dict[str, Tensor]:
    """The fields with a row for each token that the signal has."""
    return {name: part for name, part in vars(signal).items() if "_N" in name and part is not None}


def interleave(others: Signal, chosen: Signal, chosen_N: Tensor) -> Signal:
    """One signal of two of a kind that a cache can hold: rows of `chosen` where `chosen_N`, of `others` elsewhere."""

    def place(other_n: Tensor, chosen_n: Tensor) -> Tensor:
        whole_N = other_n.new_empty(len(chosen_N), *other_n.shape[1:])
        whole_N[~chosen_N], whole_N[chosen_N] = other_n, chosen_n.to(other_n.dtype)
        return whole_N

    rows = {name: place(part, getattr(chosen, name)) for name, part in by_token(others).items()}
    return replace(others, **rows)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Encoding:
    """Which signal is made of the teacher's hidden states: `dense`, `hidden`, `top_k` or `sampled`.

    `outcomes` is K of the sparse kinds, `temperature` that of their softmax, `seed` that of the sampling; `layers` are
    depths whose states go along with the final ones, counted in layers from the embedding.
    """

    kind: str
    outcomes: int = 0
    temperature: float = 1.0
    seed: int = 0
    layers: tuple[int, ...] = ()

    def signal(self, states: HiddenSignal | MixedSignal, block_ids: Sequence[int]) -> Signal:
        """The signal of N = len(block_ids) * T tokens; what is drawn at random follows from each block's number."""
        if self.kind == "hidden":
            return states
        if self.kind == "dense":
            assert isinstance(states, HiddenSignal), "the recipe asks for no logits of several teachers"
            return DenseSignal(states.logits(slice(None)))
        teachers = states.parts if isinstance(states, MixedSignal) else (states,)
        hidden_Nd = teachers[0].hidden_Nd
        block_length = len(hidden_Nd) // len(block_ids)
        offsets_N = torch.cat([self._offsets(block, block_length) for block in block_ids]).to(hidden_Nd.device)
        size = CACHE_ROWS if hidden_Nd.device.type == "cpu" else ENCODING_ROWS
        parts = []
        for start in range(0, len(hidden_Nd), ENCODING_ROWS):
            chunk = slice(start, start + ENCODING_ROWS)
            products = [one.head.product(one.hidden_Nd[chunk]).split(size) for one in teachers]
            for *products_NV, rows_N in zip(*products, offsets_N[chunk].split(size), strict=True):
                logits = [one.head.finish(product_NV) for one, product_NV in zip(teachers, products_NV, strict=True)]
                logits_NV = states.mix(logits, self.temperature) if isinstance(states, MixedSignal) else logits[0]
                if self.temperature != 1:
                    logits_NV = logits_NV / self.temperature
                parts.append(
                    top_k(logits_NV, self.outcomes, self.temperature)
                    if self.kind == "top_k"
                    else sample(logits_NV, self.outcomes, self.temperature, rows_N)
                )
        return concatenate(parts)

    def _offsets(self, block: int, block_length: int) -> Tensor:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + block) % 2**63)
        return torch.rand(block_length, generator=generator)


def top_k(logits_NV: Tensor, k: int, temperature: float) -> SparseSignal:
    """The k most probable outcomes and the mass of the others, from logits already divided by `temperature`."""
    ids_NK = largest(logits_NV, k)[1]
    probs_NK = torch.softmax(logits_NV, -1).gather(1, ids_NK)
    return SparseSignal(ids_NK, probs_NK, temperature, tail_N=(1 - probs_NK.sum(-1)).clamp_min(0))


def sample(logits_NV: Tensor, k: int, temperature: float, offsets_N: Tensor) -> SparseSignal:
    """At most k outcomes drawn without replacement, each with an importance weight: probability / chance to be drawn.

    From logits already divided by `temperature`. Outcome v is drawn with chance min(1, p_v / s): the probable ones are
    certain and keep their exact probability; of the rest, each draw stands for the mass s (Horvitz and Thompson 1952).
    Draws are systematic (Madow 1949): points at distance s through the cumulated rest, from an offset in [0, 1) that is
    uniform, so weights sum to 1 and no sample has more than k outcomes. For a given k no other chances give these
    estimates less variance.
    """
    k = min(k, logits_NV.shape[-1])
    mass_NV = torch.softmax(logits_NV, -1)
    top_NK, ids_NK = largest(mass_NV, k)
    log_total_N = logits_NV.gather(1, ids_NK[:, :1])[:, 0] - top_NK[:, 0].log()
    entropy_N = log_total_N - torch.linalg.vecdot(mass_NV, logits_NV)
    # With m certain outcomes, the others get k - m draws of s = rest / (k - m) each. Take m as small as leaves every
    # other outcome at most one draw: the mass of the next one <= s.
    order_K = torch.arange(k, device=logits_NV.device)
    rest_NK = (1 - torch.cumsum(top_NK, -1) + top_NK).clamp_min(0)  # outside the first m, m = 0 ... k - 1
    enough_NK = top_NK * (k - order_K) <= rest_NK
    enough_NK[:, -1] = True
    certain_N1 = enough_NK.int().argmax(-1, keepdim=True)
    is_certain_NK = order_K < certain_N1
    mass_NV.scatter_(1, ids_NK, top_NK.masked_fill(is_certain_NK, 0.0))
    # Points are found by group, then within it: order of outcomes is free, and a cumulated sum of all is slow.
    mass_NLG = _grouped(mass_NV, 0.0)
    groups_NG = mass_NLG.sum(1).cumsum_(-1)
    spacing_N1 = groups_NG[:, -1:] / (k - certain_N1)
    group_NK, inside_NK = _find((order_K - certain_N1 + offsets_N[:, None]) * spacing_N1, groups_NG)
    members_NKL = mass_NLG.transpose(1, 2).gather(1, group_NK[..., None].expand(-1, -1, LANES))
    place_NK1, _ = _find(inside_NK[..., None], members_NKL.cumsum_(-1))
    drawn_NK = (place_NK1[..., 0] * groups_NG.shape[-1] + group_NK).clamp_max(logits_NV.shape[-1] - 1)
    return SparseSignal(
        ids_NK=torch.where(is_certain_NK, ids_NK, drawn_NK),
        probs_NK=torch.where(is_certain_NK, top_NK, spacing_N1),
        temperature=temperature,
        entropy_N=entropy_N,
    )


def largest(values_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As `values_NV.topk(k)`: they stand in the k groups with the largest maxima, so few are sorted."""
    values_NLG = _grouped(values_NV, float("-inf"))
    groups_NK = values_NLG.amax(1).topk(min(k, values_NLG.shape[-1]), dim=-1, sorted=False).indices
    members_NLK = values_NLG.gather(2, groups_NK[:, None].expand(-1, LANES, -1))
    top_NK, place_NK = members_NLK.flatten(1).topk(k, dim=-1)
    lane_NK, group_NK = place_NK // groups_NK.shape[-1], place_NK % groups_NK.shape[-1]
    return top_NK, lane_NK * values_NLG.shape[-1] + groups_NK.gather(1, group_NK)


def _grouped(values_NV: Tensor, filler: float) -> Tensor:
    """(N, LANES, G): group g of G in column g, filled up to a whole number of groups."""
    missing = -values_NV.shape[-1] % LANES
    if missing:
        values_NV = torch.nn.functional.pad(values_NV, (0, missing), value=filler)
    return values_NV.unflatten(-1, (LANES, -1))


def _find(points: Tensor, cumulated: Tensor) -> tuple[Tensor, Tensor]:
    """Of each point in [0, last], the first place whose cumulated sum exceeds it, and what is left of the point there.

    Rounding aside, a place is as likely as its mass; one without mass is found only if all are.
    """
    points = points.clamp_min(0).minimum(cumulated[..., -1:].nextafter(cumulated.new_zeros(())))
    place = torch.searchsorted(cumulated, points, right=True).clamp_max(cumulated.shape[-1] - 1)
    before = torch.nn.functional.pad(cumulated, (1, 0)).gather(-1, place)
    return place, points - before


def concatenate(parts: Sequence[SparseSignal]) -> SparseSignal:
    """One signal of the rows of several of a kind."""
    joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in by_token(parts[0])}
    return replace(parts[0], **joined)  # type: ignore[arg-type]
