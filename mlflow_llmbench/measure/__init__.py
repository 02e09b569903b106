"""Warm up, repeat and stamp; the worker process and its supervisor; the journal on disk."""
