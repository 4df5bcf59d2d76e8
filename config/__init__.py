"""The configuration: TOML to checked models, every problem with its place. It knows nothing else of ours.

Not here: what this host can do of it (``daemon.checks``).
"""
