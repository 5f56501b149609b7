"""Choosing a model without target labels, from saved predictions.

A *validator* gives a model a score, from its answers to target images without their labels and to
source images with them. Higher is better for every validator. `select` compares each validator's
choice with the oracle's. The oracle chooses by target labels, so its accuracy is no result.
"""

from __future__ import annotations

from domainshift.selection.arrays import SelectionError
from domainshift.selection.candidates import Selection, choice, rank_correlation, select
from domainshift.selection.importance import control_variate_risk, domain_weights
from domainshift.selection.validators import (
    VALIDATORS,
    Inputs,
    Validator,
    bnm,
    dev,
    held_out_accuracy,
    infomax,
    neighborhood_density,
    snd,
)

__all__ = [
    "VALIDATORS",
    "Inputs",
    "Selection",
    "SelectionError",
    "Validator",
    "bnm",
    "choice",
    "control_variate_risk",
    "dev",
    "domain_weights",
    "held_out_accuracy",
    "infomax",
    "neighborhood_density",
    "rank_correlation",
    "select",
    "snd",
]
