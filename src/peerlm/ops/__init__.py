"""The mathematics of product-key retrieval and single-neuron experts: functions of tensors, no state."""
