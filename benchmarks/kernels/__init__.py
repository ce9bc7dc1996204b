"""Kernels of one MoE layer: routing and experts, on a CPU and on a GPU, beside their peers."""
