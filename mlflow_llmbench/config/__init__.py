"""Turn parameters given as text into a validated specification; presets and model shapes."""
