"""From a kernel's source to a cubin: toolchain, compilers, worker processes, inspection."""
