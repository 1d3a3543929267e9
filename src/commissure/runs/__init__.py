"""The run store: one SQLite file that survives kill -9."""
