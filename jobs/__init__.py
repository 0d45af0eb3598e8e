"""The runner: plan, workers, executors, storage, manifest and command line."""
