"""Measures that compare sets of numbers: distances of feature sets, and how well scores tell right from wrong."""

import numpy as np


def frechet(a, b):
    """Fréchet distance of two sets of features [N, D], [M, D], each taken for a normal distribution:
    |mean - mean|² + trace(A + B - 2 (A B)^½) with covariances A and B (arXiv:1706.08500).

    It falls with N for sets alike, as covariances of few features are too wide: compare equal N, of more than D.
    It is called FID with Inception's features alone; ours is named after the network that gave the features.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(
            f"expected features [N, D] and [M, D] of at least two pictures, found {a.shape}, {b.shape}"
        )
    A, B = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    # The eigenvalues of A B are those of A^½ B A^½, which is symmetric: no complex roots, no iteration.
    values, vectors = np.linalg.eigh(A)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    shared = np.linalg.eigvalsh(root @ B @ root)
    gap = a.mean(0) - b.mean(0)
    distance = gap @ gap + np.trace(A) + np.trace(B) - 2 * np.sqrt(np.maximum(shared, 0)).sum()
    return float(max(distance, 0.0))


def auc(right, wrong):
    """The chance that a score of `right` [N] is above one of `wrong` [M], ties half: the area under the ROC curve."""
    right, wrong = np.asarray(right), np.sort(np.asarray(wrong))
    below = np.searchsorted(wrong, right, "left") + np.searchsorted(wrong, right, "right")
    return float(below.mean() / (2 * len(wrong)))
