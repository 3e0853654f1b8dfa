"""A federation on one machine: the parties of a run in one process, or on Ray."""
