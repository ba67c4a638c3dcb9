"""From built artifacts to a release: wheel, provenance, signature and their verification."""
