"""The coordinator's dashboard: what its folders and its ledger say, read-only, live, and to each viewer its own part.

``places``: which runs and ledgers lie under a folder. ``facts``: what a run's folder says, and where the run stands.
``records``: a ledger, followed line by line and verified again and again. ``figures``: ε by PLD, by RDP and the
Edgeworth estimate, in the background. ``watch``: all of this, kept up to date by one thread. ``rounds``: who took part
in which round and what became of it. ``views``: what a viewer may see, the only way from the data to a page.
``metrics``: the same figures for Prometheus. ``app``: routes, each with the rule of who may ask.
"""
