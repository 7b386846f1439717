"""The tests under every version that is tried, and runs that change version on their way: `make test-matrix`."""
