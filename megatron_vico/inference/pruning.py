"""FastV and SparseVLM v1.5, the baselines of Table 3: visual tokens dropped between layers.

Only the rows of attention that a rule looks at are worked out, beside the fused kernel. Published
settings are for 32 layers and 576 visual tokens; here they are shares of depth and of tokens. What
stays keeps its position id, as in FastV; SparseVLM v1.5 numbers afresh, its v2.0 does as we do.

Shapes: B samples, S tokens of a sample, V visual tokens, R rows of attention, A heads of queries,
G heads of keys, E channels of a head, H channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from megatron_vico.errors import ConfigError

Rule = Literal["fastv", "sparsevlm"]

_ROWS_AT_ONCE = 256
_RECYCLED = 0.3
"""Of what SparseVLM drops, by score, that is merged into a tenth as many tokens."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """A method's own setting, for a model of 32 layers."""

    last_layers: tuple[int, ...]
    """Layers, counted from 0, behind which tokens are dropped by the attention in them."""

    dropped: tuple[float, ...]
    """Share of all visual tokens that is gone then."""

    recycles: bool


PUBLISHED: dict[Rule, Published] = {
    # K = 2, R = 0.5: before layer 2, by the attention of layer 1.
    "fastv": Published(last_layers=(1,), dropped=(0.5,), recycles=False),
    # 300, 200 and 110 of 576, which it calls 192.
    "sparsevlm": Published(
        last_layers=(2, 6, 15), dropped=(276 / 576, 376 / 576, 466 / 576), recycles=True
    ),
}


@dataclass(frozen=True, kw_only=True)
class Cut:
    """What one sample has left of its visual tokens behind a layer."""

    kept: int
    pool: int
    """Dropped ones, the best, that are merged."""

    merged: int
    """Tokens that these become."""


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """A rule for a model of some depth; ConfigError if that has too few layers for it."""

    rule: Rule
    num_layers: int
    saved: float | None = None
    """Share of visual tokens, mean over layers, that is to be dropped, by as many more or fewer at
    each place as it takes; None: the published setting."""

    def __post_init__(self) -> None:
        if self._last_layers[-1] >= self.num_layers - 1:
            fewest = {"fastv": 2, "sparsevlm": 3}[self.rule]
            raise ConfigError(
                f"plan {self.rule!r} needs {fewest} layers; the model has {self.num_layers}."
            )
        if self.saved is not None and not 0 <= self.saved <= self.most:
            raise ConfigError(
                f"plan '{self.rule}={self.saved:g}': expected the share of visual tokens saved,"
                f" mean over layers, in [0, {int(100 * self.most) / 100:.2f}] for"
                f" {self.num_layers} layers."
            )

    @property
    def most(self) -> float:
        """Highest `saved`: all tokens but one dropped at the first place."""
        many = 1 << 20
        return 1 - self._mean(self._cuts(many, self._strongest), many) / many

    @cached_property
    def _last_layers(self) -> list[int]:
        """In this model; two may fall on one layer, where the later cut counts."""
        if self.rule == "fastv":  # K layers run before, one at least
            return [max(round(self.num_layers / 16), 1) - 1]
        return [round(layer * self.num_layers / 32) for layer in PUBLISHED[self.rule].last_layers]

    @property
    def _strongest(self) -> float:
        return 1 / min(PUBLISHED[self.rule].dropped)

    def cuts(self, num_visual: int) -> dict[int, Cut]:
        """By the layer behind which they are made; none where nothing is dropped."""
        if self.saved is None:
            return self._cuts(num_visual, 1.0)
        weak, strong = 0.0, self._strongest
        wanted = num_visual * (1 - self.saved)
        for _ in range(40):  # kept tokens fall with the strength, in steps: to the two beside it
            middle = (weak + strong) / 2
            if self._mean(self._cuts(num_visual, middle), num_visual) > wanted:
                weak = middle
            else:
                strong = middle
        beside = (self._cuts(num_visual, each) for each in (weak, strong))
        return min(beside, key=lambda cuts: abs(self._mean(cuts, num_visual) - wanted))

    def mean_kept(self, num_visual: int) -> float:
        """Visual tokens that a layer sees, merged ones too, mean over layers."""
        return _mean_kept(self, num_visual)

    def _cuts(self, num_visual: int, strength: float) -> dict[int, Cut]:
        published, found, here = PUBLISHED[self.rule], dict[int, Cut](), num_visual
        # A dict, for the later of two cuts behind one layer.
        shares = dict(zip(self._last_layers, published.dropped, strict=True))
        for layer, share in shares.items():
            kept = min(max(round(num_visual * (1 - strength * share)), 1), here)
            if kept < here:
                pool = int(_RECYCLED * (here - kept)) + 1 if published.recycles else 0
                merged = pool // 10 + 1 if pool else 0
                found[layer] = Cut(kept=kept, pool=pool, merged=merged)
                here = kept + merged
        return found

    def _mean(self, cuts: dict[int, Cut], num_visual: int) -> float:
        here, total = num_visual, 0
        for layer in range(self.num_layers):
            total += here
            if layer in cuts:
                here = cuts[layer].kept + cuts[layer].merged
        return total / self.num_layers


@lru_cache(maxsize=4096)
def _mean_kept(pruning: Pruning, num_visual: int) -> float:
    return pruning._mean(pruning.cuts(num_visual), num_visual)


@dataclass(kw_only=True)
class _Sample:
    """One sample between two layers; where its tokens are, among those that are left."""

    num_tokens: int
    visual_V: Tensor
    """Ascending."""

    rows_R: Tensor
    """Whose attention ranks them."""

    cuts: dict[int, Cut]
    score_V: Tensor | None = None


class Pruner:
    """Drops tokens of samples that are read whole, in one pass; `LanguageModel` calls it."""

    def __init__(
        self,
        pruning: Pruning,
        *,
        visual_positions: Sequence[Tensor],
        num_tokens_B: Tensor,
        tp_group: torch.distributed.ProcessGroup,
    ) -> None:
        """`visual_positions` are each sample's own, int64 on the device."""
        self._rule, self._tp_group = pruning.rule, tp_group
        self._samples = [
            _Sample(
                num_tokens=num_tokens,
                visual_V=visual_V,
                rows_R=torch.tensor([num_tokens - 1], device=visual_V.device),  # FastV's
                cuts=pruning.cuts(len(visual_V)),
            )
            for visual_V, num_tokens in zip(visual_positions, num_tokens_B.tolist(), strict=True)
        ]
        self.layers = frozenset(layer for sample in self._samples for layer in sample.cuts)
        """Behind which tokens are dropped."""

    @property
    def num_tokens_B(self) -> Tensor:
        """[B] int64, on the host, tokens that are left of each."""
        return torch.tensor([sample.num_tokens for sample in self._samples])

    def begin(self, hidden: Tensor) -> None:
        """Look at the embeddings [s, b, h]: SparseVLM takes its raters by them."""
        if self._rule == "sparsevlm":
            for tokens_SH, sample in zip(hidden.unbind(1), self._samples, strict=True):
                if sample.cuts:
                    sample.rows_R = text_raters(tokens_SH[: sample.num_tokens], sample.visual_V)

    def watch(self, layer: int, q: Tensor, k: Tensor, scale: float) -> None:
        """Rank visual tokens by what looks at them in this layer.

        Args:
            layer: counted from 0.
            q: [B, S, A, E], of this rank's heads, rotated.
            k: [B, S, G, E], likewise.
            scale: of the scores.
        """
        for q_SAE, k_SGE, sample in zip(q, k, self._samples, strict=True):
            if layer not in sample.cuts:
                continue
            attention_S = rows_of_attention(
                q_SAE, k_SGE[: sample.num_tokens], rows_R=sample.rows_R, scale=scale
            )
            sample.score_V = attention_S[sample.visual_V]
            if self._tp_group.size() > 1:
                torch.distributed.all_reduce(sample.score_V, group=self._tp_group)

    def drop(self, layer: int, hidden: Tensor, positions_BS: Tensor) -> tuple[Tensor, Tensor]:
        """[s, b, h] and the position ids without what is dropped behind this layer."""
        tokens, positions = [], []
        for number, sample in enumerate(self._samples):
            own = hidden[: sample.num_tokens, number], positions_BS[number, : sample.num_tokens]
            if layer in sample.cuts:
                own = _cut(sample, sample.cuts[layer], *own)
            tokens.append(own[0])
            positions.append(own[1])
        return pad_sequence(tokens), pad_sequence(positions, batch_first=True)


def rows_of_attention(q_SAE: Tensor, k_SGE: Tensor, *, rows_R: Tensor, scale: float) -> Tensor:
    """[S] float32, what each token gets of the attention of some, mean over these and heads."""
    groups = k_SGE.size(1)
    places_S = torch.arange(len(k_SGE), device=k_SGE.device)
    total_S = torch.zeros(len(k_SGE), device=k_SGE.device)
    for some_R in rows_R.split(_ROWS_AT_ONCE):
        q = q_SAE[some_R].unflatten(1, (groups, -1)).float()  # heads that share a key, together
        logits = torch.einsum("rgae,sge->rgas", q, k_SGE.float()) * scale
        hidden = (places_S > some_R[:, None])[:, None, None]
        total_S += logits.masked_fill(hidden, -torch.inf).softmax(-1).mean((1, 2)).sum(0)
    return total_S / len(rows_R)


def text_raters(tokens_SH: Tensor, visual_V: Tensor) -> Tensor:
    """[R] int64, the text behind the images that is more like them than its mean is."""
    first = int(visual_V[-1]) + 1
    text = tokens_SH[first:].float()
    relevance = (tokens_SH[visual_V].float() @ text.T).softmax(-1).mean(0)
    chosen = relevance > relevance.mean()
    return first + (chosen | ~chosen.any()).nonzero()[:, 0]  # all, where none is above the mean


def merge(tokens_NH: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Density-peak clusters: the [num] tokens in their middles, and the means [num, H].

    A middle has near neighbours and is far from what has nearer ones.
    """
    tokens = tokens_NH.float()
    distance = torch.cdist(tokens, tokens, compute_mode="donot_use_mm_for_euclid_dist")
    distance = distance / tokens.size(1) ** 0.5
    density = (-(distance.topk(num, largest=False).values ** 2).mean(-1)).exp()
    noise = torch.rand(len(tokens), generator=torch.Generator().manual_seed(0))
    density = density + 1e-6 * noise.to(density.device)  # so that no two are equally dense
    denser = density > density[:, None]
    to_denser = distance.where(denser, distance.max()).amin(-1)
    middles = (to_denser * density).topk(num).indices
    cluster = distance[:, middles].argmin(-1)
    cluster[middles] = torch.arange(num, device=cluster.device)
    # As a product, which every rank sums in the same order.
    share = torch.nn.functional.one_hot(cluster, num).T.float()
    return middles, (share @ tokens / share.sum(1, keepdim=True)).to(tokens_NH.dtype)


def _cut(
    sample: _Sample, cut: Cut, tokens_SH: Tensor, positions_S: Tensor
) -> tuple[Tensor, Tensor]:
    assert sample.score_V is not None
    ranked = sample.visual_V[sample.score_V.argsort(descending=True, stable=True)]
    stays_S = torch.ones(len(tokens_SH), dtype=torch.bool, device=tokens_SH.device)
    stays_S[ranked[cut.kept :]] = False
    index = stays_S.nonzero()[:, 0]
    # Merged tokens come behind all that is visual, and in front of the text that asks.
    behind = int((index <= sample.visual_V[-1]).sum())
    before, after = index[:behind], index[behind:]
    pool = ranked[cut.kept : cut.kept + cut.pool]
    middles, merged = pool[:0], tokens_SH[:0]
    if cut.merged:
        middles, merged = merge(tokens_SH[pool], cut.merged)
    kept = torch.searchsorted(before, ranked[: cut.kept].sort().values)
    sample.visual_V = torch.cat([kept, behind + torch.arange(cut.merged, device=kept.device)])
    sample.rows_R = torch.searchsorted(index, sample.rows_R) + cut.merged
    sample.num_tokens = len(index) + cut.merged
    return (
        torch.cat([tokens_SH[before], merged, tokens_SH[after]]),
        torch.cat([positions_S[before], positions_S[pool][middles], positions_S[after]]),
    )
