"""From a configuration to the measurements of its compiled module, on one model, its images and a target."""
