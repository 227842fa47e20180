"""Figures of classification, made of sums over items so that they can be bootstrapped."""

from __future__ import annotations

import numpy as np

from fedcmp.evaluate.metric import ratio


def confusion(said: np.ndarray, true: np.ndarray, classes: int) -> np.ndarray:
    """What macro-F1 is made of.

    Args:
        said: Predicted classes `(items,)` int.
        true: True classes `(items,)` int.
        classes: Their number.

    Returns:
        `(items, 3 * classes)` float64: of every class right, predicted and true.
    """
    predicted, labelled = np.eye(classes)[said], np.eye(classes)[true]
    return np.concatenate([predicted * labelled, predicted, labelled], 1)


def macro_f1(sums: np.ndarray) -> np.ndarray:
    """Mean F1 of the classes that are predicted or true anywhere, as scikit-learn's.

    Args:
        sums: `(..., 3 * classes)` of `confusion`'s rows.
    """
    right, predicted, labelled = np.split(sums, 3, -1)
    there = predicted + labelled
    return ratio(ratio(2 * right, there).sum(-1), (there > 0).sum(-1).astype(float))


def one_against_rest(likelihoods: np.ndarray) -> np.ndarray:
    """Log odds of each class against all others, which order items as the probabilities do.

    Probabilities near 1 would be equal in floating point where these are not.

    Args:
        likelihoods: Log-likelihoods `(items, classes)`, of at least two classes.

    Returns:
        `(items, classes)` float64.
    """
    top = likelihoods.max(1, keepdims=True)
    odds = np.empty_like(likelihoods, float)
    for column in range(likelihoods.shape[1]):
        others = np.delete(likelihoods, column, 1)
        most = others.max(1, keepdims=True)
        rest = np.log(np.exp(others - most).sum(1)) + (most - top)[:, 0]
        odds[:, column] = likelihoods[:, column] - top[:, 0] - rest
    return odds


def auroc_parts(scores: np.ndarray, true: np.ndarray) -> np.ndarray:
    """What the areas under the ROC curves are made of, one class against the rest.

    An area is no function of sums over items, but its first-order expansion is (DeLong et al., 1988): the
    mean over positive items of the share of negative ones below, plus the mean over negative items of the
    share of positive ones above, less the area. Over all items this is the area itself; over a resample it
    is so up to terms of second order.

    Args:
        scores: `(items, classes)`.
        true: True classes `(items,)` int.

    Returns:
        `(items, 5 * classes + 1)` float64: of every class the positive items' shares, one for each of them,
        the same two of negative items, and the area; then one. A class without positive or negative items
        has zeros.
    """
    items, classes = scores.shape
    parts = np.zeros((5, items, classes))
    for column in range(classes):
        positive = true == column
        if not positive.any() or positive.all():
            continue
        above, below = scores[positive, column], scores[~positive, column]
        parts[0, positive, column], parts[1, positive, column] = _share_below(below, above), 1
        parts[2, ~positive, column], parts[3, ~positive, column] = 1 - _share_below(above, below), 1
        parts[4, :, column] = parts[0, positive, column].mean()
    return np.concatenate([*parts, np.ones((items, 1))], 1)


def _share_below(among: np.ndarray, values: np.ndarray) -> np.ndarray:
    """For every value the share of others that are less, equal ones counted half."""
    ordered = np.sort(among)
    left, right = (np.searchsorted(ordered, values, side) for side in ("left", "right"))
    return (left + right) / (2 * len(among))


def macro_auroc(sums: np.ndarray) -> np.ndarray:
    """Mean area of the classes that have positive and negative items.

    Args:
        sums: `(..., 5 * classes + 1)` of `auroc_parts`' rows.
    """
    above, positive, below, negative, area = np.split(sums[..., :-1], 5, -1)
    there = (positive > 0) & (negative > 0)
    expanded = ratio(above, positive) + ratio(below, negative) - ratio(area, sums[..., -1:])
    areas = np.where(there, np.clip(expanded, 0, 1), 0)
    return ratio(areas.sum(-1), there.sum(-1).astype(float))
