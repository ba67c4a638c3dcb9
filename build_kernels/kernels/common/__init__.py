"""What several kernels share: numerics, scoring, selection and epilogue, in both languages."""
