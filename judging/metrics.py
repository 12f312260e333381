"""Figures of image quality from features, logits and pixels, and how far each can be believed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Float64 = npt.NDArray[np.float64]

NEIGHBOURS = 3
"""k of the nearest-neighbour balls; Kynkäänniemi et al. (2019), section 5."""

SPLITS = 10
"""Parts of the Inception Score; Salimans et al. (2016) and every figure published since."""

RESAMPLES = 200
MOST_RESAMPLED_DIMENSIONS = 256
"""A distance costs the cube of its dimensions: a millisecond for 96, seconds for 2048."""

BATCH_NUMBERS = 4_000_000
"""Numbers of resampled features held at a time, 32 MB."""

MOST_PSNR_DB = 150.0
"""Reported for equal images too: float32 in [-1, 1] rounds to 2^-25, whose PSNR is 156 dB."""


@dataclass(frozen=True, slots=True)
class Interval:
    low: float
    high: float


def wilson(hits: int, count: int, confidence: float = 0.95) -> Interval:
    """The interval of a share of hits out of count, 1 or more; Wilson (1927)."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, spread = hits / count, z * z / count
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return Interval(max(0.0, centre - half), min(1.0, centre + half))


def worse_by_chance(right: Tensor, reference_right: Tensor) -> float:
    """How likely it is that images as good as the reference's do this badly or worse: an exact McNemar test, one-sided.

    right, reference_right: [N] bool, of the same images made in two ways. Only images that one of both has wrong count;
    were both equally good, either would be the wrong one with probability 1/2. McNemar (1947).
    """
    lost = int((reference_right & ~right).sum())
    won = int((right & ~reference_right).sum())
    trials = lost + won
    return sum(math.comb(trials, k) for k in range(lost, trials + 1)) / 2**trials


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """mean [D] and covariance [D, D] of features, float64."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Of features [N, D], N 2 or more."""
        values = features.double()
        return cls(values.mean(dim=0), torch.cov(values.T))


def frechet(features: Tensor, reference: Moments) -> float:
    """Squared Fréchet distance between the Gaussian fitted to features [N, D] and one of reference moments.

    |m - m_ref|^2 + tr(C + C_ref - 2 (C_ref C)^(1/2)), in float64; Heusel et al., GANs Trained by a Two Time-Scale
    Update Rule (2017), eq. 6.
    """
    return float(_distances(features[None], reference))


def frechet_resampled(features: Tensor, reference: Moments, seed: int = 0) -> Float64:
    """The distance of RESAMPLES sets drawn with replacement from features [N, D]; none for too many dimensions.

    Two sets of N features have the same rows drawn, so that their results are pairs. A drawn set is farther from the
    reference than the whole, as it holds fewer different images: its spread is of use, its mean is not.
    """
    count, dimensions = features.shape
    if dimensions > MOST_RESAMPLED_DIMENSIONS:
        return np.empty(0)
    rng = np.random.default_rng(seed)
    rows = torch.from_numpy(rng.integers(0, count, size=(RESAMPLES, count)))
    parts = rows.split(max(1, BATCH_NUMBERS // (count * dimensions)))
    return torch.cat([_distances(features[part], reference) for part in parts]).numpy()


def _distances(sets: Tensor, reference: Moments) -> Tensor:
    """The distance of each of many sets of features [B, N, D]: [B].

    With a set's C = A^T A, A [N, D], and R = C_ref^(1/2), C_ref C has the eigenvalues of R C R and, but for zeros,
    those of A C_ref A^T; the smaller matrix is taken. Both are symmetric; rounding leaves eigenvalues slightly below 0.
    """
    _, count, dimensions = sets.shape
    values = sets.double()
    mean = values.mean(dim=1)
    centred = (values - mean[:, None]) / math.sqrt(count - 1)
    if count > dimensions:
        eigenvalues, vectors = torch.linalg.eigh(reference.covariance)
        root = vectors * eigenvalues.clamp(min=0).sqrt() @ vectors.T
        product = root @ (centred.mT @ centred) @ root
    else:
        product = centred @ reference.covariance @ centred.mT
    trace = torch.linalg.eigvalsh((product + product.mT) / 2).clamp(min=0).sqrt().sum(dim=1)
    spread = reference.covariance.trace() + centred.square().sum(dim=(1, 2))
    return (mean - reference.mean).square().sum(dim=1) + spread - 2 * trace


def around(value: float, resampled: Float64, confidence: float) -> Interval | None:
    """The interval of a value by the spread of its resamples [R] about their mean; None where there are none."""
    if not len(resampled):
        return None
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled - resampled.mean(), [tail, 1 - tail]).tolist()
    return Interval(value + low, value + high)


@dataclass(frozen=True, slots=True)
class PrecisionRecall:
    precision: float
    recall: float


def precision_recall(features: Tensor, reference: Tensor, k: int = NEIGHBOURS) -> PrecisionRecall | None:
    """Share of features [N, D] in the manifold of reference [M, D], and of reference in that of features.

    A set's manifold is the balls around its members that reach to the k-th nearest other member; Kynkäänniemi et al.,
    Improved Precision and Recall Metric (2019), eq. 1 and 2. Both depend on N and M. None for sets of k or fewer.
    """
    if min(len(features), len(reference)) <= k:
        return None
    own, wanted = features.double(), reference.double()
    return PrecisionRecall(
        precision=_share_inside(own, wanted, _radii(wanted, k)), recall=_share_inside(wanted, own, _radii(own, k))
    )


def _radii(features: Tensor, k: int, batch: int = 1000) -> Tensor:
    """[N]: the distance to the k-th nearest other row; a row's distance to itself is the smallest, so k + 1."""
    return torch.cat([torch.cdist(part, features).kthvalue(k + 1).values for part in features.split(batch)])


def _share_inside(features: Tensor, centres: Tensor, radii: Tensor, batch: int = 1000) -> float:
    inside = [(torch.cdist(part, centres) <= radii).any(dim=1) for part in features.split(batch)]
    return float(torch.cat(inside).double().mean())


@dataclass(frozen=True, slots=True)
class InceptionScore:
    """Mean and standard deviation over the splits."""

    mean: float
    std: float


def inception_score(logits: Tensor, splits: int = SPLITS) -> InceptionScore:
    """exp of the mean KL(p(y | x) || p(y)) in each of `splits` runs of logits [N, K], in their order.

    Salimans et al., Improved Techniques for Training GANs (2016), section 4. Fewer splits for fewer images.
    """
    log_p = logits.double().log_softmax(dim=1)
    scores = []
    for part in log_p.tensor_split(min(splits, len(log_p))):
        log_marginal = part.exp().mean(dim=0).log()
        scores.append(math.exp(float((part.exp() * (part - log_marginal)).sum(dim=1).mean())))
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)))


@dataclass(frozen=True, slots=True)
class Psnr:
    """In dB: of the error of all images together, of the median image, and of the worst."""

    whole: float
    median: float
    least: float


def psnr(images: Tensor, wanted: Tensor) -> Psnr:
    """Peak signal-to-noise ratio of images beside others [N, C, H, W], in [-1, 1], of which the peak is 2."""
    errors = (images.double() - wanted.double()).square().flatten(1).mean(dim=1)
    return Psnr(_decibels(errors.mean()), _decibels(errors.quantile(0.5)), _decibels(errors.max()))


def _decibels(error: Tensor) -> float:
    return min(MOST_PSNR_DB, float(10 * torch.log10(4 / error)))
