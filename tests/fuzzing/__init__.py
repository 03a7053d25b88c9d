"""Coverage-guided fuzzing of everything that reads bytes it did not write. `python -m tests.fuzzing --help`."""
