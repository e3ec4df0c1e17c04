"""What a run will take, before anything is loaded: `align plan`, and `--fit`."""
