"""One module per verb: a click command named ``command`` that imports what is heavy inside its body."""
