"""What the attention tests share: an independent fp64 oracle, the tolerance rule, inputs in poisoned memory."""
