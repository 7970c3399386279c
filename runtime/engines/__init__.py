"""One module per engine family, each with the same two functions: build and open."""
