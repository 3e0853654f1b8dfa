"""The coordinator's side: the round loop, the aggregation and the accountant. It never imports torch."""
