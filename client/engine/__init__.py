"""Per-example-clipped LoRA steps at the price of ordinary ones."""

from client.engine.batches import Example
from client.engine.engine import Engine, make_engine
from client.engine.noise import NoiseSource
from client.engine.selftest import self_test
from client.engine.step import clipped_gradient_sum, private_step

__all__ = ["Engine", "Example", "NoiseSource", "clipped_gradient_sum", "make_engine", "private_step", "self_test"]
