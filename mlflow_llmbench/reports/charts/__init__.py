"""Draw charts with matplotlib."""
