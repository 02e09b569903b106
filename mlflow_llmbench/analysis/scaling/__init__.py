"""Fit scaling laws, find the best batch sizes and judge the claims of the paper."""
