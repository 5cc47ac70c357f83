"""What one GPU can show of the engine. `python -m benchmarks.gpu --help`; docs/gpu.md says what each section tells."""
