"""The oracle suite on a device: inputs, what is expected of them, and the comparison."""
