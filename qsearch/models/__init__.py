"""Import a torch model into the layer graph; the model zoo; the built-in demo."""
