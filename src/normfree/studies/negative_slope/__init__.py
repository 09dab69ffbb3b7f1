"""Fixed negative slopes without LayerNorm (ReLU's Revival, Section 3, Figure 5): NaNs and entropy collapse."""
