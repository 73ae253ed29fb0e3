"""The question asked of one layer: which smaller matrix errs least, and in which sense of error."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from rocket.factorization.basis import Basis, basis_of_gram, basis_of_target
from rocket.factorization.whitening import Whitening, whiten

Cost = Literal["weight", "activation", "loss"]
AT_ONCE = 2048


@dataclass(frozen=True, eq=False)
class LayerProblem:
    """One layer y = W x with what calibration knows of it.

    ``weight`` is W, [out, in]. ``gram`` is G = E[x xᵀ], [in, in]. ``sensitivity`` is φ, [out], with
    φ_j = E[(∂(summed token loss)/∂y_j)²]; only the cost ``loss`` needs it.

    The cost of replacing W by Ŵ, Δ = Ŵ - W:

    - ``weight`` (the paper's): ‖Δ‖_F / ‖W‖_F
    - ``activation``: E‖Δx‖² / E‖Wx‖² = tr(ΔGΔᵀ) / tr(WGWᵀ)
    - ``loss``: ½ Σ_j φ_j δ_j G δ_jᵀ, the expected increase of the loss per token, in nats

    ``shrinkage`` is the share by which `tempered` trusts the correlations between inputs less; ``trust`` is how far
    this problem does: the off-diagonal of G counts for so much.

    >>> problem = LayerProblem(torch.eye(2), torch.diag(torch.tensor([1.0, 4.0])), torch.ones(2), "loss")
    >>> problem.evaluate(torch.diag(torch.tensor([1.0, 0.0])))
    2.0
    """

    weight: Tensor
    gram: Tensor
    sensitivity: Tensor | None = None
    cost: Cost = "weight"
    shrinkage: float = 0.0
    trust: float = 1.0

    def __post_init__(self) -> None:
        out_features, in_features = self.weight.shape
        if self.gram.shape != (in_features, in_features):
            raise ValueError(f"weight {tuple(self.weight.shape)} needs a Gram of [{in_features}, {in_features}]")
        if self.cost == "loss" and self.sensitivity is None:
            raise ValueError("the cost 'loss' needs the layer's sensitivity")
        if self.sensitivity is not None and self.sensitivity.shape != (out_features,):
            raise ValueError(f"sensitivity must be [{out_features}], got {tuple(self.sensitivity.shape)}")
        for name, tensor in (("weight", self.weight), ("Gram matrix", self.gram), ("sensitivity", self.sensitivity)):
            if tensor is not None and not torch.isfinite(tensor.sum()) and not (finite := torch.isfinite(tensor)).all():
                raise ValueError(f"the {name} has {int((~finite).sum())} values that are not finite")

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def max_rank(self) -> int:
        return min(self.weight.shape)

    @cached_property
    def tempered(self) -> LayerProblem:
        """The problem that approximations are fitted to, while costs are this one's.

        Its correlations between inputs are shrunk towards 0 by ``shrinkage``, and for ``loss`` its outputs weigh by √φ
        rather than φ. Both come from one domain's text; trusted fully they give the least cost there and up to twice
        the loss elsewhere. Without shrinkage, and for other costs than ``loss``, it is the problem itself.
        """
        if self.shrinkage == 0.0 and self.column_weights is None:
            return self
        trust = self.trust * (1.0 - self.shrinkage)
        return replace(self, sensitivity=self.column_weights, shrinkage=0.0, trust=trust)

    @cached_property
    def whitening(self) -> Whitening:
        """S, for layers of fewer inputs than outputs; others need none (`target`)."""
        gram = self.gram
        if self.trust < 1.0:
            gram = self.trust * gram
            gram.diagonal().copy_(self.gram.diagonal())
        return whiten(gram)

    @property
    def damping(self) -> float:
        """What fits needed for a positive definite Gram matrix (`whiten`); 0 if none of them was whitened."""
        whitening = vars(self.tempered).get("whitening")
        return 0.0 if whitening is None else whitening.damping

    @cached_property
    def column_weights(self) -> Tensor | None:
        """√φ_j, [out], floored at a thousandth of the mean so that no output is free; None unless the cost is loss."""
        if self.cost != "loss" or self.sensitivity is None:
            return None
        weights = self.sensitivity.double().clamp(min=0).sqrt()
        return weights.clamp(min=float(weights.mean()) * 1e-3 + 1e-30)

    @property
    def weighted(self) -> Tensor:
        """W in float64, its rows scaled by √φ for ``loss``."""
        if self.column_weights is None:
            return self.weight.double()
        return self.weight.double() * self.column_weights[:, None]

    @cached_property
    def output_gram(self) -> Tensor:
        """ZᵀZ [out, out] in float64 for Z = S Wᵀ, columns scaled by √φ for ``loss``: W G Wᵀ, which takes no S."""
        weight = self.weighted
        total = weight.new_zeros(self.out_features, self.out_features)
        for start in range(0, self.in_features, AT_ONCE):
            columns = slice(start, start + AT_ONCE)
            panel = weight @ self.gram[:, columns].double()
            if self.trust < 1.0:
                panel.lerp_(weight[:, columns] * self.gram.diagonal()[columns].double(), 1.0 - self.trust)
            total.addmm_(panel, weight[:, columns].T)
        return total

    @cached_property
    def target(self) -> Tensor:
        """T [min(in, out), out] in float64, with TᵀT = ZᵀZ: what the factorization approximates, up to a rotation.

        Of Z only the rows count: atoms come from the weights (`dictionary.factorize`). So T is Z = S Wᵀ itself or, in
        layers of more inputs than outputs, a Cholesky factor of W G Wᵀ, which takes no root of G.
        """
        if self.in_features <= self.out_features:
            return self.whitening.root @ self.weighted.T
        return whiten(self.output_gram).root if self.output_gram.any() else self.output_gram

    @cached_property
    def basis(self) -> Basis:
        """The singular values and right singular vectors of ``target``, which the forms share."""
        if self.in_features <= self.out_features:
            return basis_of_target(self.target)
        return basis_of_gram(self.output_gram)

    @cached_property
    def weight_scales(self) -> Tensor:
        """‖S⁻¹ z_i‖ [r] of the terms z_i = σ_i q_i of Z: how strongly each shows in weight space."""
        scales: Tensor = (self.basis.rows.double() @ self.weighted).norm(dim=1)
        return scales.float()

    @cached_property
    def cost_target(self) -> Tensor:
        """T [min(in, out), out] with ‖T(I - Π)‖² the squared error of the cost, for a projection Π of the columns.

        T is ``target``, or for the cost ``weight`` Wᵀ, rotated into its row space where that is smaller.
        """
        if self.cost != "weight":
            return self.target.float()
        if self.in_features <= self.out_features:
            return self.weight.float().T
        rotated: Tensor = torch.linalg.qr(self.weight.double().T, mode="r").R
        return rotated.float()

    def prepare(self) -> LayerProblem:
        """`tempered`, after what costs need, of which only that is kept: both take large matrices for a while."""
        self.cost_target  # noqa: B018
        if self.tempered is not self:
            for name in ("whitening", "output_gram", "target"):
                vars(self).pop(name, None)
        return self.tempered

    @cached_property
    def squared_norm(self) -> float:
        """‖T‖²: the squared error of removing the layer altogether, in the units of ``squared_error``."""
        return float(self.cost_target.double().square().sum())

    @cached_property
    def prices(self) -> dict[tuple[object, ...], list[float]]:
        """Costs that one form found, for others that go on from them; by its name and what was asked."""
        return {}

    @property
    def power(self) -> int:
        """p such that costᵖ is proportional to a squared error."""
        return 2 if self.cost == "weight" else 1

    def to_cost(self, squared_error: float) -> float:
        """The cost that belongs to a squared error in the space of ``cost_target``."""
        squared_error = max(squared_error, 0.0)
        if self.cost == "loss":
            return 0.5 * squared_error
        relative = squared_error / self.squared_norm if self.squared_norm > 0 else 0.0
        return float(relative**0.5) if self.cost == "weight" else relative

    def evaluate(self, weight: Tensor) -> float:
        """The cost of replacing W by ``weight`` [out, in], straight from the definition."""
        if self.cost == "weight":
            return self.to_cost(float((weight.double() - self.weight.double()).square().sum()))
        error = 0.0
        for start in range(0, self.out_features, AT_ONCE):
            rows = slice(start, start + AT_ONCE)
            delta = weight[rows].double() - self.weight[rows].double()
            for first in range(0, self.in_features, AT_ONCE):
                columns = slice(first, first + AT_ONCE)
                images = delta @ self.gram[:, columns].double()
                if self.trust < 1.0:
                    images.lerp_(delta[:, columns] * self.gram.diagonal()[columns].double(), 1.0 - self.trust)
                errors = (images * delta[:, columns]).sum(dim=1)
                error += float(
                    (errors if self.column_weights is None else errors * self.column_weights[rows] ** 2).sum()
                )
        return self.to_cost(error)
