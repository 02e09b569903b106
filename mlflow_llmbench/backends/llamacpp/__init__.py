"""Run GGUF models with llama.cpp in process, and make GGUF files."""
