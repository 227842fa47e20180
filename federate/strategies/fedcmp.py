"""Fed-CMP (arXiv 2603.26786), our reading: only the paper's abstract was available to us.

Notation of docs/fed_cmp.md: W the global matrix, D_k = W_k - W client k's update, p_k its share of
the samples, U and e the eigenpairs of G = Σ_k p_k D_k D_kᵀ.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Literal

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
from fedcmp.federate.arithmetic.cohort import Cohort, Gram, Open, Weights
from fedcmp.federate.arithmetic.matrices import Matrices
from fedcmp.federate.strategies import STRATEGIES, Aggregate, Memory, State, Strategy, Update

_FLOOR = 0.02
_SMOOTHING = 0.6
_SPECTRUM_FLOOR = 1e-3
_SKETCH_RANK = 128
_OVERSAMPLING = 16


@STRATEGIES.register("fedcmp")
class FedCmp(Strategy):
    """Canonical reliability-aware aggregation with orthogonality-preserved momentum.

    Args:
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
        space: Take the canonical basis from the clients' `updates`, or from their `weights`
            (G = Σ p_k W_k W_kᵀ).
        basis: Find it by the `exact` eigendecomposition of G, or by a `randomised` sketch of G's
            range, which takes a tenth of the time.
        rank: Directions in the basis; all by default, 128 where randomised.
        energy: Share of the energy that the basis must hold; with `rank`, the smaller basis.
        residual: Keep what lies outside the basis as it is, or drop it.
        equalise: Exponent of the spectral equalisation (a); 0 leaves the spectrum as it is.
        basis_momentum: Memory of G (b).
        momentum: Memory of the update (β).
        momentum_kind: How the last step is carried over: `projected` onto the new basis; `plain`, as
            it is; or `procrustes`, as its coefficients in the old basis, which is first aligned with
            the new one by the nearest rotation. At full rank all three are the same.
        server_learning_rate: η_s.
        seed: Of the randomised sketch.
    """

    reliability: Literal["client", "direction", "none"] = "client"
    clip: float = Field(2.0, ge=0)
    kappa: float = Field(0.3, gt=0)
    consensus: float = Field(0.03, gt=0, lt=1)
    warmup: int = Field(1, ge=0)
    space: Literal["updates", "weights"] = "updates"
    basis: Literal["exact", "randomised"] = "exact"
    rank: int | None = Field(None, ge=1)
    energy: float = Field(1.0, gt=0, le=1)
    residual: bool = True
    equalise: float = Field(1.0, ge=0)
    basis_momentum: float = Field(0.6, ge=0, lt=1)
    momentum: float = Field(0.3, ge=0, lt=1)
    momentum_kind: Literal["projected", "plain", "procrustes"] = "projected"
    server_learning_rate: float = Field(1.5, gt=0)
    seed: int = Field(0, ge=0)

    def sees(self) -> Literal["updates", "sums"]:
        """Sums, unless directions or the clients' whole weights are looked at."""
        by_sums = self.reliability != "direction" and self.space == "updates" and self.basis == "exact"
        return "sums" if by_sums else "updates"

    def releases(self) -> int:
        """A second sum with the clients' reliabilities."""
        return 1 if self.reliability == "none" else 2

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
            basis, spectrum, remembered = self._basis(name, self._source(cohort, name), shares, memory)
            kept |= remembered
            if self.reliability == "direction":
                mean, trust[name] = self._directions(cohort, name, basis, spectrum, memory)
            else:
                mean = cohort.sum(name)
            step, remembered = self._with_momentum(
                name, self._interference(mean, basis, spectrum), memory, basis
            )
            kept |= remembered
            fused[name] = self._stepped(state[name], step)
        if self.reliability == "direction":
            cohort.weigh(_weights(shares, trust, biases))
        for name in biases:
            step, remembered = self._with_momentum(name, cohort.sum(name), memory, None)
            kept |= remembered
            fused[name] = self._stepped(state[name], step)
        r = _mean_trust(shares, trust)
        figures = {"reliability": r, "weight": _reweigh(shares, r)}
        if clipped:
            figures["clip"] = clipped
        return Aggregate({name: fused[name] for name in state}, kept, figures)

    def _source(self, cohort: Cohort, name: str) -> Gram:
        if self.space == "updates":
            return cohort.gram(name)
        assert isinstance(cohort, Open)
        return cohort.matrices(name, whole=True)

    def _basis(
        self, name: str, source: Gram, shares: Weights, memory: Memory
    ) -> tuple[Tensor, Tensor, Memory]:
        """U and e of Ḡ = b Ḡ + (1 - b) G / tr G, and what the next round needs of Ḡ."""
        if self.basis == "exact":
            return self._exact(name, source, shares, memory, self.rank)
        rank = self.rank or _SKETCH_RANK
        if rank + _OVERSAMPLING >= source.shape[0]:
            return self._exact(name, source, shares, memory, rank)
        return self._randomised(name, source, shares, memory, rank)

    def _exact(
        self, name: str, source: Gram, shares: Weights, memory: Memory, rank: int | None
    ) -> tuple[Tensor, Tensor, Memory]:
        gram = source.gram(shares)
        trace = float(gram.diagonal().double().sum())
        old = memory.get(f"gram/{name}")
        gram *= self._fresh(trace, old)
        if old is not None:
            gram.add_(old, alpha=self.basis_momentum)
        basis, spectrum = canonical_basis(gram, rank, self.energy)
        return basis, spectrum, {f"gram/{name}": gram} if self.basis_momentum else {}

    def _randomised(
        self, name: str, source: Gram, shares: Weights, memory: Memory, rank: int
    ) -> tuple[Tensor, Tensor, Memory]:
        """Ḡ is remembered as the eigenpairs that the sketch found, with its whole trace."""
        old, old_values = memory.get(f"vectors/{name}"), memory.get(f"values/{name}")
        trace = source.trace(shares)
        fresh = self._fresh(trace, old)

        def times(right: Tensor) -> Tensor:
            product = fresh * source.gram_times(shares, right)
            if old is not None and old_values is not None:
                product += old @ ((self.basis_momentum * old_values)[:, None] * (old.T @ right))
            return product

        # A generator of its own: neither other random draws nor a resumed run may change the sketch.
        seed = zlib.crc32(f"{self.seed}/{name}/{_rounds(memory)}".encode())
        generator = torch.Generator().manual_seed(seed)
        size = (source.shape[0], rank + _OVERSAMPLING)
        vectors, values = randomised_basis(times, torch.randn(size, generator=generator, dtype=source.dtype))
        total = fresh * trace
        if old is not None:
            total += self.basis_momentum * float(memory[f"trace/{name}"])
        kept = leading(values, rank, self.energy, total)
        remembered = {f"vectors/{name}": vectors, f"values/{name}": values}
        remembered[f"trace/{name}"] = torch.tensor(total, dtype=torch.float64)
        return vectors[:, :kept], values[:kept], remembered if self.basis_momentum else {}

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

    def _directions(
        self, cohort: Cohort, name: str, basis: Tensor, spectrum: Tensor, memory: Memory
    ) -> tuple[Tensor, Weights]:
        """F = Σ ω_k D_k with weights by direction, and every client's reliability over all of them."""
        assert isinstance(cohort, Open)
        changes = cohort.matrices(name)
        cosines = agreement_by_direction(changes, cohort.shares, basis)
        warm = _rounds(memory) >= self.warmup
        trust = self._by_direction(cosines) if warm else torch.ones_like(cosines)
        return _fuse_directions(changes, cohort.shares, trust, basis, spectrum)

    def _by_client(self, cosines: Weights) -> Weights:
        """r_k: full for whoever agrees at least κ times as well as the median client."""
        enough = self.kappa * median(cosines.values())
        return {client: min(max(c / enough, _FLOOR), 1.0) for client, c in cosines.items()}

    def _by_direction(self, cosines: Tensor) -> Tensor:
        """r_{k,i}: the same in every direction. Bases change, so nothing is smoothed over rounds."""
        middle = cosines.quantile(0.5, dim=0)
        trust = (cosines / (self.kappa * middle)).clamp(_FLOOR, 1.0)
        return torch.where(middle >= self.consensus, trust, 1.0)

    def _interference(self, mean: Tensor, basis: Tensor, spectrum: Tensor) -> Tensor:
        """F + U (C' - C), or U C' without residual; only the fused update is decomposed.

        F is ours alone and is changed in place, as are the steps below: at LLaVA's size every copy counts.
        """
        if self.residual and self.equalise == 0:
            return mean
        coefficients = basis.T @ mean
        gains = self._gains(coefficients, spectrum)
        coefficients *= (gains - 1 if self.residual else gains)[:, None]
        return mean.addmm_(basis, coefficients) if self.residual else basis @ coefficients

    def _gains(self, coefficients: Tensor, spectrum: Tensor) -> Tensor:
        """(e_i / e_1 + 10⁻³)^(-a/2), scaled so that the norm of the coefficients is kept."""
        squares = torch.linalg.vecdot(coefficients, coefficients).double()
        if self.equalise == 0 or float(squares.sum()) == 0 or float(spectrum[0]) == 0:
            return torch.ones_like(spectrum)
        gains = (spectrum.double() / spectrum[0] + _SPECTRUM_FLOOR) ** (-self.equalise / 2)
        gains *= (squares.sum() / (gains**2 * squares).sum()).sqrt()
        return gains.to(spectrum.dtype)

    def _with_momentum(
        self, name: str, step: Tensor, memory: Memory, basis: Tensor | None
    ) -> tuple[Tensor, Memory]:
        """M ← β · last M, carried over to the new basis, + step. Biases have no basis."""
        if self.momentum == 0:
            return step, {}
        if f"momentum/{name}" in memory:
            last = self._carried(memory[f"momentum/{name}"], memory.get(f"basis/{name}"), basis)
            step.add_(last, alpha=self.momentum)
        remembered = {f"momentum/{name}": step}
        if basis is not None and self.momentum_kind == "procrustes":
            remembered[f"basis/{name}"] = basis
        return step, remembered

    def _carried(self, last: Tensor, old: Tensor | None, new: Tensor | None) -> Tensor:
        if new is None or self.momentum_kind == "plain":
            return last
        if self.momentum_kind == "procrustes" and old is not None:
            return new @ (polar(old.T @ new).T @ (old.T @ last))
        if new.shape[0] == new.shape[1]:  # U Uᵀ = I
            return last
        return new @ (new.T @ last)

    def _stepped(self, old: Tensor, step: Tensor) -> Tensor:
        return torch.add(old, step, alpha=self.server_learning_rate).to(old.dtype)


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
