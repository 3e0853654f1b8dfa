"""Privacy accounting that stands alone: numpy and scipy, and nothing else of this package.

>>> from common.privacy import PLDAccountant, SampledGaussian
>>> event = SampledGaussian(noise_multiplier=1.0, sample_rate=0.01, steps=1000)
>>> round(PLDAccountant().compose(event).epsilon(delta=1e-5), 3)
1.828

Accountants are loaded when they are first named: who only passes events on, like the relay that Flower starts for every
message, does not wait for scipy.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from common.privacy.checks import DELTA_FLOOR, RELATIONS, Relation, TooLarge
from common.privacy.events import SampledGaussian, events_from_json, events_to_json

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

if TYPE_CHECKING:
    from common.privacy.calibrate import calibrate_noise_multiplier
    from common.privacy.edgeworth import EdgeworthAccountant, EdgeworthEstimate
    from common.privacy.gdp import gdp_delta, gdp_epsilon, gdp_mu
    from common.privacy.pld import PLDAccountant
    from common.privacy.rdp import RDPAccountant
else:
    _ROOMS = {
        "EdgeworthAccountant": "edgeworth",
        "EdgeworthEstimate": "edgeworth",
        "PLDAccountant": "pld",
        "RDPAccountant": "rdp",
        "calibrate_noise_multiplier": "calibrate",
        "gdp_delta": "gdp",
        "gdp_epsilon": "gdp",
        "gdp_mu": "gdp",
    }

    def __getattr__(name):
        """Load the room of a name that was not needed until now (PEP 562)."""
        if name not in _ROOMS:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)
        globals()[name] = found
        return found
