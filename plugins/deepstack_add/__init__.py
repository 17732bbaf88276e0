"""The addition of a decoder layer's DeepStack features to the visual tokens, by row index."""
