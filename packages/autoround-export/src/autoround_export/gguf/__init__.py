"""Format `gguf`: files for llama.cpp and everything built on it, see docs/formats/gguf.md."""
