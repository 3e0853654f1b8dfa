"""The order of calls around a real guard, without a model: it counts how often records would have been looked at."""

import numpy as np

from client.admission import Granted, Lost, Replay
from common.messages import Status, StatusCode


class GuardedTrainer:
    """What ``client.trainer.Trainer`` does with its guard; its update is ones."""

    def __init__(self, guard, description):
        self.guard, self.description, self.reads = guard, description, 0

    def describe(self):
        return self.description

    def signed_list(self, request):
        return self.guard.signed_list(request)

    def train(self, request):
        shapes = self.description.shapes
        admission = self.guard.admit(request, shapes=shapes)
        if isinstance(admission, Replay):
            return admission.reply
        if isinstance(admission, Lost):
            return Status(StatusCode.LOST)
        if not isinstance(admission, Granted):
            return admission.refusal
        self.guard.start(request)
        self.reads += 1
        return self.guard.finish(request, {name: np.ones(shape, np.float32) for name, shape in shapes.items()})
