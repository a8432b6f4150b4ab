"""Why a configuration lost accuracy: the errors of its layers, its values and channels, and what changes help."""
