"""Guides q(z|x): normal distributions and flows on an encoder network, and guides that improve another one for
evaluation.

To add a guide, subclass `EncoderGuide`, say how many parameters it takes, and turn parameters into a distribution.
Flows are in `pyrovae.guides.flow_guides`. `pyrovae.guides.refinement` and `pyrovae.guides.defensive` improve any guide
for evaluation.
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
