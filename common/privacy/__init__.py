"""Privacy accounting that stands alone: numpy and scipy, and nothing else of this package.

>>> event = SampledGaussian(noise_multiplier=1.0, sample_rate=0.01, steps=1000)
>>> round(PLDAccountant().compose(event).epsilon(delta=1e-5), 3)
1.828
"""

from common.privacy.calibrate import calibrate_noise_multiplier
from common.privacy.checks import DELTA_FLOOR, RELATIONS, Relation, TooLarge
from common.privacy.edgeworth import EdgeworthAccountant, EdgeworthEstimate
from common.privacy.events import SampledGaussian, events_from_json, events_to_json
from common.privacy.gdp import gdp_delta, gdp_epsilon, gdp_mu
from common.privacy.pld import PLDAccountant
from common.privacy.rdp import RDPAccountant

__all__ = [
    "DELTA_FLOOR",
    "RELATIONS",
    "EdgeworthAccountant",
    "EdgeworthEstimate",
    "PLDAccountant",
    "RDPAccountant",
    "Relation",
    "SampledGaussian",
    "TooLarge",
    "calibrate_noise_multiplier",
    "events_from_json",
    "events_to_json",
    "gdp_delta",
    "gdp_epsilon",
    "gdp_mu",
]
