"""Weight rounding that looks at what a layer reads: slower than to nearest, far better at few bits."""
