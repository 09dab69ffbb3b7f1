"""Norms taken out by fine-tuning ("Transformers Don't Need LayerNorm at Inference Time"), and the tokens it takes."""
