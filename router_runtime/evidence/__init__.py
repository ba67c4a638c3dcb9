"""Which device verified which cubin: cases, records and the status that follows."""
