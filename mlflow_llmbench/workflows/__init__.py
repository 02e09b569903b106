"""Commands that combine sweeps: A/B, study, QAT, reproduce, gate, import, doctor."""
