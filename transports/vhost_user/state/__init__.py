"""What one connection has agreed on: features, memory, rings, and the rules that these have of their own.

Not here: how a request changes it (``requests``).
"""
