"""The search loop: ask for a configuration, have it measured, tell the study; two trials at a time."""
