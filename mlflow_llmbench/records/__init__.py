"""Plain data that every other folder uses: cells, results, metrics, quantizations, errors."""
