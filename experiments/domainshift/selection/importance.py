"""Target risk from source losses: weights by a domain classifier, and a control variate.

Both are parts of Deep Embedded Validation. See `domainshift.selection.validators.dev`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import optimize, special

from domainshift.selection.arrays import SelectionError, matrix, same_width, vector

PENALTY = 1.0  # of the domain classifier's squared coefficients
ITERATIONS = 10_000


def domain_weights(source: Any, target: Any, at: Any, penalty: float = PENALTY) -> np.ndarray:
    """Density of the target divided by that of the source, estimated at given rows.

    A logistic regression f tells the two domains apart, and Bayes' rule makes its odds a ratio of
    densities: n_source / n_target * p(target | x) / p(source | x). Columns are first shifted and scaled
    to mean 0 and variance 1 over both domains. The fit minimises the summed log loss plus
    penalty / 2 * |coefficients|^2, without a penalty on the intercept, by L-BFGS from zero. The same
    arrays give the same weights.

    Args:
        source: (n_source, d), features of source images.
        target: (n_target, d), features of target images.
        at: (n, d), where the ratio is wanted.
        penalty: above 0.

    Returns:
        float64 (n,), above 0.

    Raises:
        SelectionError: an array is empty, not finite or of another width; the penalty is not above 0;
            L-BFGS reached its limit of iterations.
    """
    source, target, at = matrix("source", source), matrix("target", target), matrix("at", at)
    same_width("target", target, "source", source)
    same_width("at", at, "source", source)
    if not 0 < penalty < np.inf:
        raise SelectionError(f"penalty: {penalty} is not allowed; allowed: above 0, finite")
    both = np.concatenate((source, target))
    centre, scale = both.mean(0), both.std(0)
    constant = scale <= 1e-12 * np.maximum(1.0, np.abs(centre))
    scale = np.where(constant, 1.0, scale)
    kept = np.where(constant, 0.0, 1.0)  # a column that never varies tells no domain
    sides = np.repeat([-1.0, 1.0], [len(source), len(target)])
    coefficients, intercept = _logistic((both - centre) / scale * kept, sides, penalty)
    log_odds = (at - centre) / scale * kept @ coefficients + intercept
    return np.exp(log_odds + np.log(len(source) / len(target)))


def _logistic(rows: np.ndarray, sides: np.ndarray, penalty: float) -> tuple[np.ndarray, float]:
    """Coefficients and intercept of log p(side 1) / p(side -1), for sides of 1 and -1."""

    def objective(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        coefficients, intercept = parameters[:-1], parameters[-1]
        margins = sides * (rows @ coefficients + intercept)
        loss = -special.log_expit(margins).sum() + penalty / 2 * coefficients @ coefficients
        slopes = -sides * special.expit(-margins)
        gradient = np.append(rows.T @ slopes + penalty * coefficients, slopes.sum())
        return loss / len(rows), gradient / len(rows)

    options = {"maxiter": ITERATIONS, "maxfun": 10 * ITERATIONS, "gtol": 1e-9, "ftol": 1e-15}
    start = np.zeros(rows.shape[1] + 1)
    result = optimize.minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
    if result.status == 1:  # others: converged, or no further step is left in double precision
        raise SelectionError(
            f"penalty: {penalty} is not allowed: the domain classifier has not converged after "
            f"{result.nit} iterations; allowed: a larger one"
        )
    return result.x[:-1], float(result.x[-1])


def control_variate_risk(weights: Any, losses: Any) -> float:
    """Target risk by weighted source losses, with the control variate of You et al.

    With the mean of the weights known to be 1, mean(w l) + eta * (mean(w) - 1) estimates the risk for
    any eta, and eta = -cov(w l, w) / var(w) has the least variance. Both moments have divisor n - 1.
    Weights that are all the same give no eta (0 / 0); there it is 0, and the risk is the weighted mean.
    Losses that are all the same, c, give the risk c whatever the weights.

    Args:
        weights: (n,), of `domain_weights`, n >= 2.
        losses: (n,), of the same images.

    Returns:
        The risk, in the unit of the losses. It may lie outside their range.

    Raises:
        SelectionError: an array has the wrong shape, fewer than two values, or one that is not finite.
    """
    weights, losses = vector("weights", weights, 2), vector("losses", losses)
    if len(losses) != len(weights):
        raise SelectionError(
            f"losses: {len(losses)} values are not allowed; allowed: {len(weights)}, one per weight"
        )
    weighted, centred = weights * losses, weights - weights.mean()
    variance = centred @ centred / (len(weights) - 1)
    # equal weights may differ in their last bits
    if np.sqrt(variance) <= 1e-12 * max(1.0, np.abs(weights).max()):
        return float(weighted.mean())
    covariance = centred @ (weighted - weighted.mean()) / (len(weights) - 1)
    eta = -covariance / variance
    return float(weighted.mean() + eta * (weights.mean() - 1))
