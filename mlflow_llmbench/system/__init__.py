"""Read the machine: memory, GPUs, fingerprint, noise, and estimate what fits."""
