"""What the operators share: declarations and cases in Python, the host and device headers in C++."""
