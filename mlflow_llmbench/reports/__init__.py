"""Render results as text tables, Markdown, HTML, JSON and charts."""
