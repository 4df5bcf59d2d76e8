"""``make demo``: the main job on a real guest, and what it prints."""
