"""Compute metrics from stamps, judge runs and compare them. Pure functions over records."""
