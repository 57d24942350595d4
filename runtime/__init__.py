"""Running artefacts: numpy and one engine, no torch and no transformers."""
