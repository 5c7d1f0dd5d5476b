"""Guides q(z|x) on an encoder network, and all other guides by name.

A new guide is one class here: subclass `EncoderGuide`, say how many parameters it takes, turn parameters into a
distribution. Flows are in `pyrovae.guides.flow_guides`; what evaluation makes of any guide, in `pyrovae.guides.refinement` and
`pyrovae.guides.defensive`.
"""

from pyrovae.guides.base import EncoderGuide, Guide
from pyrovae.guides.defensive import DefensiveMixture
from pyrovae.guides.flow_guides import FlowGuide, InverseAutoregressiveFlow, NeuralSplineFlow
from pyrovae.guides.normals import FullRankNormal, LowRankNormal, MeanFieldNormal
from pyrovae.guides.refinement import Refined

__all__ = [
    "DefensiveMixture",
    "EncoderGuide",
    "FlowGuide",
    "FullRankNormal",
    "Guide",
    "InverseAutoregressiveFlow",
    "LowRankNormal",
    "MeanFieldNormal",
    "NeuralSplineFlow",
    "Refined",
]
