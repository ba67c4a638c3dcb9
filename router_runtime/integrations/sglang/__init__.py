"""SGLang: the MoE layers of DeepSeek-V4 models routed by these kernels; ``plugin`` says how."""
