"""What a process imports whose clock shall be wrong: this directory is on its PYTHONPATH (see `sitecustomize`)."""
