"""The log: how a line looks, how many of a kind go out, how they reach a reader that may never come."""
