"""The processes of a deployment: services, trainers, runs, and what looks after them."""
