"""The three ways to use the PyTorch models, one short script each; all run on the sample model that ships."""
