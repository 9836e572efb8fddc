"""The rank that each layer needs: measured, shared out, changed in training, and cut back.

Notation: dW = B A, with B (d, r) and A (r, k), times a scale of alpha / r, or alpha / sqrt(r)
with rsLoRA. Layers go by their path in the base model, such as
``"model.layers.0.self_attn.q_proj"``, whether an adapter is attached or not.
"""
