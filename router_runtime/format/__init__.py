"""The files that the builder writes and the runtime reads, in plain standard-library Python."""
