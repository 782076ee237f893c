"""One file an op: derivation, reference forward, reference backward, autograd.Function, public function."""
