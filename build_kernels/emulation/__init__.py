"""The tcgen05 kernels' own PTX on a Hopper GPU, their tcgen05 instructions in software."""
