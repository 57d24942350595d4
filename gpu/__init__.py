"""Running on a GPU: a static batched cache, compiled steps, and the kernels that they need."""
