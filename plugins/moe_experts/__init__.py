"""A mixture of experts after its router's logits: choice, projections, activation, weighted sum."""
