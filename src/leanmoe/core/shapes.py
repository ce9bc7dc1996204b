"""The one alphabet of shape letters: `scores_TE` is a tensor of tokens by experts.

A name's suffix spells its tensor's dimensions in order; a digit is a dimension of that size. A
letter has one meaning in the whole project. A file lists those it means something narrower by.
"""

from __future__ import annotations

from collections.abc import Mapping

LETTERS: Mapping[str, str] = {
    "B": "forward steps that are routed apart from each other",
    "C": "choices compared: candidates, configurations",
    "D": "hidden width",
    "E": "experts",
    "F": "fields of a record",
    "G": "groups of experts",
    "H": "attention heads",
    "I": "columns of a product's operands: what it sums over",
    "J": "columns of a product's result",
    "K": "slots of a token",
    "L": "MoE layers",
    "M": "an expert's width",
    "N": "tokens of a sequence",
    "P": "prompt tokens of a sequence",
    "Q": "quantiles",
    "R": "ranks",
    "S": "sequences",
    "T": "tokens: the rows of a forward step",
    "U": "units of a statistic: documents, questions or runs",
    "V": "vocabulary",
    "X": "all slots of a step in one row: in the order of their experts, the rows of products",
    "Z": "random draws: bootstrap replicates, sampled steps",
}
