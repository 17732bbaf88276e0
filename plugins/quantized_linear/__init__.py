"""y = x W^T with W stored as floats or as block-wise integers, and x quantized on the fly for the latter."""
