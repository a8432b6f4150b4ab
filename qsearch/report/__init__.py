"""Tables, pictures and dashboard notes."""
