"""Which `renormalise` loses least, by router, shared expert, and how many experts are left."""
