"""An HTTP server with OpenAI's interface over a fixed number of sessions. Needs ``trimkv-edge[serve]``."""
