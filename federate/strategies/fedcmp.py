"""Fed-CMP (arXiv 2603.26786), our reading: only the paper's abstract was available to us.

Notation of docs/fed_cmp.md: W the global matrix, D_k = W_k - W client k's update, p_k its share of
the samples, U and e the eigenpairs of G = Σ_k p_k D_k D_kᵀ.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from fedcmp.federate.arithmetic.bases import (
    agreement_by_direction,
    canonical_basis,
    fuse_by_direction,
    leading,
    polar,
    randomised_basis,
)
from fedcmp.federate.arithmetic.cohort import Cohort, Gram, Open, Side, Weights
from fedcmp.federate.arithmetic.matrices import Matrices
from fedcmp.federate.strategies import STRATEGIES, Aggregate, Memory, State, Strategy, Update

_FLOOR = 0.02
_SMOOTHING = 0.6
_SKETCH_RANK = 128
_OVERSAMPLING = 16


class _Space(NamedTuple):
    """One side of a matrix's canonical space.

    Attributes:
        basis: U `(d, r)`, orthonormal columns.
        spectrum: e `(r,)`, largest first.
        scale: Root of the trace of G: the root mean square length of the clients' updates.
    """

    basis: Tensor
    spectrum: Tensor
    scale: float

    @property
    def whole(self) -> bool:
        """Whether U Uᵀ = I."""
        return self.basis.shape[0] == self.basis.shape[1]


@STRATEGIES.register("fedcmp")
class FedCmp(Strategy):
    """Canonical reliability-aware aggregation with orthogonality-preserved momentum.

    Args:
        update: What D_k are: to the client's `weights`, or along its `path`.
        proximal: μ.
        reliability: What is weighted by its agreement with the others' consensus: a `client`'s whole
            matrix, each canonical `direction` of it, or `none`.
        clip: Times the usual norm of a client with as many samples that an update may be long; a longer
            one gets the usual norm, so that length makes nobody the consensus. 0 leaves updates as
            they are.
        kappa: Share of the median agreement that earns full weight (κ).
        consensus: Median agreement below which there is no consensus to judge by, as when training
            has converged and updates are noise; clients then keep their last reliability, and
            directions have full weight.
        warmup: First rounds in which reliability is off, so that rare honest silos are not
            punished before a consensus exists.
        sides: Sides of the canonical space: `both`, or the `left` one, that of the LLM's embeddings.
        space: Take the canonical bases from the clients' `updates`, or from their `weights`
            (G = Σ p_k W_k W_kᵀ).
        basis: Find them by the `exact` eigendecomposition of G, or by a `randomised` sketch of G's
            range, which takes a tenth of the time.
        rank: Directions in a basis; all by default, 128 where randomised.
        energy: Share of the energy that a basis must hold; with `rank`, the smaller basis.
        residual: Keep what lies outside the bases as it is, or drop it.
        equalise: Exponent of the spectral equalisation (a); 0 leaves the spectrum as it is.
        floor: What is added to relative eigenvalues before (φ), so that noise is not raised without bound.
        length: Of an equalised step: that of the clients' updates now and at their longest, or as before.
        basis_momentum: Memory of G (b).
        momentum: Memory of the update (β).
        momentum_kind: How the last step is carried over: `projected` onto the new bases; `plain`, as
            it is; or `procrustes`, as its coefficients in the old bases, which are first aligned with
            the new ones by the nearest rotations. At full rank all three are the same.
        server_learning_rate: η_s of matrices.
        bias_learning_rate: η_s of biases.
        seed: Of the randomised sketch.
    """

    update: Literal["weights", "path"] = "path"
    proximal: float = Field(0.1, ge=0)
    reliability: Literal["client", "direction", "none"] = "client"
    clip: float = Field(2.0, ge=0)
    kappa: float = Field(0.3, gt=0)
    consensus: float = Field(0.03, gt=0, lt=1)
    warmup: int = Field(1, ge=0)
    sides: Literal["both", "left"] = "both"
    space: Literal["updates", "weights"] = "updates"
    basis: Literal["exact", "randomised"] = "exact"
    rank: int | None = Field(None, ge=1)
    energy: float = Field(1.0, gt=0, le=1)
    residual: bool = True
    equalise: float = Field(1.0, ge=0)
    floor: float = Field(0.1, gt=0)
    length: Literal["clients", "fused"] = "clients"
    basis_momentum: float = Field(0.6, ge=0, lt=1)
    momentum: float = Field(0.0, ge=0, lt=1)
    momentum_kind: Literal["projected", "plain", "procrustes"] = "projected"
    server_learning_rate: float = Field(1.35, gt=0)
    bias_learning_rate: float = Field(1.0, gt=0)
    seed: int = Field(0, ge=0)

    def sees(self) -> Literal["updates", "sums"]:
        """Sums, unless directions or the clients' whole weights are looked at."""
        by_sums = self.reliability != "direction" and self.space == "updates" and self.basis == "exact"
        return "sums" if by_sums else "updates"

    def releases(self) -> int:
        """A second sum with the clients' reliabilities."""
        return 1 if self.reliability == "none" else 2

    def looks_at(self) -> tuple[Side, ...]:
        """G of both sides, or of one."""
        return ("left", "right") if self.sides == "both" else ("left",)

    def aggregate(self, state: State, updates: Sequence[Update], memory: Memory) -> Aggregate:
        """Fuse matrices in their canonical space; biases take the matrices' mean weights."""
        return self.fuse(state, Open(state, updates), memory)

    def fuse(self, state: State, cohort: Cohort, memory: Memory) -> Aggregate:
        """Fuse from sums over clients; what else some options need, only `Open` has."""
        matrices = [name for name, old in state.items() if old.ndim == 2]
        biases = [name for name, old in state.items() if old.ndim != 2]
        clipped = cohort.shorten(self.clip) if self.clip else {}
        shares = cohort.shares
        kept: Memory = {"rounds": torch.tensor(_rounds(memory) + 1)}
        fused: State = {}
        trust, remembered = self._trust(matrices, cohort, memory)
        kept |= remembered
        if self.reliability != "direction":
            cohort.weigh(_weights(shares, trust, biases))
        for name in matrices:
            spaces = []
            for side in self.looks_at():
                space, remembered = self._space(name, side, cohort, memory)
                spaces.append(space)
                kept |= remembered
            if self.reliability == "direction":
                mean, trust[name] = self._directions(cohort, name, spaces[0], memory)
            else:
                mean = cohort.sum(name)
            step, remembered = self._sized(name, self._interference(mean, spaces), spaces[0].scale, memory)
            kept |= remembered
            step, remembered = self._with_momentum(name, step, memory, spaces)
            kept |= remembered
            fused[name] = torch.add(state[name], step, alpha=self.server_learning_rate).to(state[name].dtype)
        if self.reliability == "direction":
            cohort.weigh(_weights(shares, trust, biases))
        for name in biases:
            step, remembered = self._with_momentum(name, cohort.sum(name), memory, ())
            kept |= remembered
            fused[name] = torch.add(state[name], step, alpha=self.bias_learning_rate).to(state[name].dtype)
        r = _mean_trust(shares, trust)
        figures = {"reliability": r, "weight": _reweigh(shares, r)}
        if clipped:
            figures["clip"] = clipped
        return Aggregate({name: fused[name] for name in state}, kept, figures)

    def _space(self, name: str, side: Side, cohort: Cohort, memory: Memory) -> tuple[_Space, Memory]:
        """U and e of Ḡ = b Ḡ + (1 - b) G / tr G, and what the next round needs of Ḡ."""
        source, place = self._source(cohort, name, side), name if side == "left" else f"{side}/{name}"
        if self.basis == "exact":
            return self._exact(place, source, cohort.shares, memory, self.rank)
        rank = self.rank or _SKETCH_RANK
        if rank + _OVERSAMPLING >= source.shape[0]:
            return self._exact(place, source, cohort.shares, memory, rank)
        return self._randomised(place, source, cohort.shares, memory, rank)

    def _source(self, cohort: Cohort, name: str, side: Side) -> Gram:
        if self.space == "updates":
            return cohort.gram(name, side)
        assert isinstance(cohort, Open)
        whole = cohort.matrices(name, whole=True)
        return whole if side == "left" else whole.transposed

    def _exact(
        self, place: str, source: Gram, shares: Weights, memory: Memory, rank: int | None
    ) -> tuple[_Space, Memory]:
        gram = source.gram(shares)
        trace = float(gram.diagonal().double().sum())
        old = memory.get(f"gram/{place}")
        gram *= self._fresh(trace, old)
        if old is not None:
            gram.add_(old, alpha=self.basis_momentum)
        space = _Space(*canonical_basis(gram, rank, self.energy), trace**0.5)
        return space, {f"gram/{place}": gram} if self.basis_momentum else {}

    def _randomised(
        self, place: str, source: Gram, shares: Weights, memory: Memory, rank: int
    ) -> tuple[_Space, Memory]:
        """Ḡ is remembered as the eigenpairs that the sketch found, with its whole trace."""
        old, old_values = memory.get(f"vectors/{place}"), memory.get(f"values/{place}")
        trace = source.trace(shares)
        fresh = self._fresh(trace, old)

        def times(right: Tensor) -> Tensor:
            product = fresh * source.gram_times(shares, right)
            if old is not None and old_values is not None:
                product += old @ ((self.basis_momentum * old_values)[:, None] * (old.T @ right))
            return product

        # A generator of its own: neither other random draws nor a resumed run may change the sketch.
        seed = zlib.crc32(f"{self.seed}/{place}/{_rounds(memory)}".encode())
        generator = torch.Generator().manual_seed(seed)
        size = (source.shape[0], rank + _OVERSAMPLING)
        vectors, values = randomised_basis(times, torch.randn(size, generator=generator, dtype=source.dtype))
        total = fresh * trace
        if old is not None:
            total += self.basis_momentum * float(memory[f"trace/{place}"])
        kept = leading(values, rank, self.energy, total)
        remembered = {f"vectors/{place}": vectors, f"values/{place}": values}
        remembered[f"trace/{place}"] = torch.tensor(total, dtype=torch.float64)
        space = _Space(vectors[:, :kept], values[:kept], trace**0.5)
        return space, remembered if self.basis_momentum else {}

    def _fresh(self, trace: float, old: Tensor | None) -> float:
        """What G is multiplied with in Ḡ; nothing to divide by where no client moved."""
        share = 1.0 if old is None else 1 - self.basis_momentum
        return share / trace if trace > 0 else 0.0

    def _trust(
        self, names: Sequence[str], cohort: Cohort, memory: Memory
    ) -> tuple[dict[str, Weights], Memory]:
        """Every client's reliability r_k by matrix, and what the next round needs of it."""
        trust = {name: dict.fromkeys(cohort.shares, 1.0) for name in names}
        if self.reliability != "client":
            return trust, {}
        remembered: Weights = {}
        for name, cosines in cohort.agreements(names).items():
            smooth = _smooth(cosines, _recall(memory, f"cosine/{name}/"))
            last = _recall(memory, f"reliability/{name}/")
            r = {client: last.get(client, 1.0) for client in cohort.shares}
            if _rounds(memory) >= self.warmup and median(smooth.values()) >= self.consensus:
                r = self._by_client(smooth)
            trust[name] = r
            remembered |= {f"cosine/{name}/{client}": c for client, c in smooth.items()}
            remembered |= {f"reliability/{name}/{client}": each for client, each in (last | r).items()}
        return trust, {key: torch.tensor(each, dtype=torch.float64) for key, each in remembered.items()}

    def _directions(self, cohort: Cohort, name: str, space: _Space, memory: Memory) -> tuple[Tensor, Weights]:
        """F = Σ ω_k D_k with weights by direction, and every client's reliability over all of them."""
        assert isinstance(cohort, Open)
        changes = cohort.matrices(name)
        cosines = agreement_by_direction(changes, cohort.shares, space.basis)
        warm = _rounds(memory) >= self.warmup
        trust = self._by_direction(cosines) if warm else torch.ones_like(cosines)
        return _fuse_directions(changes, cohort.shares, trust, space.basis, space.spectrum)

    def _by_client(self, cosines: Weights) -> Weights:
        """r_k: full for whoever agrees at least κ times as well as the median client."""
        enough = self.kappa * median(cosines.values())
        return {client: min(max(c / enough, _FLOOR), 1.0) for client, c in cosines.items()}

    def _by_direction(self, cosines: Tensor) -> Tensor:
        """r_{k,i}: the same in every direction. Bases change, so nothing is smoothed over rounds."""
        middle = cosines.quantile(0.5, dim=0)
        trust = (cosines / (self.kappa * middle)).clamp(_FLOOR, 1.0)
        return torch.where(middle >= self.consensus, trust, 1.0)

    def _interference(self, mean: Tensor, spaces: Sequence[_Space]) -> Tensor:
        """F + U (C' - C) Vᵀ, or U C' Vᵀ without residual, with C = Uᵀ F V; V = I where one side is looked at.

        F is ours alone and is changed in place, as are the steps below: at LLaVA's size every copy counts.
        """
        if self.residual and self.equalise == 0:
            return mean
        left, right = spaces[0], spaces[1] if len(spaces) > 1 else None
        coefficients = left.basis.T @ mean
        if right is not None:
            coefficients = coefficients @ right.basis
        equalised = self._equalised(coefficients, left, right)
        if self.residual:
            equalised -= coefficients
        if right is not None:
            equalised = equalised @ right.basis.T
        return mean.addmm_(left.basis, equalised) if self.residual else left.basis @ equalised

    def _equalised(self, coefficients: Tensor, left: _Space, right: _Space | None) -> Tensor:
        """C'_ij = (e_i / e_1 + φ)^(-a/2) C_ij (f_j / f_1 + φ)^(-a/2), of the norm of C."""
        equalised = coefficients * self._gains(left.spectrum)[:, None]
        if right is not None:
            equalised *= self._gains(right.spectrum)
        norm = _norm(equalised)
        return equalised.mul_(_norm(coefficients) / norm) if norm > 0 else equalised

    def _gains(self, spectrum: Tensor) -> Tensor:
        if float(spectrum[0]) == 0:
            return torch.ones_like(spectrum)
        relative = spectrum.double() / spectrum[0]
        return ((relative + self.floor) ** (-self.equalise / 2)).to(spectrum.dtype)

    def _sized(self, name: str, step: Tensor, scale: float, memory: Memory) -> tuple[Tensor, Memory]:
        """The step with norm √(N_t max_s N_s), N_t being the clients' root mean square length in round t."""
        if self.length == "fused":
            return step, {}
        longest = max(scale, float(memory.get(f"longest/{name}", torch.tensor(0.0))))
        norm = _norm(step)
        if norm > 0:
            step *= (scale * longest) ** 0.5 / norm
        return step, {f"longest/{name}": torch.tensor(longest, dtype=torch.float64)}

    def _with_momentum(
        self, name: str, step: Tensor, memory: Memory, spaces: Sequence[_Space]
    ) -> tuple[Tensor, Memory]:
        """M ← β · last M, carried over to the new bases, + step. Biases have none."""
        if self.momentum == 0:
            return step, {}
        if f"momentum/{name}" in memory:
            last = memory[f"momentum/{name}"]
            for axis, space in enumerate(spaces):
                last = self._carried(last, memory.get(f"basis/{axis}/{name}"), space, axis)
            step.add_(last, alpha=self.momentum)
        remembered = {f"momentum/{name}": step}
        if self.momentum_kind == "procrustes":
            remembered |= {f"basis/{axis}/{name}": space.basis for axis, space in enumerate(spaces)}
        return step, remembered

    def _carried(self, last: Tensor, old: Tensor | None, space: _Space, axis: int) -> Tensor:
        """The last step in a new basis of its rows (axis 0) or columns."""
        if self.momentum_kind == "plain":
            return last
        if axis == 1:
            return self._carried(last.T, old, space, 0).T
        new = space.basis
        if self.momentum_kind == "procrustes" and old is not None:
            return new @ (polar(old.T @ new).T @ (old.T @ last))
        return last if space.whole else new @ (new.T @ last)


def _norm(matrix: Tensor) -> float:
    return float(torch.linalg.vecdot(matrix, matrix).double().sum()) ** 0.5


def _fuse_directions(
    changes: Matrices, shares: Weights, trust: Tensor, basis: Tensor, spectrum: Tensor
) -> tuple[Tensor, Weights]:
    """Weights by direction inside the basis; outside it, their mean weighted by energy."""
    energies = spectrum.double() + torch.finfo(torch.float64).tiny
    clients = list(changes.new)
    r = dict(zip(clients, ((trust * energies).sum(1) / energies.sum()).tolist(), strict=True))
    weights = torch.tensor([shares[client] for client in clients], dtype=torch.float64)[:, None] * trust
    inside = fuse_by_direction(changes, weights / weights.sum(0), basis)
    mean = changes.sum(_reweigh(shares, r))
    return mean + basis @ (inside - basis.T @ mean), r


def _mean_trust(shares: Weights, trust: Mapping[str, Weights]) -> Weights:
    """Mean reliability over matrices."""
    return {client: fmean(each[client] for each in trust.values()) if trust else 1.0 for client in shares}


def _weights(shares: Weights, trust: Mapping[str, Weights], biases: Sequence[str]) -> dict[str, Weights]:
    """ω_k of every parameter."""
    weights = {name: _reweigh(shares, r) for name, r in trust.items()}
    return weights | dict.fromkeys(biases, _reweigh(shares, _mean_trust(shares, trust)))


def _rounds(memory: Memory) -> int:
    return int(memory.get("rounds", torch.tensor(0)))


def _recall(memory: Memory, prefix: str) -> Weights:
    """Figures by client that the last round left in memory."""
    return {key.removeprefix(prefix): float(c) for key, c in memory.items() if key.startswith(prefix)}


def _smooth(cosines: Weights, old: Weights) -> Weights:
    """Average with the last round's cosines where the same clients took part."""
    if old.keys() != cosines.keys():
        return cosines
    return {client: _SMOOTHING * old[client] + (1 - _SMOOTHING) * c for client, c in cosines.items()}


def _reweigh(shares: Weights, reliability: Weights) -> Weights:
    """ω_k = p_k r_k / Σ_j p_j r_j."""
    total = sum(shares[client] * reliability[client] for client in sorted(shares))
    return {client: shares[client] * reliability[client] / total for client in shares}
