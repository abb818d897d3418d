"""The server room: one guarded port in front of an engine that answers with a release of the trainer.

It shares nothing with the trainer but the release's files (manifest.json, probes.jsonl) and never imports it.
"""
