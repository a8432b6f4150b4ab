"""Where modules are timed: this machine, one that is reached over a network, or one that a pack was measured on."""
