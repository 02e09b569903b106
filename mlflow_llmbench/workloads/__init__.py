"""Prompts, conversations, traces, arrival schedules and the bundled data."""
