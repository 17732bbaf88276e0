"""RMSNorm, after a residual sum or before the rotation of interleaved mRoPE, in one pass over memory."""
