"""Run models with transformers, and quantize, score and train them."""
