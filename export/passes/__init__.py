"""Graph rewrites. One pass per file; each states what it requires and what it ensures (``onnx_ir.passes``)."""
