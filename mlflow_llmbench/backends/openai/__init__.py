"""Measure a server that speaks the OpenAI interface."""
