"""One module per command-line verb: parse, call, print."""
