"""Search space, samplers, study and Pareto front."""
